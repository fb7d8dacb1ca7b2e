"""One sequence over several processes: ring attention against one process and against torch's context parallelism.

Every process runs this. A time is that of the slowest one, and all take turns in the same random order.
"""

import random
import statistics
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from benchmarking.cases import DTYPES, branches_for
from hf_dilated import DilatedConfig, RingConfig, SequenceLayout, reference, ring_attention
from hf_dilated.distributed.communication import bytes_sent
from hf_dilated.engine import kernels
from hf_dilated.patterns import DensePattern, DilatedPattern, Pattern
from hf_dilated.timing import Call, release, repeats_for, time_call

PACKED = (3104, 3200, 1600, 160, 128)  # documents of 8192 tokens, scaled to the length
CHECKED = 1024  # tokens, against the oracle
TOLERANCE = {"float64": 1e-10, "float32": 1e-4, "bfloat16": 1e-1}


@dataclass(frozen=True, kw_only=True)
class RingCase:
    """One shape."""

    device: str
    dtype: str
    heads: int
    kv_heads: int
    head_dim: int
    length: int
    documents: str  # "one" or "packed"
    pattern: str  # "dense" or a name or list of branches

    def of_pattern(self) -> Pattern:
        """The pattern of a layer."""
        if self.pattern == "dense":
            return DensePattern()
        segments, rates = zip(*branches_for(self.pattern, self.length, self.heads), strict=True)
        return DilatedPattern(config=DilatedConfig(segment_lengths=segments, dilation_rates=rates))

    def position_ids(self) -> Tensor | None:
        """(1, N) positions of packed documents."""
        if self.documents == "one":
            return None
        ends = [sum(PACKED[: i + 1]) * self.length // sum(PACKED) for i in range(len(PACKED))]
        counts = [end - begin for begin, end in zip([0, *ends], ends, strict=False)]
        return torch.cat([torch.arange(count) for count in counts])[None]

    def is_plain(self) -> bool:
        """Whether torch's own attention computes the same."""
        return self.pattern == "dense" and self.documents == "one"

    def operations(self) -> int | None:
        """Floating-point operations of a dense causal forward pass."""
        if self.pattern != "dense":
            return None
        ids = self.position_ids()
        starts = [0] if ids is None else (ids[0] == 0).nonzero()[:, 0].tolist()
        lengths = [end - begin for begin, end in zip(starts, [*starts[1:], self.length], strict=True)]
        return 2 * self.heads * self.head_dim * sum(length**2 for length in lengths)

    def inputs(self, slots: int, seed: int) -> list[Tensor]:
        """Random query, key and value (1, heads, slots, D), laid out as a model's projections are."""
        generator = torch.Generator(self.device).manual_seed(seed)
        shapes = [(1, slots, heads, self.head_dim) for heads in (self.heads, self.kv_heads, self.kv_heads)]
        made = [torch.randn(s, generator=generator, device=self.device, dtype=DTYPES[self.dtype]) for s in shapes]
        return [x.transpose(1, 2) for x in made]

    def layout(self, ranks: int, kind: str | None = None) -> SequenceLayout:
        """How the sequence is spread."""
        chosen: Any = kind or ("zigzag" if self.pattern == "dense" else "contiguous")
        return SequenceLayout.of((1, self.length), ranks, kind=chosen, position_ids=self.position_ids())


Attention = Callable[[Tensor, Tensor, Tensor], Tensor]


def on_one(case: RingCase) -> Attention:
    """The whole sequence in this process, on the kernel that the ring runs."""
    run = partial(ring_attention, layout=case.layout(1), pattern=case.of_pattern())
    return lambda q, k, v: run(q, k, v)  # type: ignore[return-value]


def torch_on_one(case: RingCase) -> Attention:
    """The whole sequence in this process, as torch chooses."""
    grouped = case.heads != case.kv_heads
    return lambda q, k, v: F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=grouped)


