"""How far a model reads, and how far it was made to read."""

from collections.abc import Mapping
from typing import Any

from hf_dilated.integration.persistence import stored_config


def reach_of(config: Any) -> int | None:
    """Return the longest input of a model in tokens, as far as its configuration tells.

    It is ``max_position_embeddings``, except for rotary positions of the type ``"dynamic"``: their formula reads the
    trained length there, so their factor and the longest segment of a stored pattern tell more.

    Example:
        >>> from transformers import LlamaConfig
        >>> rope = {"rope_type": "dynamic", "rope_theta": 10000.0, "factor": 4.0}
        >>> reach_of(LlamaConfig(max_position_embeddings=2048, rope_parameters=rope))
        8192
    """
    text = config.get_text_config()
    positions = getattr(text, "max_position_embeddings", None)
    factors = [part.get("factor") or 1.0 for part in _rope_parts(text) if part.get("rope_type") == "dynamic"]
    if positions is None or not factors:
        return positions
    dilated = stored_config(config).dilated
    return max(positions, round(max(factors) * positions), *(dilated.segment_lengths if dilated else ()))


def trained_length(config: Any) -> int | None:
    """Return the length that the dense model was made for, in tokens, as far as the configuration tells.

    Example:
        >>> from hf_dilated import patch_model
        >>> from transformers import LlamaConfig, LlamaForCausalLM
        >>> sizes = {"hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 4}
        >>> model = LlamaForCausalLM(LlamaConfig(vocab_size=64, max_position_embeddings=2048, **sizes))
        >>> config = patch_model(model, max_position_embeddings=8192, rope_scaling="linear").config
        >>> reach_of(config), trained_length(config)
        (8192, 2048)
    """
    before = (stored_config(config).original or {}).get("max_position_embeddings")
    if before is not None:
        return before
    text = config.get_text_config()
    known = (part.get("original_max_position_embeddings") for part in _rope_parts(text))
    return next(filter(None, known), None) or getattr(text, "max_position_embeddings", None)


def _rope_parts(text: Any) -> list[Mapping[str, Any]]:
    """The rotary parameters of every kind of layer, or those that all layers share."""
    rope = getattr(text, "rope_parameters", None) or {}
    return [part for part in rope.values() if isinstance(part, Mapping)] or [rope]
