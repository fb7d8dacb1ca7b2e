"""How it is measured: interleaved in random order, medians with intervals, peak memory."""

import gc
import math
import multiprocessing
import random
import re
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

Call = Callable[[], Any]

SHORTEST_SAMPLE = {"cpu": 5e-3, "cuda": 2e-2}  # seconds; shorter calls are repeated within a sample
SETTLING = {"cpu": 0.0, "cuda": 3e-2}  # seconds of untimed calls before a sample: a GPU's clock follows its load


def parse_lengths(text: str) -> list[int]:
    """Read lengths such as ``"2k,1M"``.

    Raises:
        ValueError: If one is not a number of tokens.

    Example:
        >>> parse_lengths("500,2k,1M")
        [500, 2048, 1048576]
    """
    units = {"": 1, "k": 1 << 10, "m": 1 << 20}
    parts = [re.fullmatch(r"\s*(\d+)([kKmM]?)\s*", part) for part in text.split(",")]
    if not all(parts):
        raise ValueError(f"lengths: expected tokens such as 500,2k,1M, got {text!r}")
    return sorted({int(part[1]) * units[part[2].lower()] for part in parts if part})


def on_device(device: torch.device) -> AbstractContextManager[Any]:
    """Let a GPU be the current one, whose clock, peak and stream are meant where none is named."""
    return torch.cuda.device(device) if device.type == "cuda" else nullcontext()


def time_call(call: Call, repeats: int, device: str) -> float:
    """Return the seconds of one call, averaged over ``repeats`` calls in a row."""
    if device == "cuda":
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        for _ in range(repeats):
            call()
        end.record()
        end.synchronize()
        return start.elapsed_time(end) / 1e3 / repeats
    begin = time.perf_counter()
    for _ in range(repeats):
        call()
    return (time.perf_counter() - begin) / repeats


def repeats_for(seconds: float, device: str) -> int:
    """Return how many calls make a sample long enough to be timed."""
    return max(1, int(SHORTEST_SAMPLE[device] / max(seconds, 1e-7)))


def interleave(
    calls: Mapping[str, Call], repeats: Mapping[str, int], device: str, *, rounds: int, seed: int = 0
) -> dict[str, list[float]]:
    """Time every call once a round, each round in another random order.

    A dense call drives a GPU to its power limit, and what runs right behind it runs at a lowered clock. So every
    sample, also a dense one, follows untimed calls of its own.

    Returns:
        Seconds of each call, one entry a round.
    """
    shuffle = random.Random(seed)
    seconds: dict[str, list[float]] = {name: [] for name in calls}
    for _ in range(rounds):
        for name in shuffle.sample(list(calls), len(calls)):
            settle(calls[name], repeats[name], device)
            seconds[name].append(time_call(calls[name], repeats[name], device))
    return seconds


def sample_seconds(seconds: float, device: str) -> float:
    """Return what a sample of a call costs, with its settling."""
    return max(seconds, SHORTEST_SAMPLE[device]) + (max(seconds, SETTLING[device]) if SETTLING[device] else 0.0)


def settle(call: Call, repeats: int, device: str) -> None:
    """Let the device reach the state in which it runs this call again and again."""
    if not SETTLING[device]:
        return
    for _ in range(math.ceil(repeats * SETTLING[device] / SHORTEST_SAMPLE[device])):
        call()
    torch.cuda.synchronize()


def peak_memory_cuda(call: Callable[[], Tensor]) -> int:
    """Return the bytes that one call needs at its peak, beyond its inputs and its output."""
    release()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    output = call()
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() - before - output.untyped_storage().nbytes()


def peak_memory_cpu(prepare: Callable[..., Callable[[], Tensor]], *arguments: Any) -> int | None:
    """Return the same for the CPU, measured in a fresh process; None where the system does not tell.

    Args:
        prepare: A module-level function that makes the inputs, warms up and returns the call.
        arguments: Its arguments.
    """
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        return pool.apply(_grown, (prepare, *arguments))


def _grown(prepare: Callable[..., Callable[[], Tensor]], *arguments: Any) -> int | None:
    call = prepare(*arguments)
    try:
        Path("/proc/self/clear_refs").write_text("5")  # Linux: the high-water mark starts anew
        before = _high_water()
        output = call()
        return max(0, _high_water() - before - output.untyped_storage().nbytes())
    except OSError:
        return None


def _high_water() -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM"))


@contextmanager
def little_garbage() -> Iterator[None]:
    """Leave what exists out of all collections until the end, so that those between samples are short."""
    gc.collect()
    gc.freeze()
    try:
        yield
    finally:
        gc.unfreeze()


def release() -> None:
    """Give back what nobody uses any more."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
        torch.cuda.empty_cache()
