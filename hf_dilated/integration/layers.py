"""Which pattern a layer of a model runs."""

import ast
import functools
from types import SimpleNamespace
from typing import Any

import torch
from torch import nn

from hf_dilated.config import ConfigError, StoredConfig
from hf_dilated.integration.attributes import attribute, text_part
from hf_dilated.integration.backends import BACKENDS
from hf_dilated.integration.support import UnsupportedError
from hf_dilated.patterns import DensePattern, Pattern

# Names of layers, in a configuration's ``layer_types``, that attend to the whole document.
ATTENDING = frozenset({"full_attention", "attention", "hybrid"})
WINDOWED = frozenset({"sliding_attention", "hybrid_sliding"})


def backend_config(config: Any, backend: str) -> Any:
    """Return the pattern that ``config.hf_dilated`` holds for a backend, or else the one for the model's length.

    Raises:
        ConfigError: If nothing is stored and the configuration does not say how long its inputs may be.
    """
    own = BACKENDS[backend]
    stored = getattr(config, "hf_dilated", None)
    if stored is not None and (pattern := getattr(StoredConfig.from_dict(stored), own.part)) is not None:
        return pattern
    try:
        return own.config_class.from_model_config(config)
    except ConfigError as error:
        raise ConfigError(f"{error}; or set config.hf_dilated = {own.example}") from error


def layer_pattern(config: Any, layer_idx: int | None, sliding_window: int | None, backend: str = "dilated") -> Pattern:
    """Return the pattern of one layer.

    Args:
        config: The configuration that the layer's module holds.
        layer_idx: The module's index, or None if it does not know it.
        sliding_window: The layer's own window; it is kept, and the layer is dense within it.
        backend: A name of :data:`hf_dilated.integration.backends.BACKENDS`.

    Raises:
        UnsupportedError: If the pattern differs between layers and the layer does not know its index, or if
            windows leave no layer that would run the pattern.
        ConfigError: If the model's pattern is malformed.

    Example:
        >>> from hf_dilated import DilatedConfig
        >>> from transformers import Qwen3NextConfig
        >>> config = Qwen3NextConfig(layer_types=["linear_attention", "full_attention"] * 2, num_hidden_layers=4)
        >>> config.hf_dilated = DilatedConfig(segment_lengths=(8, 16), dilation_rates=(1, 2), phase="alternate")
        >>> layer_pattern(config, 3, None).layer
        1
    """
    types = getattr(config, "layer_types", None)
    if sliding_window is not None:
        return _windowed_pattern(config, types, sliding_window)
    _check_window_is_known(config, types, layer_idx)
    own, pattern = BACKENDS[backend], backend_config(config, backend)
    if not pattern.depends_on_layer:
        return own.pattern(pattern, 0)
    if layer_idx is None:
        raise UnsupportedError(
            f"the attention layers of {type(config).__name__} do not know their index, but the pattern differs between "
            f"layers; leave out what does that ({own.layer_options}) and dense_layers"
        )
    if layer_idx in pattern.dense_layers:
        return DensePattern()
    return own.pattern(pattern, ordinal(config, layer_idx, pattern.dense_layers))


def ordinal(config: Any, layer_idx: int, dense_layers: tuple[int, ...] = ()) -> int:
    """Count the layers before ``layer_idx`` that run the pattern.

    Raises:
        UnsupportedError: If the configuration's ``layer_types`` do not say that this layer attends to everything.
    """
    types = getattr(config, "layer_types", None)
    if types is None:
        return layer_idx - sum(layer < layer_idx for layer in dense_layers)
    if layer_idx >= len(types) or types[layer_idx] not in ATTENDING:
        kind = repr(types[layer_idx]) if layer_idx < len(types) else "missing"
        raise UnsupportedError(
            f"layer_types: layer {layer_idx} of {type(config).__name__} is {kind}, so the layers that run the pattern "
            "cannot be counted; use a pattern that is the same in all layers"
        )
    return sum(types[layer] in ATTENDING and layer not in dense_layers for layer in range(layer_idx))


def _windowed_pattern(config: Any, types: list[str] | None, sliding_window: int) -> DensePattern:
    if types is None or not ATTENDING.intersection(types):
        raise UnsupportedError(
            f"sliding_window={sliding_window}: every layer of {type(config).__name__} has a window, so none would run "
            'the pattern; set config.sliding_window=None, or use attn_implementation="sdpa"'
        )
    if sliding_window < 1:
        raise UnsupportedError(f"sliding_window={sliding_window}: expected at least one token")
    return DensePattern(window=sliding_window)


def _check_window_is_known(config: Any, types: list[str] | None, layer_idx: int | None) -> None:
    """A window that the model puts into its masks alone would be lost."""
    if types is None or layer_idx is None or layer_idx >= len(types):
        hidden = types is None and getattr(config, "sliding_window", None)
        hidden = hidden if getattr(config, "use_sliding_window", True) else None
    else:
        hidden = types[layer_idx] in WINDOWED
    if hidden:
        raise UnsupportedError(
            f"{type(config).__name__} has a sliding_window but does not pass it to the attention function; "
            'set config.sliding_window=None, or use attn_implementation="sdpa"'
        )


SIZES = "max_position_embeddings", "num_attention_heads", "num_attention_heads_per_layer", "num_hidden_layers"


def module_pattern(module: nn.Module, sliding_window: int | None, backend: str) -> Pattern:
    """Return the pattern of an attention module, as :func:`layer_pattern` does.

    While ``torch.compile`` traces, only plain values can be handed to what it takes for a constant, so what
    :func:`layer_pattern` reads of the configuration is read here; the compiled graph depends on these values.
    """
    config: Any = module.config
    stored, types = attribute(config, "hf_dilated"), attribute(config, "layer_types")
    sizes: tuple[Any, ...] = (None,) * len(SIZES)
    window, uses_window = None, True
    if not isinstance(stored, dict) or stored.get(BACKENDS[backend].part) is None:
        text = text_part(config)
        found = (attribute(text, name) for name in SIZES)
        sizes = tuple(tuple(x) if isinstance(x, list) else x for x in found)
    if types is None:
        window, uses_window = attribute(config, "sliding_window"), attribute(config, "use_sliding_window", True)
    else:
        types = tuple(types)
    layer_idx = getattr(module, "layer_idx", None)
    return _constant_pattern(
        backend,
        type(config).__name__,
        repr(stored),
        sizes,
        types,
        window,
        uses_window,
        layer_idx,
        sliding_window,
    )


@torch._dynamo.assume_constant_result
def _constant_pattern(*values: Any) -> Pattern:
    return _pattern_from_values(*values)


@functools.cache
def _pattern_from_values(
    backend: str,
    name: str,
    stored: str,
    sizes: tuple[Any, ...],
    types: tuple[str, ...] | None,
    window: int | None,
    uses_window: bool | None,
    layer_idx: int | None,
    sliding_window: int | None,
) -> Pattern:
    try:
        hf_dilated = ast.literal_eval(stored)
    except (ValueError, SyntaxError) as error:
        raise ConfigError(f"hf_dilated: expected plain numbers, strings and lists, got {stored}") from error
    config = type(name, (SimpleNamespace,), {})(  # the name appears in errors
        hf_dilated=hf_dilated,
        layer_types=types,
        sliding_window=window,
        use_sliding_window=uses_window,
        **dict(zip(SIZES, sizes, strict=True)),
    )
    return layer_pattern(config, layer_idx, sliding_window, backend)
