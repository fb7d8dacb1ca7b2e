"""What memory pools and the levers of the process bring: every variant in a fresh process, samples interleaved."""

import json
import multiprocessing
import os
import random
import re
import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from benchmarking.cases import DTYPES, branches_for, describe_machine
from hf_dilated import DilatedConfig, dilated_attention, ring_attention
from hf_dilated.config.memory import MemoryMode
from hf_dilated.distributed import SequenceLayout
from hf_dilated.functional import attend
from hf_dilated.memory import auto_configure_memory_pool, buffers
from hf_dilated.memory.levers import TORCH_HUGE_PAGES, pull_levers
from hf_dilated.memory.measure import CONTROL, ratio
from hf_dilated.memory.policy import Thresholds
from hf_dilated.patterns import DensePattern, DilatedPattern

Call = Callable[[], Any]

# What the report behind this part claims, as speed-ups.
REPORT = {
    ("dilated", 4096): "1.03-1.28",
    ("dilated", 8192): "1.72",
    ("dilated", 16384): "1.72",
    ("ring", 1024): "1.58",
    ("standard", 8192): "1.28",
    ("varying", 8192): "3.47",
}
TURNS = 4  # lengths of one sample of the varying case


@dataclass(frozen=True)
class Variant:
    """Where memory comes from in a process."""

    name: str
    mode: MemoryMode = "disabled"
    levers: bool = False


CPU_VARIANTS = (
    Variant("torch"),
    Variant(CONTROL),
    Variant("lightweight", "lightweight"),
    Variant("full", "full"),
    Variant("levers", levers=True),
    Variant("levers + full", "full", levers=True),
)
CUDA_VARIANTS = (Variant("torch"), Variant(CONTROL), Variant("full", "full"))


@dataclass(frozen=True)
class Job:
    """What a process does again and again.

    Attributes:
        case: ``"dilated"``, ``"standard"`` (dense, left-padded), ``"ring"`` (one rank), ``"varying"`` (dilated, lengths
            drawn between an eighth of ``length`` and ``length``) or ``"write"`` (take a buffer and write it once).
        length: Tokens, or MiB to write.
        backward: A training step of attention instead of its forward pass.
    """

    case: str
    length: int
    backward: bool
    device: str
    dtype: str
    heads: int
    head_dim: int

    @property
    def mode(self) -> str:
        """How rows call it."""
        return "write" if self.case == "write" else "step" if self.backward else "forward"


def jobs(device: str, lengths: list[int], sizes: list[int], heads: int, head_dim: int, dtype: str) -> list[Job]:
    """List what is measured; the report's rows are among it."""
    shared: dict[str, Any] = {"device": device, "dtype": dtype, "heads": heads, "head_dim": head_dim}
    cases = [("dilated", length) for length in lengths]
    found = [Job(case, n, backward, **shared) for case, n in cases for backward in (False, True)]
    found += [Job(case, n, True, **shared) for case, n in (("ring", 1024), ("standard", 8192), ("varying", 8192))]
    return [*found, *(Job("write", size, False, **shared) for size in sizes)]


def prepare(job: Job, variant: Variant) -> Call:
    """Return the call that is timed."""
    kind = "ring" if job.case == "ring" else "dilated"
    policy = auto_configure_memory_pool(job.length, kind, mode=variant.mode, thresholds=Thresholds(), cuda=True)
    if job.case == "write":
        return _write(job, policy.spec)
    steps = [_step(job, length, policy.spec) for length in _lengths(job)]

    def call() -> None:
        for step in steps:
            step()
        if job.device == "cuda":
            torch.cuda.synchronize()

    return call


