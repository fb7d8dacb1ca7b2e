"""What memory pools and the levers of the process bring: every variant in a fresh process, samples interleaved.

Every row also says how many page faults a call has and how long the kernel works for it. That bounds what any pool can
bring: one that costs nothing saves the kernel's time at most.
"""

import json
import multiprocessing
import os
import random
import re
import resource
import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, NamedTuple

import torch
from rich.console import Console
from rich.table import Table

from benchmarking.cases import DTYPES, branches_for, describe_machine
from hf_dilated import DilatedConfig, dilated_attention, ring_attention
from hf_dilated.config.memory import MemoryMode
from hf_dilated.distributed import SequenceLayout
from hf_dilated.functional import attend
from hf_dilated.memory import auto_configure_memory_pool, buffers
from hf_dilated.memory.levers import pull_levers
from hf_dilated.memory.measure import CONTROL, ratio
from hf_dilated.memory.thresholds import Thresholds
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
SHORTEST_SAMPLE = 0.02  # seconds; shorter calls are repeated within a sample
LEAST_ROUNDS = 3
CAPTION = (
    f"extra: peak memory beyond the inputs; {CONTROL}: torch measured twice; faults, kernel: page faults of a call and "
    "the kernel's share of the processors' time; bound: how many times faster without that share"
)


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
FEW_VARIANTS = (Variant("torch"), Variant(CONTROL), Variant("full", "full"))


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

    def variants(self, fewest_heads: int) -> tuple[Variant, ...]:
        """Where it takes its memory from, one after the other."""
        return CPU_VARIANTS if self.device == "cpu" and self.heads == fewest_heads else FEW_VARIANTS


def jobs(device: str, lengths: list[int], sizes: list[int], heads: list[int], head_dim: int, dtype: str) -> list[Job]:
    """List what is measured; the report's rows are among it. More heads than the fewest take part in training steps."""
    shared: dict[str, Any] = {"device": device, "dtype": dtype, "head_dim": head_dim}
    fewest, *more = sorted(heads)
    found = [Job("write", size, False, heads=fewest, **shared) for size in sizes]
    found += [Job("dilated", n, backward, heads=fewest, **shared) for n in lengths for backward in (False, True)]
    rest = ("ring", 1024), ("standard", 8192), ("varying", 8192)
    found += [Job(case, n, True, heads=fewest, **shared) for case, n in rest]
    many = [*(("dilated", n) for n in lengths if n >= 8192), ("varying", 8192)]
    return found + [Job(case, n, True, heads=count, **shared) for count in more for case, n in many]


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


class Sample(NamedTuple):
    """What one call took: seconds, those of the processors for the program and for the kernel, and page faults."""

    seconds: float
    user: float
    system: float
    faults: float


class Measured(NamedTuple):
    """Samples of one variant, and its peak memory in bytes beyond the inputs, where the system tells."""

    samples: list[Sample]
    peak: int | None

    @property
    def seconds(self) -> list[float]:
        """Of every sample."""
        return [sample.seconds for sample in self.samples]

    def median(self, field: str) -> float:
        """Return the median of a field of the samples."""
        return statistics.median(getattr(sample, field) for sample in self.samples)

    def kernel_share(self) -> float:
        """Return the kernel's part of the processors' time, which other programs hardly disturb."""
        system = sum(sample.system for sample in self.samples)
        return system / max(system + sum(sample.user for sample in self.samples), 1e-9)

    def bound(self) -> float:
        """Return how many times faster it would be if the kernel did nothing for it."""
        return 1 / max(1 - self.kernel_share(), 0.01)


def _sample(call: Call, repeats: int) -> Sample:
    before, begin = resource.getrusage(resource.RUSAGE_SELF), time.perf_counter()
    for _ in range(repeats):
        call()
    seconds, after = time.perf_counter() - begin, resource.getrusage(resource.RUSAGE_SELF)
    used = (getattr(after, name) - getattr(before, name) for name in ("ru_utime", "ru_stime", "ru_minflt"))
    return Sample(seconds / repeats, *(amount / repeats for amount in used))


