"""Time and memory of reading a text and of writing on."""

import time
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from hf_dilated.evaluation.perplexity import PeakMemory, wait


@dataclass(frozen=True, kw_only=True)
class Cost:
    """One reading with a cache, and a few tokens written behind it.

    Attributes:
        tokens: Tokens read.
        read_seconds: Wall time until the first new token is known.
        seconds_per_token: Wall time of each token after it.
        peak_bytes: Most memory in use beyond what was in use before; None where the system does not tell.
    """

    tokens: int
    read_seconds: float
    seconds_per_token: float
    peak_bytes: int | None


@torch.no_grad()
def measure_cost(model: Any, input_ids: Tensor, *, new_tokens: int = 16) -> Cost:
    """Read ``input_ids`` (N,) once to warm up and once by the clock, then write ``new_tokens`` greedily."""
    model.eval()
    _read(model, input_ids)
    memory = PeakMemory(input_ids.device)
    with memory.measured():
        started = time.perf_counter()
        output = _read(model, input_ids)
        wait(input_ids.device)
        read = time.perf_counter()
        for _ in range(new_tokens):
            token = output.logits[:, -1:].argmax(-1)
            output = model(input_ids=token, past_key_values=output.past_key_values, use_cache=True)
        wait(input_ids.device)
        written = time.perf_counter()
    return Cost(
        tokens=len(input_ids),
        read_seconds=read - started,
        seconds_per_token=(written - read) / new_tokens,
        peak_bytes=memory.peak_bytes,
    )


def _read(model: Any, input_ids: Tensor) -> Any:
    return model(input_ids=input_ids[None], use_cache=True, logits_to_keep=1)
