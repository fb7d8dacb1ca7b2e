"""A long run of the pool under everything that happens to it: lengths, threads, checkpoints, exceptions."""

import gc
import random
import threading
import time
from typing import Any

import torch
from torch.utils.checkpoint import checkpoint

from hf_dilated import DilatedConfig, dilated_attention
from hf_dilated.memory import auto_configure_memory_pool
from hf_dilated.memory.buffers import manager_of
from hf_dilated.memory.system import system

PATTERN = DilatedConfig(segment_lengths=(128, 256, 512, 1024), dilation_rates=(1, 2, 4, 8))
MIB = 1 << 20


class Interrupted(RuntimeError):
    """Raised in the middle of a step."""


def soak(seconds: float, threads: int, longest: int, report: Any) -> bool:
    """Train attention on random lengths until the time is over.

    Returns:
        Whether everything came back, nothing grew and all results were right.
    """
    spec = auto_configure_memory_pool(longest, mode="full").spec
    pool = manager_of(spec).pool()
    deadline, begin = time.monotonic() + seconds, time.monotonic()
    state = {"steps": 0, "wrong": 0, "interrupted": 0}
    workers = [
        threading.Thread(target=_work, args=(n, spec, longest, deadline, state), daemon=True) for n in range(threads)
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
            f"{stats['fragmentation']:.1%}, {stats['evictions']:,} evictions"
        )
    for worker in workers:
        worker.join(120)
    hung = any(worker.is_alive() for worker in workers)
    gc.collect()
    live = pool.stats()["bytes_live"]
    half = len(samples) // 2
    grown = max(held for held, _ in samples[half:]) / max(1, max(held for held, _ in samples[:half]))
    report(
        f"{state['steps']:,} steps, {state['interrupted']:,} interrupted, {state['wrong']} wrong, hung: {hung}, "
        f"live at the end {live} bytes, second half held {grown:.2f} times the first"
    )
    return not hung and live == 0 and state["wrong"] == 0 and grown < 1.1


def _work(number: int, spec: str, longest: int, deadline: float, state: dict[str, int]) -> None:
    draw = random.Random(number)
    while time.monotonic() < deadline:
        length = draw.randrange(longest // 8, longest)
        try:
            same = _step(draw, spec, length, fails=draw.random() < 0.05)
        except Interrupted:
            state["interrupted"] += 1
        else:
            state["wrong"] += not same
        state["steps"] += 1


def _step(draw: random.Random, spec: str, length: int, *, fails: bool) -> bool:
    """Two layers, one of them checkpointed; every tenth step is compared with torch's own allocations."""
    generator = torch.Generator().manual_seed(draw.randrange(1 << 30))
    dtype = draw.choice([torch.float32, torch.bfloat16])
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
