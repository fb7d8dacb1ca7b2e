"""The module that lets a checkpoint load under ``trust_remote_code=True`` without ``import hf_dilated``."""

from typing import Any

from hf_dilated.integration.loading import auto_classes
from hf_dilated.patching.errors import PatchError

MODULE = "modeling_hf_dilated"
FILE = f"{MODULE}.py"
HEADER = '''"""Loads this checkpoint under trust_remote_code=True; needs `pip install hf_dilated`."""

import hf_dilated  # noqa: F401  (registers the attention backend that config.json names)
import transformers
'''
CLASS = '''

class {name}(transformers.{name}):
    """As in Transformers; a class of its own, because a checkpoint can only bring its own classes."""
'''


def auto_map(config: Any) -> dict[str, str]:
    """Which class of the module every AutoClass takes.

    Raises:
        PatchError: If the checkpoint brings code already, or Transformers has no AutoClass for it.
    """
    if getattr(config, "auto_map", None):
        raise PatchError("remote_code: the checkpoint brings code of its own; leave the option out")
    classes = auto_classes(config)
    if not classes:
        raise PatchError(f"remote_code: Transformers has no AutoClass for {type(config).__name__}")
    return {name: f"{MODULE}.{model}" for name, model in classes.items()}


def module_source(classes: dict[str, str]) -> str:
    """The text of the module for the classes of :func:`auto_map`."""
    names = sorted({reference.partition(".")[2] for reference in classes.values()})
    return HEADER + "".join(CLASS.format(name=name) for name in names)


def forget(config: Any) -> None:
    """Take the module's classes out of ``config.auto_map``."""
    found = getattr(config, "auto_map", None) or {}
    own = {name for name, reference in found.items() if str(reference).startswith(f"{MODULE}.")}
    if own and own == set(found):
        del config.auto_map
    elif own:
        config.auto_map = {name: reference for name, reference in found.items() if name not in own}
