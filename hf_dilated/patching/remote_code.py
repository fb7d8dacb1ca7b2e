"""Code in a checkpoint that is patched: ``trust_remote_code=True`` instead of ``import hf_dilated``."""

from typing import Any

from hf_dilated.integration.carried import CODE, FILE, MODULE, module_source, own_classes, package_source
from hf_dilated.integration.loading import auto_classes
from hf_dilated.patching.errors import PatchError


def add(config: Any) -> dict[str, str]:
    """Let ``config.auto_map`` name our classes; return the files that they need.

    Raises:
        PatchError: If the checkpoint brings code already, or Transformers has no AutoClass for it.
    """
    if getattr(config, "auto_map", None):
        raise PatchError("remote_code: the checkpoint brings code of its own; leave the option out")
    classes = auto_classes(config)
    if not classes:
        raise PatchError(f"remote_code: Transformers has no AutoClass for {type(config).__name__}")
    config.auto_map = {name: f"{MODULE}.{model}" for name, model in classes.items()}
    return {FILE: module_source(classes.values()), CODE: package_source()}


def forget(config: Any) -> None:
    """Take our classes out of ``config.auto_map``."""
    found = getattr(config, "auto_map", None) or {}
    own = own_classes(found)
    if own and own.keys() == found.keys():
        del config.auto_map
    elif own:
        config.auto_map = {name: reference for name, reference in found.items() if name not in own}
