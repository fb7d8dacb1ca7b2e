"""Measure hf_dilated against dense attention, FlexAttention and peers, interleaved and with a control.

    python scripts/benchmark.py attention
    python scripts/benchmark.py attention --device cuda --output scripts/benchmarks
    python scripts/benchmark.py decode --device cuda --output scripts/benchmarks
    python scripts/benchmark.py block_sparse --device cuda --kv-heads 8 --lengths 32k,128k --output scripts/benchmarks
    python scripts/benchmark.py block_sparse --device cuda --kv-heads 8 --changing
    python scripts/benchmark.py bigbird --device cuda
    torchrun --nproc-per-node 2 scripts/benchmark.py ring --device cuda --output scripts/benchmarks
    python scripts/benchmark.py ring_traffic --output scripts/benchmarks
    python scripts/benchmark.py memory
    python scripts/benchmark.py soak --seconds 600

No time is reported while a variant disagrees with the float64 oracle.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Literal

import torch
import typer
from benchmarking import pooling
from benchmarking.cases import Case, blocks_for, branches_for
from benchmarking.comparison import compare, start
from benchmarking.recompilations import count_recompilations
from benchmarking.ring import RingCase
from benchmarking.ring_run import run_ring
from benchmarking.ring_traffic import run_traffic
from benchmarking.soak import soak as run_soak
from benchmarking.variants import Choice

from hf_dilated.config import Offset, Overlap
from hf_dilated.config.memory import MemoryMode
from hf_dilated.timing import parse_lengths

app = typer.Typer(add_completion=False, no_args_is_help=True, help=__doc__, rich_markup_mode=None)


Device = Literal["cpu", "cuda"]
Dtype = Literal["float64", "float32", "bfloat16", "float16"]

OVERLAPS: dict[str, tuple[Overlap, ...]] = {"once": ("once",), "count": ("count",), "both": ("once", "count")}

DeviceOption = Annotated[Device, typer.Option(help="Where to run.")]
LengthsOption = Annotated[str, typer.Option(help="Tokens, such as 2k,32k,1M; by default what the device can do.")]
HeadsOption = Annotated[int, typer.Option(help="Query heads; by default 8 on a CPU and 32 on a GPU.")]
KvHeadsOption = Annotated[int, typer.Option(help="Key-value heads; by default as many as query heads.")]
HeadDimOption = Annotated[int, typer.Option(help="Size of a head; by default 64 on a CPU and 128 on a GPU.")]
DtypeOption = Annotated[Dtype | None, typer.Option(help="By default float32 on a CPU and bfloat16 on a GPU.")]
BatchOption = Annotated[int, typer.Option(help="Sequences in a batch.")]
PatternOption = Annotated[
    str,
    typer.Option(
        help="doubling (segments 2048, 4096, … up to the length, rates 1, 2, 4, 8), four (the first four of those), "
        "model (as DilatedConfig.from_model_config), or segment:rate pairs such as 2048:1,4096:2."
    ),
]
OverlapOption = Annotated[
    Literal["once", "count", "both"], typer.Option(help="How often a key counts that several branches reach.")
]
PeerOption = Annotated[
    list[str],
    typer.Option(
        help="module:function(query, key, value, segment_lengths, dilation_rates) with overlap count, on (B, H, N, D)."
    ),
]


def _tokens(text: str | int) -> int:
    """Read one length."""
    lengths = parse_lengths(str(text))
    if len(lengths) > 1:
        raise ValueError(f"expected one length such as 32k, got {text!r}")
    return lengths[0]


FlexUpToOption = Annotated[
    int, typer.Option(parser=_tokens, metavar="TOKENS", help="Longest length for FlexAttention, such as 32k.")
]
DenseUpToOption = Annotated[
    int,
    typer.Option(
        parser=_tokens, metavar="TOKENS", help="Longest length for dense attention, such as 128k; extrapolated beyond."
    ),
]
RoundsOption = Annotated[int, typer.Option(min=5, help="Samples of each variant.")]
BudgetOption = Annotated[float, typer.Option(help="Seconds after which the slowest variants are left out.")]
OutputOption = Annotated[Path, typer.Option(help="Folder for the rows and the plot.")]
NameOption = Annotated[str, typer.Option(help="Name of the files; by default from the command, device and pattern.")]


@app.command()
def attention(
    device: DeviceOption = "cpu",
    lengths: LengthsOption = "",
    heads: HeadsOption = 0,
    kv_heads: KvHeadsOption = 0,
    head_dim: HeadDimOption = 0,
    dtype: DtypeOption = None,
    batch: BatchOption = 1,
    pattern: PatternOption = "doubling",
    overlap: OverlapOption = "both",
    backward: Annotated[bool, typer.Option(help="Measure forward + backward as well.")] = True,
    flex: Annotated[bool, typer.Option(help="Measure FlexAttention (GPU only).")] = True,
    flex_up_to: FlexUpToOption = 32768,
    dense_up_to: DenseUpToOption = 131072,
    memory: Annotated[bool, typer.Option(help="Measure the peak memory of the forward call.")] = True,
    peer: PeerOption = [],  # noqa: B006
    peer_offset: Annotated[Offset, typer.Option(help="Which residue a peer's heads keep.")] = "head",
    rounds: RoundsOption = 7,
    budget_seconds: BudgetOption = 900,
    output: OutputOption = Path("outputs/benchmarks"),
    name: NameOption = "",
) -> None:
    """Causal attention over whole sequences: forward, and forward + backward."""
    cases = _cases(device, lengths, heads, kv_heads, head_dim, dtype, batch, pattern, OVERLAPS[overlap], decode=False)
    choice = Choice(
        overlaps=OVERLAPS[overlap],
        flex=flex and device == "cuda",
        flex_up_to=flex_up_to,
        dense_up_to=dense_up_to,
        peers=tuple(peer),
        peer_offset=peer_offset,
    )
    modes = ["forward", "forward+backward"] if backward else ["forward"]
    run = start("attention", device, pattern, choice, rounds, budget_seconds, output, name, memory=memory)
    compare(run, cases, modes, fastest=False)


@app.command(name="block_sparse")
def block_sparse(
    device: DeviceOption = "cpu",
    lengths: LengthsOption = "8k,16k,32k",
    heads: HeadsOption = 0,
    kv_heads: KvHeadsOption = 0,
    head_dim: HeadDimOption = 0,
    dtype: DtypeOption = None,
    batch: BatchOption = 1,
    blocks: Annotated[
        str, typer.Option(help="Patterns (strided, sinks, bigbird) and the fraction of causal blocks that they visit.")
    ] = "strided:0.25,sinks:0.25,bigbird:0.25",
    backward: Annotated[bool, typer.Option(help="Measure forward + backward as well.")] = True,
    flex: Annotated[bool, typer.Option(help="Measure FlexAttention (GPU only).")] = True,
    flex_up_to: FlexUpToOption = 32768,
    flex_seconds: Annotated[float, typer.Option(help="Seconds in which FlexAttention has to be compiled.")] = 60,
    dense_up_to: DenseUpToOption = 131072,
    memory: Annotated[bool, typer.Option(help="Measure the peak memory of the forward call.")] = True,
    changing: Annotated[bool, typer.Option(help="Count what ten lengths recompile, in place of times.")] = False,
    rounds: RoundsOption = 7,
    budget_seconds: BudgetOption = 600,
    output: OutputOption = Path("outputs/benchmarks"),
    name: NameOption = "",
) -> None:
    """Block-sparse attention; the percentage in a name is what it visits, so 25.0 % promises a speed-up of 4."""
    patterns = tuple(blocks.split(","))
    cases = _cases(device, lengths, heads, kv_heads, head_dim, dtype, batch, patterns, (), decode=False)
    choice = Choice(
        overlaps=(),
        flex=flex and device == "cuda",
        flex_up_to=flex_up_to,
        flex_seconds=flex_seconds,
        dense_up_to=dense_up_to,
    )
    modes = ["forward", "forward+backward"] if backward else ["forward"]
    run = start("block sparse", device, "", choice, rounds, budget_seconds, output, name, memory=memory)
    if changing:
        count_recompilations(run, cases[0], typer.echo)
    else:
        compare(run, cases, modes, fastest=False)


@app.command()
def bigbird(
    device: DeviceOption = "cpu",
    lengths: LengthsOption = "1k,4k,8k",
    heads: Annotated[int, typer.Option(help="Heads.")] = 12,
    head_dim: Annotated[int, typer.Option(help="Size of a head.")] = 64,
    dtype: DtypeOption = None,
    rounds: RoundsOption = 7,
    budget_seconds: BudgetOption = 300,
    output: OutputOption = Path("outputs/benchmarks"),
    name: NameOption = "",
) -> None:
    """BigBird in both directions beside Transformers' own, which takes at least 704 tokens in blocks of 64."""
    blocks = ("preset",)
    cases = _cases(device, lengths, heads, heads, head_dim, dtype, 1, blocks, (), decode=False, is_causal=False)
    if wrong := [case.length for case in cases if case.length % 64 or case.length <= 704]:
        raise typer.BadParameter(f"{wrong[0]} tokens are no whole blocks of 64, or no more than 11 of them")
    choice = Choice(overlaps=(), dense_up_to=cases[-1].length)
    run = start("bigbird", device, "", choice, rounds, budget_seconds, output, name, memory=False)
    compare(run, cases, ["forward", "forward+backward"], fastest=False)