def on_ranks(case: RingCase, transport: Any) -> Attention:
    """This process's shard."""
    layout, config = case.layout(dist.get_world_size()), RingConfig(transport=transport)
    run = partial(ring_attention, group=dist.group.WORLD, pattern=case.of_pattern(), config=config)
    return lambda q, k, v: run(q, k, v, layout)  # type: ignore[return-value]


def torch_context_parallel(stack: ExitStack, case: RingCase) -> tuple[Attention, list[Tensor]]:
    """Torch's own, on cuDNN; returns the attention and this process's shards."""
    from torch.distributed.tensor.experimental import context_parallel

    mesh = init_device_mesh(case.device, (dist.get_world_size(),))
    tensors = [x.clone() for x in case.inputs(case.length, 0)]
    stack.enter_context(
        context_parallel(mesh, buffers=tensors, buffer_seq_dims=[2] * 3, no_restore_buffers=set(tensors))
    )
    stack.enter_context(sdpa_kernel(SDPBackend.CUDNN_ATTENTION))
    grouped = case.heads != case.kv_heads
    # looked up at every call: inside the context it is another function
    return lambda q, k, v: F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=grouped), tensors


def call_of(attention: Attention, inputs: list[Tensor], mode: str) -> Call:
    """A call of a mode: forward, or forward+backward."""
    if mode == "forward":
        return torch.no_grad()(lambda: attention(*inputs))
    leaves = [x.detach().requires_grad_() for x in inputs]
    gradient = inputs[0].clone()
    return lambda: torch.autograd.grad(attention(*leaves), leaves, gradient)


def slowest(seconds: float, device: str) -> float:
    """The time of the slowest process, or whatever else is largest."""
    longest = torch.tensor([seconds], device=device, dtype=torch.float64)
    dist.all_reduce(longest, op=dist.ReduceOp.MAX)
    return longest.item()


def check(case: RingCase, transport: str) -> list[str]:
    """Hold outputs and gradients of a small case against the oracle; return what differs."""
    case = RingCase(**{**asdict(case), "length": CHECKED, "pattern": small(case.pattern)})
    rank, layout = dist.get_rank(), case.layout(dist.get_world_size())
    whole = case.inputs(CHECKED, 0)
    exact = [x.double().requires_grad_() for x in whole]
    pattern, ids = case.of_pattern(), case.position_ids()
    dense = DilatedConfig(segment_lengths=(CHECKED,), dilation_rates=(1,))
    config = pattern.config if isinstance(pattern, DilatedPattern) else dense
    expected = reference.dilated_attention(*exact, config, position_ids=ids)
    assert isinstance(expected, Tensor)
    wanted = [expected, *torch.autograd.grad(expected, exact, whole[0].double())]
    shards = [layout.shard(x.transpose(1, 2), rank).transpose(1, 2) for x in whole]
    leaves = [x.detach().requires_grad_() for x in shards]
    output = on_ranks(case, transport)(*leaves)
    found = [output, *torch.autograd.grad(output, leaves, shards[0])]
    wrong = []
    for name, got, want in zip(("output", "dq", "dk", "dv"), found, wanted, strict=True):
        right = layout.shard(want.transpose(1, 2), rank).transpose(1, 2)
        off = ((got.double() - right).norm(dim=-1) / right.norm(dim=-1).clamp(min=right.norm(dim=-1).median())).max()
        if not off <= TOLERANCE[case.dtype]:
            wrong.append(f"{transport}, {case.documents}, {case.pattern}: {name} is off by {off:.1e} on rank {rank}")
    return wrong


def small(pattern: str) -> str:
    """The same form of pattern for the small case."""
    return pattern if pattern == "dense" else "128:1,256:2,512:4,1024:8"


