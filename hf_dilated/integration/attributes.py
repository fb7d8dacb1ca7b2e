"""What attention modules ask of a configuration in every layer and step."""

from typing import Any

import torch

NO_OTHER_NAMES: dict[str, str] = {}


def attribute(config: Any, name: str, default: Any = None) -> Any:
    """Return ``getattr(config, name, default)``, at a tenth of its price.

    A configuration of Transformers translates every name in Python; what it holds itself is read here past that.

    Example:
        >>> from transformers import GPT2Config
        >>> attribute(GPT2Config(n_positions=128), "max_position_embeddings")
        128
    """
    if torch.compiler.is_compiling():
        return getattr(config, name, default)
    held, kind = object.__getattribute__(config, "__dict__"), type(config)
    own = getattr(kind, "attribute_map", NO_OTHER_NAMES).get(name, name)
    if own in held:
        return held[own]
    return getattr(config, name, default) if hasattr(kind, own) else default


def text_part(config: Any) -> Any:
    """Return the configuration of the language model within one; mostly itself."""
    return config.get_text_config() if type(config).sub_configs else config