@app.command()
def decode(
    device: DeviceOption = "cpu",
    lengths: LengthsOption = "",
    heads: HeadsOption = 32,
    kv_heads: KvHeadsOption = 8,
    head_dim: HeadDimOption = 128,
    dtype: DtypeOption = None,
    batch: BatchOption = 1,
    pattern: PatternOption = "model",
    overlap: OverlapOption = "once",
    rounds: RoundsOption = 7,
    budget_seconds: BudgetOption = 300,
    output: OutputOption = Path("outputs/benchmarks"),
    name: NameOption = "",
) -> None:
    """One query at the end of a long context; on a GPU also replayed as a CUDA graph."""
    cases = _cases(device, lengths, heads, kv_heads, head_dim, dtype, batch, pattern, OVERLAPS[overlap], decode=True)
    choice = Choice(overlaps=OVERLAPS[overlap], dense_up_to=cases[-1].length)
    modes = ["eager", "graph"] if device == "cuda" else ["eager"]
    run = start("decode", device, pattern, choice, rounds, budget_seconds, output, name, memory=False)
    compare(run, cases, modes, fastest=True)


@app.command()
def memory(
    device: DeviceOption = "cpu",
    lengths: LengthsOption = "2k,4k,8k,16k",
    sizes: Annotated[str, typer.Option(help="MiB that are taken and written once.")] = "1,4,16,64,256",
    heads: Annotated[str, typer.Option(help="Query heads; more than the fewest in training steps alone.")] = "",
    head_dim: HeadDimOption = 0,
    dtype: DtypeOption = None,
    rounds: RoundsOption = 11,
    budget_seconds: BudgetOption = 1200,
    output: OutputOption = Path("outputs/benchmarks"),
    name: NameOption = "",
) -> None:
    """Memory pools, and the levers of the process, against torch's own allocations; and what any pool can bring."""
    _check_device(device)
    on_gpu = device == "cuda"
    chosen = pooling.jobs(
        device,
        parse_lengths(lengths),
        parse_lengths(sizes),
        parse_lengths(heads or ("32" if on_gpu else "8,32")),
        head_dim or (128 if on_gpu else 64),
        dtype or ("bfloat16" if on_gpu else "float32"),
    )
    typer.echo(f"Rows: {pooling.run(chosen, rounds, output, name, budget_seconds)}")