def measure(case: RingCase, mode: str, transports: list[str], rounds: int, *, alone: bool) -> Iterator[dict[str, Any]]:
    """Time everything in turn; yield a row for each variant, with eta = T(1) / (P T(P)).

    T(1) is the fastest time of one process, whatever the kernel; there is none unless ``alone``.
    """
    ranks, rank = dist.get_world_size(), dist.get_rank()
    layout = case.layout(ranks)
    calls: dict[str, Call] = {}
    if alone:
        inputs = case.inputs(case.length, 0)
        calls["one process"] = call_of(on_one(case), inputs, mode)
        calls["one process (again)"] = calls["one process"]
    if alone and case.is_plain():
        calls["one process, torch"] = call_of(torch_on_one(case), inputs, mode)
    shards = case.inputs(layout.slots, 1 + rank)
    for transport in transports:
        calls[f"ring {transport}"] = call_of(on_ranks(case, transport), shards, mode)
    failed: dict[str, str] = {}
    seconds, memory = _samples(case, calls, rounds, failed)
    sent = {name: _sent(calls[f"ring {name}"]) for name in transports if f"ring {name}" in calls}
    if case.device == "cuda" and case.is_plain():
        with ExitStack() as stack:  # by itself: it replaces torch's attention for everybody
            try:
                attention, tensors = torch_context_parallel(stack, case)
                more = _samples(case, {"torch": call_of(attention, tensors, mode)}, rounds, failed)
                seconds, memory = seconds | more[0], memory | more[1]
            except Exception as error:  # not on every version of torch
                failed["torch"] = str(error).splitlines()[0]
    one = min((statistics.median(x) for name, x in seconds.items() if name.startswith("one process")), default=None)
    kernel = kernels.choose(kernels.Case.of(shards[0], shards[2], recurs=True)).name
    for name, samples in seconds.items():
        median, shares = statistics.median(samples), 1 if name.startswith("one") else ranks
        flops = (case.operations() or 0) * (3.5 if "backward" in mode else 1)
        row = {"variant": name, "mode": mode, "median": median, "seconds": samples, "ranks": ranks}
        row |= {"eta": one and one / median / shares, "kernel": "torch's own" if "torch" in name else kernel}
        row |= {"flops_per_second": flops / median / shares if flops else None, "extra_memory": memory[name]}
        row |= {"bytes_sent": sent.get(name.removeprefix("ring "))}
        yield row | {"status": "measured", "case": asdict(case)}
    for name, reason in failed.items():
        yield {"variant": name, "mode": mode, "status": "unavailable", "reason": reason, "case": asdict(case)}


def _samples(
    case: RingCase, calls: dict[str, Call], rounds: int, failed: dict[str, str]
) -> tuple[dict[str, list[float]], dict[str, int]]:
    repeats: dict[str, int] = {}
    memory: dict[str, int] = {}
    for name, call in list(calls.items()):
        try:
            call()
            memory[name] = int(slowest(_peak(call, case.device), case.device))
            seconds_once = slowest(time_call(call, 1, case.device), case.device)
            repeats[name] = repeats_for(seconds_once, case.device)
        except torch.cuda.OutOfMemoryError as error:
            failed[name] = str(error).splitlines()[0]
            del calls[name]
        release()
    order = random.Random(0)
    seconds: dict[str, list[float]] = {name: [] for name in calls}
    for _ in range(rounds):
        for name in order.sample(list(calls), len(calls)):
            dist.barrier()
            seconds[name].append(slowest(time_call(calls[name], repeats[name], case.device), case.device))
    return seconds, memory


def _sent(call: Call) -> int:
    """Bytes that this process sends in one call."""
    with bytes_sent() as record:
        call()
    return sum(record)


def _peak(call: Call, device: str) -> int:
    if device != "cuda":
        return 0
    release()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    call()
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() - before


def bandwidth(device: str, megabytes: int = 256) -> float:
    """Bytes a second that a process sends and, at the same time, receives."""
    x = torch.zeros(megabytes << 20, dtype=torch.uint8, device=device)
    y, rank, ranks = torch.empty_like(x), dist.get_rank(), dist.get_world_size()

    def once() -> None:
        ops = [dist.P2POp(dist.isend, x, (rank + 1) % ranks), dist.P2POp(dist.irecv, y, (rank - 1) % ranks)]
        for work in dist.batch_isend_irecv(ops):
            work.wait()

    once()
    return (megabytes << 20) / slowest(time_call(once, 5, device), device)
