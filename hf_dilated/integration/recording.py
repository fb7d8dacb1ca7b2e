"""A run of a model, with every buffer that its attention takes."""

import dataclasses
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from transformers import AutoModelForCausalLM, PreTrainedModel

from hf_dilated.config import MemoryConfig
from hf_dilated.integration.memory import model_memory
from hf_dilated.integration.persistence import stored_config
from hf_dilated.integration.reach import reach_of
from hf_dilated.integration.support import UnsupportedError
from hf_dilated.memory.recording import Recording

LONGEST = 8192  # tokens, unless more are asked for


def load(path: str, *, trust_remote_code: bool = False) -> PreTrainedModel:
    """Load a causal model with the backend that it stores, else ``"dilated"``."""
    model = AutoModelForCausalLM.from_pretrained(path, trust_remote_code=trust_remote_code)
    if stored_config(model.config).attn_implementation is None:
        model.set_attn_implementation("dilated")
    return model


def record(
    model: PreTrainedModel, length: int | None = None, *, train: bool = True
) -> tuple[Recording, dict[str, Any]]:
    """Run random tokens through a model and record the buffers of its attention, small ones too.

    Args:
        model: It runs one of our backends, on the CPU.
        length: Tokens; by default as many as the model was made for, at most 8192.
        train: Whether gradients are computed.

    Returns:
        The recording of the second of two runs, and the statistics of the pool after it.

    Raises:
        UnsupportedError: If no layer of the model runs one of our backends.
    """
    text_config = model.config.get_text_config()
    length = length or min(LONGEST, reach_of(model.config) or LONGEST)
    ids = torch.randint(0, text_config.vocab_size, (1, length), generator=torch.Generator().manual_seed(0))
    with _everything_pooled(model):
        layers = model_memory(model)
        if not layers:
            raise UnsupportedError(f"{type(model).__name__} runs attention of its own: nothing to record")
        manager = layers[0].manager
        _run(model, ids, train=train)
        manager.pool().clear_counts()
        with manager.record() as recording:
            _run(model, ids, train=train)
        return recording, manager.stats()["cpu"]


def _run(model: nn.Module, ids: torch.Tensor, *, train: bool) -> None:
    with torch.set_grad_enabled(train):
        output = model(ids, labels=ids if train else None, use_cache=False)
        if train:
            output.loss.backward()
    model.zero_grad(set_to_none=True)


@contextmanager
def _everything_pooled(model: PreTrainedModel) -> Any:
    """Pool small buffers too, and where the policy would not pool at all, as ``"full"`` does."""
    before = model.config.hf_dilated
    policy = next((layer.policy for layer in model_memory(model)), None)
    given = stored_config(model.config).memory or MemoryConfig()
    mode = "full" if policy is None or policy.mode == "disabled" else given.mode
    model.config.hf_dilated = dataclasses.replace(given, smallest=1, mode=mode)
    try:
        yield
    finally:
        model.config.hf_dilated = before