@app.command()
def soak(
    seconds: Annotated[float, typer.Option(help="How long.")] = 600,
    threads: Annotated[int, typer.Option(min=1, help="Threads that train at the same time.")] = 4,
    longest: Annotated[int, typer.Option(min=1024, help="Longest length, in tokens.")] = 8192,
    mode: Annotated[MemoryMode, typer.Option(help="Of the pool; disabled is the control.")] = "full",
    dtype: Annotated[Literal["both", "float32", "bfloat16"], typer.Option(help="Which are drawn from.")] = "both",
) -> None:
    """Let threads train attention on random lengths, with checkpoints and exceptions, and watch the pool (CPU)."""
    dtypes = ("float32", "bfloat16") if dtype == "both" else (dtype,)
    if not run_soak(seconds, threads, longest, typer.echo, mode, dtypes):
        raise typer.Exit(1)


@app.command()
def ring(
    device: DeviceOption = "cpu",
    lengths: LengthsOption = "2k",
    heads: HeadsOption = 32,
    kv_heads: KvHeadsOption = 8,
    head_dim: HeadDimOption = 128,
    dtype: DtypeOption = None,
    pattern: Annotated[str, typer.Option(help="dense, or as for attention: doubling, four, model, pairs.")] = "dense",
    documents: Annotated[Literal["one", "packed"], typer.Option(help="One document, or five of 38% to 1.6%.")] = "one",
    transports: Annotated[str, typer.Option(help="Of RingConfig, separated by commas.")] = "auto",
    backward: Annotated[bool, typer.Option(help="Measure forward + backward as well.")] = True,
    alone: Annotated[bool, typer.Option(help="Measure the whole sequence in one process as well.")] = True,
    rounds: RoundsOption = 7,
    output: OutputOption = Path("outputs/benchmarks"),
    name: NameOption = "",
) -> None:
    """One sequence over several processes; run it with torchrun --nproc-per-node P scripts/benchmark.py ring."""
    chosen = dtype or ("bfloat16" if device == "cuda" else "float32")
    shape = {"device": device, "dtype": chosen, "heads": heads, "kv_heads": kv_heads, "head_dim": head_dim}
    cases = [
        RingCase(**shape, length=length, documents=documents, pattern=pattern)  # type: ignore[arg-type]
        for length in parse_lengths(lengths)
    ]
    path = output / f"{name or f'ring-{device}-{pattern}-{documents}'.replace(':', '-')}.jsonl"
    modes = ["forward", "forward+backward"] if backward else ["forward"]
    run_ring(cases, transports.split(","), modes, rounds, path, alone=alone)


