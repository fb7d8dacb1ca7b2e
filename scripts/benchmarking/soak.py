"""A long run of the pool under everything that happens to it: lengths, threads, checkpoints, exceptions.

With ``mode="disabled"`` it is the control: the same steps on torch's own allocations. What the process holds beside the
pool is told by malloc.
"""

import ctypes
import gc
import random
import threading
import time
from collections.abc import Sequence
from typing import Any

import torch
from torch.utils.checkpoint import checkpoint

from hf_dilated import DilatedConfig, dilated_attention
from hf_dilated.config.memory import MemoryMode
from hf_dilated.engine.plan import make_plan
from hf_dilated.memory import auto_configure_memory_pool
from hf_dilated.memory.buffers import manager_of
from hf_dilated.memory.system import system

PATTERN = DilatedConfig(segment_lengths=(128, 256, 512, 1024), dilation_rates=(1, 2, 4, 8))
MIB = 1 << 20


DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
FIGURES = ("arena", "ordblks", "smblks", "hblks", "hblkhd", "usmblks", "fsmblks", "uordblks", "fordblks", "keepcost")


class _Figures(ctypes.Structure):
    """What glibc's ``mallinfo2`` returns."""

    _fields_ = [(name, ctypes.c_size_t) for name in FIGURES]


def malloc_figures() -> str:
    """Say what malloc has handed out of its heaps, keeps free there, and has mapped; empty where it does not tell."""
    mallinfo = getattr(ctypes.CDLL(None), "mallinfo2", None)
    if mallinfo is None:
        return ""
    mallinfo.restype = _Figures
    found = mallinfo()
    used, free, mapped = (size / MIB for size in (found.uordblks, found.fordblks, found.hblkhd))
    return f"; malloc: {used:,.0f} MiB in use, {free:,.0f} free, {mapped:,.0f} mapped"


class Interrupted(RuntimeError):
    """Raised in the middle of a step."""


def soak(
    seconds: float,
    threads: int,
    longest: int,
    report: Any,
    mode: MemoryMode = "full",
    dtypes: Sequence[str] = (*DTYPES,),
) -> bool:
    """Train attention on random lengths until the time is over.

    Args:
        seconds: How long.
        threads: Threads that train at the same time.
        longest: Longest length.
        report: Takes lines of text.
        mode: Of the pool.
        dtypes: Names of those that are drawn from.

    Returns:
        Whether everything came back, nothing grew and all results were right.
    """
    spec = auto_configure_memory_pool(longest, mode=mode).spec
    pool = manager_of(spec).pool()
    deadline, begin = time.monotonic() + seconds, time.monotonic()
    state = {"steps": 0, "wrong": 0, "interrupted": 0}
    workers = [
        threading.Thread(target=_work, args=(n, spec, longest, dtypes, deadline, state), daemon=True)
        for n in range(threads)
    ]
    for worker in workers:
        worker.start()
    samples: list[tuple[int, int]] = []
    while time.monotonic() < deadline:
        time.sleep(min(seconds / 20, max(0.0, deadline - time.monotonic())))
        stats = pool.stats()
        held = stats["bytes_live"] + stats["bytes_cached"]
        samples.append((held, system().resident()))
        report(
            f"{time.monotonic() - begin:6.0f} s  {state['steps']:,} steps, held {held / MIB:,.0f} MiB, resident "
            f"{samples[-1][1] / MIB:,.0f} MiB, hit rate {stats['hit_rate']:.3f}, fragmentation "
            f"{stats['fragmentation']:.1%}, {stats['evictions']:,} evictions{malloc_figures()}"
        )
    for worker in workers:
        worker.join(120)
    hung = any(worker.is_alive() for worker in workers)
    gc.collect()
    live = pool.stats()["bytes_live"]
    make_plan.cache_clear()
    report(f"resident {system().resident() / MIB:,.0f} MiB without plans{malloc_figures()}")
    half = len(samples) // 2
    grown = max(held for held, _ in samples[half:]) / max(1, max(held for held, _ in samples[:half]))
    report(
        f"{state['steps']:,} steps, {state['interrupted']:,} interrupted, {state['wrong']} wrong, hung: {hung}, "
        f"live at the end {live} bytes, second half held {grown:.2f} times the first"
    )
    return not hung and live == 0 and state["wrong"] == 0 and grown < 1.1


def _work(number: int, spec: str, longest: int, dtypes: Sequence[str], deadline: float, state: dict[str, int]) -> None:
    draw = random.Random(number)
    while time.monotonic() < deadline:
        length = draw.randrange(longest // 8, longest)
        try:
            same = _step(draw, spec, length, DTYPES[draw.choice(dtypes)], fails=draw.random() < 0.05)
        except Interrupted:
            state["interrupted"] += 1
        else:
            state["wrong"] += not same
        state["steps"] += 1


def _step(draw: random.Random, spec: str, length: int, dtype: torch.dtype, *, fails: bool) -> bool:
    """Two layers, one of them checkpointed; every tenth step is compared with torch's own allocations."""
    generator = torch.Generator().manual_seed(draw.randrange(1 << 30))
    q, k, v = (torch.randn(1, 4, length, 64, generator=generator).to(dtype) for _ in range(3))

    def train(memory: str) -> torch.Tensor:
        x = q.clone().requires_grad_()

        def layer(x: torch.Tensor) -> Any:
            return dilated_attention(x, k, v, PATTERN, memory=memory)

        y = layer(checkpoint(layer, x, use_reentrant=False))
        if fails:
            raise Interrupted
        y.sum().backward()
        assert x.grad is not None
        return x.grad

    found = train(spec)
    return draw.random() > 0.1 or torch.equal(found, train(""))
