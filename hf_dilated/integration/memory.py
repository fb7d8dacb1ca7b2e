"""Which memory a model's layers use."""

import ast
import functools
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from hf_dilated.config import MemoryConfig, StoredConfig
from hf_dilated.integration.attributes import attribute, text_part
from hf_dilated.integration.backends import BACKENDS
from hf_dilated.memory import AttentionBufferManager, MemoryPolicy
from hf_dilated.memory.buffers import manager_of
from hf_dilated.memory.policy import resolve
from hf_dilated.memory.profile import measured_plan, measured_thresholds, model_key


@dataclass(frozen=True, kw_only=True)
class LayerMemory:
    """The memory of one attention module.

    Attributes:
        name: The module's name.
        policy: What was decided, with the reason.
        manager: The object that allocates for it.
    """

    name: str
    policy: MemoryPolicy
    manager: AttentionBufferManager


def model_memory(model: nn.Module) -> list[LayerMemory]:
    """Return which memory each attention module of a model uses, and why.

    Args:
        model: A Transformers model that runs one of this package's backends, or a module of
            :mod:`hf_dilated.factory`.

    Returns:
        One entry for each attention module; none for modules that run other attention.

    Example:
        >>> from transformers import LlamaConfig, LlamaModel
        >>> config = LlamaConfig(hidden_size=32, intermediate_size=32, num_attention_heads=4, num_hidden_layers=2,
        ...                      vocab_size=8, max_position_embeddings=8192, attn_implementation="dilated")
        >>> [(layer.name, layer.policy.mode) for layer in model_memory(LlamaModel(config))]
        [('layers.0.self_attn', 'full'), ('layers.1.self_attn', 'full')]
    """
    found = []
    for name, module in model.named_modules():
        policy = getattr(module, "memory", None)
        if not isinstance(policy, MemoryPolicy):
            policy = module_policy(module) if _attends(module) else None
        if policy is not None:
            found.append(LayerMemory(name=name, policy=policy, manager=manager_of(policy.spec)))
    return found


def module_policy(module: nn.Module) -> MemoryPolicy:
    """Return the policy of an attention module, with its reason."""
    return _policy(*_values(module.config))


def module_memory(module: nn.Module) -> str:
    """Return the same as text; a constant while ``torch.compile`` traces."""
    return _constant_spec(*_values(module.config))


def cache_memory(config: Any, backend: str) -> str:
    """Return the same for the cache of a model that runs a backend."""
    return _policy(*_values(config, backend)).spec


@torch._dynamo.assume_constant_result
def _constant_spec(*values: Any) -> str:
    return _policy(*values).spec


def _values(config: Any, backend: str | None = None) -> tuple[str, str, int | None, str]:
    """What the policy depends on, as plain values: backend, what is stored, length, and which model it is."""
    stored, positions = attribute(config, "hf_dilated"), attribute(text_part(config), "max_position_embeddings")
    return backend or config._attn_implementation, repr(stored), positions, model_key(config, attribute)


@functools.cache
def _policy(backend: str, stored: str, positions: int | None, key: str) -> MemoryPolicy:
    values = ast.literal_eval(stored)
    given = StoredConfig() if values is None else StoredConfig.from_dict(values)
    segments = given.dilated.segment_lengths if given.dilated is not None else ()
    longest = max((positions or 0, *segments))
    return resolve(given.memory or MemoryConfig(), longest, backend, measured_thresholds(), measured_plan(key))


def _attends(module: nn.Module) -> bool:
    """Whether a module calls the attention function of one of our backends: what such modules have to have."""
    if isinstance(module, PreTrainedModel) or not hasattr(module, "is_causal"):
        return False
    return getattr(getattr(module, "config", None), "_attn_implementation", None) in BACKENDS