@app.command(name="ring_traffic")
def ring_traffic(
    lengths: LengthsOption = "256k,1M",
    ranks: Annotated[int, typer.Option(min=2, help="Processes.")] = 4,
    heads: HeadsOption = 32,
    kv_heads: KvHeadsOption = 8,
    head_dim: HeadDimOption = 128,
    dtype: DtypeOption = None,
    patterns: Annotated[str, typer.Option(help="As for ring, separated by commas.")] = "dense,four,model",
    output: OutputOption = Path("outputs/benchmarks"),
    name: NameOption = "ring-traffic",
) -> None:
    """Bytes that the ranks of a ring send, counted from their plans; runs anywhere, in one process."""
    shape = {"device": "cpu", "dtype": dtype or "bfloat16", "heads": heads, "kv_heads": kv_heads, "head_dim": head_dim}
    cases = [
        RingCase(**shape, length=length, documents="one", pattern=pattern)  # type: ignore[arg-type]
        for length in parse_lengths(lengths)
        for pattern in patterns.split(",")
    ]
    run_traffic(cases, ranks, output / f"{name}.jsonl")


def _cases(
    device: Device,
    lengths: str,
    heads: int,
    kv_heads: int,
    head_dim: int,
    dtype: Dtype | None,
    batch: int,
    pattern: str | tuple[str, ...],
    overlaps: Sequence[Overlap],
    *,
    decode: bool,
    is_causal: bool = True,
) -> list[Case]:
    """Cases of a named pattern of branches, or of several patterns of blocks."""
    _check_device(device)
    on_gpu = device == "cuda"
    first, last = (
        (8 << 10, (1 << 20) if on_gpu else (128 << 10)) if decode else (2 << 10, (1 << 20) if on_gpu else (32 << 10))
    )
    doubling = ",".join(str(first << i) for i in range((last // first).bit_length()))
    heads = heads or (32 if on_gpu else 8)
    if kv_heads and heads % kv_heads:
        raise typer.BadParameter(f"{kv_heads} does not divide {heads} heads", param_hint="--kv-heads")
    try:
        cases = [
            Case(
                device=device,
                dtype=dtype or ("bfloat16" if on_gpu else "float32"),
                batch=batch,
                heads=heads,
                kv_heads=kv_heads or heads,
                head_dim=head_dim or (128 if on_gpu else 64),
                length=length,
                queries=1 if decode else length,
                branches=branches_for(pattern, length, heads) if isinstance(pattern, str) else (),
                blocks=() if isinstance(pattern, str) else pattern,
                is_causal=is_causal,
            )
            for length in parse_lengths(lengths or doubling)
        ]
        for case in cases:
            for overlap in overlaps:
                case.config(overlap)
            for text in case.blocks:
                blocks_for(text, case.length)
    except ValueError as error:
        raise typer.BadParameter(str(error)) from None
    return cases


def _check_device(device: Device) -> None:
    if device == "cuda" and not torch.cuda.is_available():
        raise typer.BadParameter("no CUDA device is available; run with --device cpu", param_hint="--device")


if __name__ == "__main__":
    app()
