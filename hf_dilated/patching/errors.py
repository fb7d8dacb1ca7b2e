"""The error of patching."""


class PatchError(ValueError):
    """A checkpoint or an option that cannot be patched; the message names the file or option and the way out."""
