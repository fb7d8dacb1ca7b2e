"""Patching a model in memory."""

import copy
from typing import Any

from torch import nn

from hf_dilated.integration.persistence import stored_config
from hf_dilated.patching.configuration import (
    ROPE_FIELDS,
    Attention,
    patch_config,
    text_config,
    unpatch_config,
)
from hf_dilated.patching.rope import RopeScaling, rotary_modules


def patch_model(
    model: Any,
    *,
    backend: str | None = None,
    attention: Attention = None,
    max_position_embeddings: int | None = None,
    rope_scaling: RopeScaling = None,
) -> Any:
    """Let a model in memory run a backend; its weights stay as they are.

    Args:
        model: A Transformers model; changed in place, or not at all if an error is raised.
        backend: Name of the backend; by default the pattern's own, or ``"dilated"``.
        attention: The backend's pattern; by default the one that suits the length.
        max_position_embeddings: Longest input, in tokens, if it is to grow.
        rope_scaling: As in :func:`hf_dilated.patch_checkpoint`.

    Returns:
        The same model. ``save_pretrained`` keeps backend and pattern.

    Raises:
        PatchError: If the model is patched already, would be refused, or cannot be extended.
        ConfigError: If the pattern is malformed.

    Example:
        >>> from transformers import LlamaConfig, LlamaForCausalLM
        >>> sizes = dict(hidden_size=32, intermediate_size=32, num_attention_heads=4, num_hidden_layers=1)
        >>> model = LlamaForCausalLM(LlamaConfig(vocab_size=64, max_position_embeddings=2048, **sizes))
        >>> patch_model(model, max_position_embeddings=4096).config.hf_dilated["dilated"]["segment_lengths"]
        [2048, 4096]
        >>> unpatch_model(model).config.max_position_embeddings
        2048
    """
    config = copy.deepcopy(model.config)
    text_config(config)._attn_implementation = None
    patch_config(
        config,
        backend=backend,
        attention=attention,
        max_position_embeddings=max_position_embeddings,
        rope_scaling=rope_scaling,
    )
    _adopt(model, config, stored_config(config).attn_implementation)
    return model


def unpatch_model(model: Any, *, keep_rope: bool = False) -> Any:
    """Make a patched model dense again.

    Args:
        model: A patched Transformers model; changed in place.
        keep_rope: Leave the longer reach, for weights that were trained with it.

    Returns:
        The same model.

    Raises:
        PatchError: If it was not patched.
    """
    config = copy.deepcopy(model.config)
    unpatch_config(config, keep_rope=keep_rope)
    _adopt(model, config, "sdpa")
    return model


def _adopt(model: Any, config: Any, backend: str | None) -> None:
    """Take backend, pattern and rotary parameters over from another configuration."""
    own, new = text_config(model.config), text_config(config)
    model.set_attn_implementation(backend if own is model.config else {"text_config": backend})
    own.hf_dilated = new.hf_dilated
    changed = [name for name in ROPE_FIELDS if getattr(own, name, None) != getattr(new, name, None)]
    for name in changed:
        setattr(own, name, copy.deepcopy(getattr(new, name)))
    if changed:
        for name, module in list(rotary_modules(model, own)):
            _replace(model, name, type(module)(own))


def _replace(model: nn.Module, name: str, module: nn.Module) -> None:
    parent, _, child = name.rpartition(".")
    old = model.get_submodule(name)
    device = next((buffer.device for buffer in old.buffers()), None)
    setattr(model.get_submodule(parent), child, module.to(device).train(old.training))