def _work(connection: Connection, job: Job, variant: Variant) -> None:
    """Take samples on demand; answer with them, at last with the peak memory beyond the inputs."""
    if variant.levers:
        pull_levers()  # before the first tensor
    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", torch.get_num_threads())))
    connection.send(None)
    connection.recv()
    call = prepare(job, variant)
    before = _mark(job.device)
    repeats = 1
    if _sample(call, 1).seconds < SHORTEST_SAMPLE:
        repeats = max(1, int(SHORTEST_SAMPLE / _sample(call, 1).seconds))
    connection.send(None)
    while connection.recv():
        connection.send(_sample(call, repeats))
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
    context: Any = multiprocessing.get_context("spawn" if job.device == "cuda" else "forkserver")
    multiprocessing.set_forkserver_preload(["torch", "hf_dilated"])  # fresh processes that need not import them again
    started, ends = [], {}
    try:
        for variant in variants:
            ours, theirs = context.Pipe()
            process = context.Process(target=_work, args=(theirs, job, variant), daemon=True)
            process.start()
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


def measure(job: Job, variants: tuple[Variant, ...], rounds: int, budget_seconds: float) -> dict[str, Measured]:
    """Measure every variant in turn; fewer rounds, three at least, where the budget is spent."""
    shuffle = random.Random(0)
    samples: dict[str, list[Sample]] = {variant.name: [] for variant in variants}
    deadline = time.monotonic() + budget_seconds
    with _processes(job, variants) as ends:
        for done in range(rounds):
            if done >= LEAST_ROUNDS and time.monotonic() > deadline:
                break
            for name in shuffle.sample(list(ends), len(ends)):
                ends[name].send(True)
                samples[name].append(ends[name].recv())
        peaks = {}
        for name, end in ends.items():
            end.send(False)
            peaks[name] = end.recv()
    return {name: Measured(samples[name], peaks[name]) for name in samples}


def run(chosen: list[Job], rounds: int, output: Path, name: str, budget_seconds: float) -> Path:
    """Measure jobs, write a row for each variant and print a table."""
    device = chosen[0].device
    machine = describe_machine(device)
    output.mkdir(parents=True, exist_ok=True)
    slug = re.sub(r"[^a-z0-9]+", "-", f"memory {machine['device']}".lower()).strip("-")
    path = output / f"{name or slug}.jsonl"
    deadline = time.monotonic() + budget_seconds
    columns = "case", "length", "variant", "ms", "× torch [95 %]", "extra MiB", "faults", "kernel", "bound", "report"
    table = Table(*columns, caption=CAPTION)
    fewest = min(job.heads for job in chosen)
    for number, job in enumerate(chosen):
        left = deadline - time.monotonic()
        if left < 0:
            table.add_row(job.case, f"{job.length:,}", "the budget is spent")
            continue
        found = measure(job, job.variants(fewest), rounds, left / (len(chosen) - number))
        with path.open("a" if number else "w") as file:
            for variant, measured in found.items():
                row: dict[str, Any] = {"kind": "memory", "variant": variant, "mode": job.mode, "length": job.length}
                row |= {"median": measured.median("seconds"), "seconds": measured.seconds}
                row |= {name: [getattr(sample, name) for sample in measured.samples] for name in ("user", "system")}
                row |= {"page_faults": measured.median("faults"), "peak_bytes": measured.peak}
                file.write(json.dumps(row | {"case": asdict(job), "machine": machine}) + "\n")
        _add(table, job, found)
    Console(width=140, highlight=False).print(table)
    return path


def _add(table: Table, job: Job, found: dict[str, Measured]) -> None:
    baseline = found["torch"].seconds
    for variant, measured in found.items():
        first = variant == "torch"
        value, low, high = ratio(baseline, measured.seconds)
        table.add_row(
            f"{job.case} {job.mode}, {job.heads} heads" if first else "",
            f"{job.length:,}" if first else "",
            variant,
            f"{measured.median('seconds') * 1e3:,.2f}",
            "1" if first else f"{value:.3f} \\[{low:.3f}, {high:.3f}]",
            "-" if measured.peak is None else f"{measured.peak / (1 << 20):,.0f}",
            f"{measured.median('faults'):,.0f}",
            f"{measured.kernel_share():.1%}",
            f"{measured.bound():.3f}" if first else "",
            REPORT.get((job.case, job.length), "") if variant == "full" else "",
            end_section=variant == list(found)[-1],
        )