def _lengths(job: Job) -> list[int]:
    if job.case != "varying":
        return [job.length]
    drawn = random.Random(0)
    return [drawn.randrange(job.length // 8, job.length) for _ in range(TURNS)]


def _write(job: Job, spec: str) -> Call:
    count = (job.length << 20) // 4

    def call() -> None:
        with buffers.using(spec):
            buffers.full(buffers.BufferType.TEMP, (count,), 1.0, torch.float32, torch.device(job.device))
        if job.device == "cuda":
            torch.cuda.synchronize()

    return call


def _step(job: Job, length: int, spec: str) -> Call:
    shape = (1, length, job.heads, job.head_dim)
    generator = torch.Generator(job.device).manual_seed(0)
    options: dict[str, Any] = {"device": job.device, "dtype": DTYPES[job.dtype]}
    q, k, v = (
        torch.randn(shape, generator=generator, **options).transpose(1, 2).requires_grad_(job.backward)
        for _ in range(3)
    )
    gradient = torch.ones(shape, **options).transpose(1, 2)
    run = _attention(job, length, spec)

    def call() -> None:
        output = run(q, k, v)
        if job.backward:
            torch.autograd.grad(output, (q, k, v), gradient)

    return call


def _attention(job: Job, length: int, spec: str) -> Callable[..., Any]:
    if job.case == "standard":
        positions = (torch.arange(length) - 5).clamp(min=-1).expand(1, -1)
        return lambda q, k, v: attend(q, k, v, DensePattern(), key_positions=positions, memory=spec)
    segments, rates = zip(*branches_for("four" if length > 2048 else "512:1,1024:2", length, job.heads), strict=True)
    config = DilatedConfig(segment_lengths=segments, dilation_rates=rates)
    if job.case == "ring":
        layout = SequenceLayout.of((1, length), ranks=1)
        pattern = DilatedPattern(config=config)
        return lambda q, k, v: ring_attention(q, k, v, layout, pattern=pattern, memory=spec)
    return lambda q, k, v: dilated_attention(q, k, v, config, memory=spec)


def _work(connection: Connection, job: Job, variant: Variant) -> None:
    """Run calls on demand; answer with their seconds, at last with the peak memory beyond the inputs."""
    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", torch.get_num_threads())))
    if variant.levers:
        pull_levers(huge_pages=False)  # the environment has asked for them before torch was there
    connection.send(None)
    connection.recv()
    call = prepare(job, variant)
    before = _mark(job.device)
    for _ in range(2):
        call()
    connection.send(None)
    while connection.recv():
        begin = time.perf_counter()
        call()
        connection.send(time.perf_counter() - begin)
    connection.send(None if before is None else _peak(job.device) - before)


def _mark(device: str) -> int | None:
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
        return torch.cuda.memory_reserved()
    try:
        Path("/proc/self/clear_refs").write_text("5")  # Linux: the high-water mark starts anew
    except OSError:
        return None
    return _peak(device)


def _peak(device: str) -> int:
    if device == "cuda":
        return torch.cuda.max_memory_reserved()
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM"))


@contextmanager
def _processes(job: Job, variants: tuple[Variant, ...]) -> Iterator[dict[str, Connection]]:
    spawn = multiprocessing.get_context("spawn")
    started, ends = [], {}
    try:
        for variant in variants:
            ours, theirs = spawn.Pipe()
            process = spawn.Process(target=_work, args=(theirs, job, variant), daemon=True)
            if variant.levers:
                os.environ[TORCH_HUGE_PAGES] = "1"
            try:
                process.start()
            finally:
                os.environ.pop(TORCH_HUGE_PAGES, None)
            started.append(process)
            theirs.close()
            ends[variant.name] = ours
        for end in ends.values():
            end.recv()
        for end in ends.values():  # one after the other: warming up does not disturb
            end.send(None)
            end.recv()
        yield ends
    finally:
        for process in started:
            process.join(5)
            process.kill()


def measure(job: Job, variants: tuple[Variant, ...], rounds: int) -> dict[str, tuple[list[float], int | None]]:
    """Return the seconds and the peak memory of every variant."""
    shuffle = random.Random(0)
    seconds: dict[str, list[float]] = {variant.name: [] for variant in variants}
    with _processes(job, variants) as ends:
        for _ in range(rounds):
            for name in shuffle.sample(list(ends), len(ends)):
                ends[name].send(True)
                seconds[name].append(ends[name].recv())
        peaks = {}
        for name, end in ends.items():
            end.send(False)
            peaks[name] = end.recv()
    return {name: (seconds[name], peaks[name]) for name in seconds}


def run(chosen: list[Job], rounds: int, output: Path, name: str, budget_seconds: float) -> Path:
    """Measure jobs, write a row for each variant and print a table."""
    device = chosen[0].device
    variants = CPU_VARIANTS if device == "cpu" else CUDA_VARIANTS
    machine = describe_machine(device)
    output.mkdir(parents=True, exist_ok=True)
    slug = re.sub(r"[^a-z0-9]+", "-", f"memory {machine['device']}".lower()).strip("-")
    path = output / f"{name or slug}.jsonl"
    path.unlink(missing_ok=True)
    deadline = time.monotonic() + budget_seconds
    table = Table("case", "length", "", "variant", "ms", "× torch [95 %]", "extra MiB", "report")
    for job in chosen:
        if time.monotonic() > deadline:
            table.add_row(job.case, f"{job.length:,}", job.mode, "the budget is spent", "", "", "", "")
            continue
        found = measure(job, variants, rounds)
        with path.open("a") as file:
            for variant, (seconds, peak) in found.items():
                row = {"kind": "memory", "variant": variant, "mode": job.mode, "length": job.length}
                row |= {"median": statistics.median(seconds), "seconds": seconds, "peak_bytes": peak}
                file.write(json.dumps(row | {"case": asdict(job), "machine": machine}) + "\n")
        _add(table, job, found)
    Console(width=120, highlight=False).print(table)
    return path


def _add(table: Table, job: Job, found: dict[str, tuple[list[float], int | None]]) -> None:
    baseline, _ = found["torch"]
    for variant, (seconds, peak) in found.items():
        first = variant == "torch"
        value, low, high = ratio(baseline, seconds)
        table.add_row(
            job.case if first else "",
            f"{job.length:,}" if first else "",
            job.mode if first else "",
            variant,
            f"{statistics.median(seconds) * 1e3:,.2f}",
            "1" if first else f"{value:.3f} \\[{low:.3f}, {high:.3f}]",
            "-" if peak is None else f"{peak / (1 << 20):,.0f}",
            REPORT.get((job.case, job.length), "") if variant == "full" else "",
            end_section=variant == list(found)[-1],
        )
