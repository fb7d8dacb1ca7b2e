"""How well a causal language model reads a long document: loss token by token, time and memory."""

import ctypes
import math
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

ROWS_AT_ONCE = 1024  # logits of this many tokens are held in float32


@dataclass(frozen=True, kw_only=True)
class Reading:
    """One pass of a model over one document.

    Attributes:
        losses: (N,) float32 on the CPU: nats of each token given those before it; NaN for the first.
        seconds: Wall time of the pass.
        peak_bytes: Most memory in use during the pass beyond what was in use before it; None where the
            system does not tell.
    """

    losses: Tensor
    seconds: float
    peak_bytes: int | None


@dataclass(frozen=True, kw_only=True)
class Bucket:
    """Perplexity of the tokens at positions ``start`` to ``stop - 1``."""

    start: int
    stop: int
    tokens: int
    perplexity: float


@torch.no_grad()
def read(model: Any, input_ids: Tensor) -> Reading:
    """Read a document in one pass.

    Args:
        model: A causal language model of Transformers.
        input_ids: (N,) tokens on the model's device.

    Raises:
        ValueError: If there are fewer than two tokens, or more than one document.
    """
    _check_document(input_ids)
    model.eval()
    memory = PeakMemory(input_ids.device)
    with memory.measured():
        started = time.perf_counter()
        logits = model(input_ids=input_ids[None], use_cache=False).logits[0]
        wait(input_ids.device)
        seconds = time.perf_counter() - started
    return Reading(losses=_losses(logits, input_ids), seconds=seconds, peak_bytes=memory.peak_bytes)


@torch.no_grad()
def read_in_windows(model: Any, input_ids: Tensor, window: int) -> Reading:
    """Read a document through windows that overlap by half, as a model that cannot go beyond ``window`` must.

    Every token is predicted from at least ``window / 2`` tokens before it, or from all that there are.

    Raises:
        ValueError: If ``window`` is shorter than two tokens, or ``input_ids`` as for :func:`read`.
    """
    _check_document(input_ids)
    if window < 2:
        raise ValueError(f"window: expected at least 2 tokens, got {window}")
    model.eval()
    losses = torch.full((len(input_ids),), math.nan, device="cpu")
    memory = PeakMemory(input_ids.device)
    with memory.measured():
        started = time.perf_counter()
        done = 1
        for start in range(0, len(input_ids), window // 2):
            tokens = input_ids[start : start + window]
            logits = model(input_ids=tokens[None], use_cache=False).logits[0]
            losses[done : start + len(tokens)] = _losses(logits, tokens)[done - start :]
            done = start + len(tokens)
            if done == len(input_ids):
                break
        seconds = time.perf_counter() - started
    return Reading(losses=losses, seconds=seconds, peak_bytes=memory.peak_bytes)


def perplexity_by_position(losses: Sequence[Tensor], edges: Sequence[int]) -> list[Bucket]:
    """Average over documents, for the positions between each two edges.

    Args:
        losses: (N,) for each document, as in :class:`Reading`; their lengths may differ.
        edges: Ascending positions; n edges make n - 1 buckets. Buckets without a token are left out.

    Example:
        >>> losses = torch.tensor([math.nan, 0.0, 0.0, math.log(2)])
        >>> [(b.start, b.stop, b.tokens, b.perplexity) for b in perplexity_by_position([losses[:3], losses], [0, 3])]
        [(0, 3, 4, 1.0)]
    """
    buckets = []
    for start, stop in zip(edges, edges[1:], strict=False):
        inside = torch.cat([document[start:stop] for document in losses])
        inside = inside[~inside.isnan()]
        if len(inside):
            mean = inside.double().mean().exp().item()
            buckets.append(Bucket(start=start, stop=stop, tokens=len(inside), perplexity=mean))
    return buckets


class PeakMemory:
    """The most memory in use during a block of code, beyond what was in use before it.

    On CUDA this is what PyTorch has allocated. On a CPU it is the resident memory of the process, which Linux
    alone can measure from a chosen moment on.

    Example:
        >>> memory = PeakMemory(torch.device("cpu"))
        >>> with memory.measured():
        ...     _ = torch.ones(64 << 20)
        >>> memory.peak_bytes is None or memory.peak_bytes > 200e6
        True
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.peak_bytes: int | None = None

    @contextmanager
    def measured(self) -> Iterator[None]:
        """Measure the block."""
        if self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self.device)
            before = torch.cuda.memory_allocated(self.device)
            yield
            self.peak_bytes = torch.cuda.max_memory_allocated(self.device) - before
        elif self.device.type == "cpu" and _reset_peak():
            resident = _status("VmRSS")
            yield
            self.peak_bytes = max(0, _status("VmHWM") - resident)
        else:
            yield


def _reset_peak() -> bool:
    try:
        ctypes.CDLL(None).malloc_trim(0)  # freed memory that the process still holds would hide new use
        Path("/proc/self/clear_refs").write_text("5")
    except (OSError, AttributeError, TypeError):
        return False
    return True


def _status(field: str) -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(field):
            return int(line.split()[1]) * 1024
    raise OSError(f"/proc/self/status has no {field}")


def _losses(logits: Tensor, input_ids: Tensor) -> Tensor:
    parts = zip(logits[:-1].split(ROWS_AT_ONCE), input_ids[1:].split(ROWS_AT_ONCE), strict=True)
    losses = [cross_entropy(rows.float(), targets.to(rows.device), reduction="none") for rows, targets in parts]
    return torch.cat([torch.full((1,), math.nan, device="cpu"), torch.cat(losses).cpu()])


def _check_document(input_ids: Tensor) -> None:
    if input_ids.ndim != 1 or len(input_ids) < 2:
        raise ValueError(f"input_ids: expected the (N,) tokens of one document, got {tuple(input_ids.shape)}")


def wait(device: torch.device) -> None:
    """Wait until the device has done what was asked of it."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
