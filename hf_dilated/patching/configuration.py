"""The configuration of a checkpoint before and after, and the smallest change of its ``config.json`` in between."""

import copy
import dataclasses
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import nn
from transformers import AutoConfig, AutoModel, PreTrainedConfig

from hf_dilated.config import BlockSparseConfig, ConfigError, DilatedConfig, StoredConfig
from hf_dilated.integration.backends import BACKENDS
from hf_dilated.integration.persistence import FIELD, stored_config
from hf_dilated.integration.report import ModelReport, ReportError, report
from hf_dilated.integration.support import UnsupportedError
from hf_dilated.patching import rope
from hf_dilated.patching.errors import PatchError

Attention = DilatedConfig | BlockSparseConfig | StoredConfig | Mapping[str, Any] | None
# What patching may change beside the backend, and puts into StoredConfig.original.
ROPE_FIELDS = ("max_position_embeddings", "rope_parameters", "head_dim")


def load_config(folder: Path) -> PreTrainedConfig:
    """Read the configuration of a checkpoint.

    Raises:
        PatchError: If Transformers does not know the architecture, or the file is broken.
    """
    try:
        return AutoConfig.from_pretrained(folder, trust_remote_code=False)
    except ConfigError:
        raise
    except (ValueError, KeyError, TypeError, OSError) as error:
        if "trust_remote_code" in str(error):
            raise PatchError(
                f"{folder}: its model is code of its own, which patching does not run; load it with "
                "trust_remote_code=True, set config.hf_dilated and save it"
            ) from error
        raise PatchError(f"{folder / 'config.json'}: {error}") from error


def text_config(config: Any) -> Any:
    """The configuration that attention modules read: of a multimodal model the text part."""
    return config.get_text_config() if config.sub_configs else config


def patch_config(
    config: Any,
    *,
    backend: str | None,
    attention: Attention,
    max_position_embeddings: int | None,
    rope_scaling: rope.RopeScaling,
) -> ModelReport:
    """Give a configuration backend, pattern and reach; what they replace is kept in ``StoredConfig.original``.

    Args:
        config: Changed in place; on an error it is unusable.

    Returns:
        What every layer of the patched model will run.

    Raises:
        PatchError: If the model is patched already, would be refused, or cannot be extended.
        ConfigError: If the pattern is malformed.
    """
    text = text_config(config)
    if stored_config(config).original is not None:
        raise PatchError("the checkpoint is patched already; use its original, or unpatch it first")
    original = {name: copy.deepcopy(getattr(text, name, None)) for name in ROPE_FIELDS}
    length = rope.reach(text, max_position_embeddings)
    if max_position_embeddings is not None or rope_scaling is not None:
        if length is None:
            raise PatchError("rope_scaling: pass max_position_embeddings too, the longest input in tokens")
        rope.extend(text, length, rope_scaling)
        rope.check_honoured(*_with_its_text_config(config))
    changed = {name: value for name, value in original.items() if getattr(text, name, None) != value}
    _choose_attention(config, backend, attention, length)
    config.hf_dilated = dataclasses.replace(stored_config(config), original=changed)
    return _checked_report(config)


def unpatch_config(config: Any, *, keep_rope: bool) -> None:
    """Take backend and pattern from a configuration, in place.

    Args:
        keep_rope: Leave the longer reach, for weights that were trained with it.

    Raises:
        PatchError: If it holds neither.
    """
    stored = stored_config(config)
    if stored == StoredConfig():
        raise PatchError("the checkpoint holds no backend of hf_dilated: there is nothing to take out")
    text = text_config(config)
    original = {} if keep_rope else stored.original or {}
    for name in original.keys() & set(ROPE_FIELDS):
        setattr(text, name, copy.deepcopy(original[name]))
    del config.hf_dilated
    config._attn_implementation = None


def edited(text: str, before: Any, after: Any) -> str:
    """Apply the difference of two configurations to the text of a ``config.json``, and leave all else as it is.

    Args:
        text: The ``config.json``.
        before: The configuration that Transformers reads from it.
        after: The configuration that it should read.
    """
    raw = json.loads(text)
    return to_json(_edit(raw, before.to_dict(), after.to_dict(), frozenset(after.sub_configs)), like=text)


def to_json(values: Mapping[str, Any], like: str) -> str:
    """Write JSON in the form of another text: keys in alphabetical order or not, and the end of the last line."""
    is_sorted = json.dumps(old := json.loads(like)) == json.dumps(old, sort_keys=True)
    text = json.dumps(values, indent=2, sort_keys=is_sorted, ensure_ascii="\\u" in like)
    return text + "\n" if like.endswith("\n") else text


def build_empty(config: Any) -> nn.Module:
    """Build the model of a configuration without memory for its weights.

    Raises:
        PatchError: If Transformers has no such model, or cannot build it.
    """
    named = [getattr(transformers, name, None) for name in config.architectures or ()]
    model_class = next((found for found in named if found is not None), None)
    config = copy.deepcopy(config)
    config._attn_implementation = None
    try:
        with torch.device("meta"):
            return AutoModel.from_config(config) if model_class is None else model_class(config)
    except Exception as error:
        raise PatchError(f"{type(config).__name__}: the model cannot be built: {error}") from error


def _with_its_text_config(config: Any) -> tuple[nn.Module, Any]:
    model = build_empty(config)
    return model, text_config(model.config)


def _choose_attention(config: Any, backend: str | None, attention: Attention, length: int | None) -> None:
    """Store backend and pattern; a pattern that is not given suits ``length``."""
    if attention is not None:
        config.hf_dilated = attention
    stored = stored_config(config)
    backend = backend or stored.attn_implementation or "dilated"
    if attention is not None and backend in BACKENDS and getattr(stored, BACKENDS[backend].part) is None:
        raise PatchError(f"attention: holds no pattern of the backend {backend!r}; pass one that does, or leave it out")
    longest = copy.deepcopy(config)
    text = text_config(longest)
    text.max_position_embeddings = length
    longest.hf_dilated = dataclasses.replace(stored, attn_implementation=backend)
    text._attn_implementation = backend
    config.hf_dilated = text.to_dict()[FIELD]
    text_config(config)._attn_implementation = backend


def _checked_report(config: Any) -> ModelReport:
    try:
        result = report(config)
    except (UnsupportedError, ReportError) as error:
        raise PatchError(f"{type(config).__name__}: {error}") from error
    for layer in result.layers:
        if layer.kind == "refused":
            raise PatchError(f"{layer.name}: {layer.why}")
    if not result.runs:
        raise PatchError(f"{result.model}: no layer would run the pattern")
    return result


def _edit(
    raw: dict[str, Any], before: Mapping[str, Any], after: Mapping[str, Any], parts: frozenset[str]
) -> dict[str, Any]:
    for name in [*before, *(name for name in after if name not in before)]:
        if before.get(name) == after.get(name) and (name in before) == (name in after):
            continue
        if name in parts:
            raw[name] = _edit(dict(raw.get(name) or {}), before[name], after[name], frozenset())
        elif name in after:
            raw[name] = after[name]
        else:
            raw.pop(name, None)
        if name == "rope_parameters":
            raw.pop("rope_scaling", None)  # the older name would win
    return raw
