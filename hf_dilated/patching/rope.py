"""Longer contexts through Transformers' own rotary parameters (``rope_parameters``)."""

import copy
from collections.abc import Iterator, Mapping
from typing import Any

from torch import nn
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from hf_dilated.integration.layers import ATTENDING
from hf_dilated.integration.reach import reach_of
from hf_dilated.patching.errors import PatchError

BY_NAME = ("yarn", "linear", "dynamic")
DEFAULT = "yarn"
KNOWN = frozenset({"default", "llama3", *BY_NAME})  # types that a rule enlarges
SCALED_BY_FACTOR = frozenset({"llama3", *BY_NAME})
KNOW_ORIGIN = frozenset({"llama3", "longrope", "yarn"})  # types that hold the trained length themselves
KEPT = ("rope_theta", "partial_rotary_factor", "mrope_section")

RopeScaling = str | Mapping[str, Any] | None


def extend(config: Any, length: int, scaling: RopeScaling = None) -> None:
    """Let a text configuration reach further; nothing changes if it reaches as far already and no scaling is given.

    ``max_position_embeddings`` becomes ``length``, except for the type ``"dynamic"``, whose formula reads the trained
    length there. A ``head_dim`` that is None becomes a number, because the formulas read it.

    Args:
        config: A Transformers text configuration; changed in place.
        length: Longest input, in tokens.
        scaling: ``"yarn"``, ``"linear"`` or ``"dynamic"``, with a factor of ``length`` over the trained length; or
            the rotary parameters of Transformers as a dictionary (a ``factor`` that is missing is filled in). None
            takes YaRN, or for a model that is scaled already enlarges its own scaling.

    Raises:
        PatchError: If the model has no rotary positions, or its kind of them cannot be scaled.

    Example:
        >>> from transformers import LlamaConfig
        >>> config = LlamaConfig(max_position_embeddings=2048)
        >>> extend(config, 8192)
        >>> config.rope_parameters["rope_type"], config.rope_parameters["factor"], config.max_position_embeddings
        ('yarn', 4.0, 8192)
    """
    trained = getattr(config, "max_position_embeddings", None)
    if trained is None:
        raise PatchError(f"max_position_embeddings: {type(config).__name__} has none, so it cannot be changed")
    if length < trained:
        raise PatchError(f"max_position_embeddings: the model already reads {trained:,} tokens, more than {length:,}")
    if length == trained and scaling is None:
        return
    rope = getattr(config, "rope_parameters", None)
    if not rope:
        raise PatchError(
            f"max_position_embeddings: {type(config).__name__} has no rotary positions that could be scaled, so it "
            f"cannot read beyond {trained:,} tokens; leave the option out"
        )
    rope = copy.deepcopy(rope)
    layers = _layers(config, rope)
    for name in layers:
        part = rope[name] if name else rope
        scaled = _scaled(part, scaling, trained, length)
        part.clear()
        part.update(scaled)
    config.rope_parameters = rope
    if not all((rope[name] if name else rope)["rope_type"] == "dynamic" for name in layers):
        config.max_position_embeddings = length
    if getattr(config, "head_dim", 0) is None:  # some of Transformers' formulas know a missing field, but no None
        config.head_dim = config.hidden_size // config.num_attention_heads
    _validate(config)


def reach(config: Any, length: int | None) -> int | None:
    """Longest input in tokens: ``length`` if it was asked for, else what the configuration says."""
    return length if length is not None else reach_of(config)


def rotary_modules(model: nn.Module, config: Any) -> Iterator[tuple[str, nn.Module]]:
    """The modules of a model that turn a text configuration's ``rope_parameters`` into angles."""
    for name, module in model.named_modules():
        if hasattr(module, "rope_type") and getattr(module, "config", None) is config:
            yield name, module


def check_honoured(model: nn.Module, config: Any) -> None:
    """Refuse a model that would ignore the ``rope_parameters`` of its configuration.

    Raises:
        PatchError: If none of its modules reads them.
    """
    if not any(rotary_modules(model, config)):
        raise PatchError(
            f"max_position_embeddings: {type(model).__name__} computes its rotary positions itself and would ignore "
            "rope_parameters; leave the option out"
        )


def _layers(config: Any, rope: dict[str, Any]) -> list[str]:
    """Kinds of layers whose own parameters are to be scaled; one empty name if all layers share them.

    Layers with a window never look further than it, so theirs stay.
    """
    nested = [name for name in getattr(config, "layer_types", None) or () if isinstance(rope.get(name), Mapping)]
    if not nested:
        return [""]
    return [name for name in dict.fromkeys(nested) if name in ATTENDING]


def _scaled(rope: Mapping[str, Any], scaling: RopeScaling, reached: int, length: int) -> dict[str, Any]:
    """The parameters for ``length`` tokens of those that reach ``reached``."""
    kind = rope.get("rope_type", "default")
    trained = rope.get("original_max_position_embeddings") or reached
    if isinstance(scaling, Mapping):
        return _complete(rope, scaling, trained, length)
    if scaling is not None and scaling not in BY_NAME:
        raise PatchError(f"rope_scaling: expected one of {', '.join(map(repr, BY_NAME))} or a dictionary of parameters")
    if kind not in KNOWN:
        raise PatchError(
            f"rope_scaling: the rotary positions are of the type {kind!r}, which no rule enlarges; pass the complete "
            "parameters as a dictionary, as Transformers documents them"
        )
    if kind != "default" and scaling not in (None, kind):
        raise PatchError(
            f"rope_scaling: the model is scaled by {kind!r} already; leave the option out to enlarge that, or pass "
            "complete parameters as a dictionary"
        )
    match kind if kind != "default" else scaling or DEFAULT:
        case "yarn":
            changes = {"rope_type": "yarn", "factor": length / trained, "original_max_position_embeddings": trained}
        case "dynamic":
            changes = {"rope_type": "dynamic", "factor": rope.get("factor", length / reached)}
        case grows:
            changes = {"rope_type": grows, "factor": rope.get("factor", 1.0) * length / reached}
    return {name: value for name, value in rope.items() if name != "type"} | changes


def _complete(rope: Mapping[str, Any], scaling: Mapping[str, Any], trained: int, length: int) -> dict[str, Any]:
    kind = scaling.get("rope_type", scaling.get("type"))
    if kind != "default" and kind not in ROPE_INIT_FUNCTIONS:
        raise PatchError(
            f"rope_scaling: rope_type={kind!r} is unknown to Transformers; it has 'default', "
            f"{', '.join(map(repr, ROPE_INIT_FUNCTIONS))}"
        )
    kept = {name: rope[name] for name in KEPT if name in rope}
    complete = kept | {name: value for name, value in scaling.items() if name != "type"} | {"rope_type": kind}
    if kind in SCALED_BY_FACTOR:
        complete.setdefault("factor", length / trained)
    if kind in KNOW_ORIGIN:
        complete.setdefault("original_max_position_embeddings", trained)
    return complete


def _validate(config: Any) -> None:
    try:
        config.standardize_rope_params()
        config.validate_rope()
    except (KeyError, TypeError, ValueError) as error:
        raise PatchError(f"rope_scaling: {error}") from error
