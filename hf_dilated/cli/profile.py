"""``hf-dilated profile``: from which length on pooling pays on this machine."""

import json
from collections.abc import Callable
from dataclasses import asdict
from typing import Annotated

import torch
import typer
from rich.markup import escape
from rich.table import Table

from hf_dilated.cli.console import TrustRemoteCode, console, errors, notes, refusals
from hf_dilated.config import DilatedConfig
from hf_dilated.config.memory import MemoryMode
from hf_dilated.functional import dilated_attention
from hf_dilated.integration.recording import load, record
from hf_dilated.memory import auto_configure_memory_pool
from hf_dilated.memory.measure import CONTROL, compare
from hf_dilated.memory.profile import (
    LONGEST_PLAN,
    Measurement,
    Profile,
    current_profile,
    explain,
    merged,
    model_key,
    profile_path,
    this_machine,
    thresholds_of,
)
from hf_dilated.memory.thresholds import Thresholds

MODES: tuple[MemoryMode, ...] = ("lightweight", "full")
ALL_MODES: tuple[MemoryMode, ...] = ("disabled", *MODES)


def profile(
    model: Annotated[str, typer.Argument(help="A causal model whose buffers are to be there before it runs.")] = "",
    lengths: Annotated[str, typer.Option(help="Tokens, ascending.")] = "2048,4096,8192,16384",
    heads: Annotated[int, typer.Option(min=1, help="Query heads.")] = 8,
    head_dim: Annotated[int, typer.Option(min=1, help="Size of a head.")] = 64,
    rounds: Annotated[int, typer.Option(min=3, help="Samples of each variant.")] = 9,
    trust_remote_code: TrustRemoteCode = False,
    remove: Annotated[bool, typer.Option("--remove", help="Forget the profile and exit.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print the measurements as JSON, and nothing else.")] = False,
) -> None:
    """Measure where memory pools pay on this machine, and let every model use that from now on.

    Torch's own allocations against each mode, interleaved and with a control, in a forward pass and in a training step
    of attention. The profile belongs to this machine and these versions.
    """
    path = profile_path()
    if remove:
        path.unlink(missing_ok=True)
        current_profile.cache_clear()
        console.print(f"{path} is removed: the default thresholds count again")
        return
    rows = [row for length in _parse(lengths) for row in measure(length, heads, head_dim, rounds)]
    plans = {}
    if model:
        with refusals(model, unread="no run of"), notes():
            loaded = load(model, trust_remote_code=trust_remote_code)
            plans = {model_key(loaded.config): record(loaded)[0].plan()[:LONGEST_PLAN]}
    thresholds = thresholds_of(rows)
    found = Profile(
        machine=this_machine(),
        thresholds=thresholds,
        measurements=tuple(rows),
        plans=merged(current_profile(), plans),
    )
    found.save(path)
    current_profile.cache_clear()
    if as_json:
        typer.echo(json.dumps([asdict(row) for row in rows]))
        return
    console.print(_table(rows))
    console.print(explain(thresholds, rows))
    console.print(f"{path}: used from now on; `hf-dilated profile --remove` undoes it")


def measure(length: int, heads: int, head_dim: int, rounds: int) -> list[Measurement]:
    """Compare the modes with torch's own allocations at one length."""
    errors.print(f"measuring {length:,} tokens", style="dim")
    rows = []
    for kind in ("forward", "step"):
        calls: dict[str, Callable[[], None]] = {
            mode: _call(length, heads, head_dim, mode, backward=kind == "step") for mode in ALL_MODES
        }
        _, found = compare(calls, rounds=rounds)
        rows += [
            Measurement(length=length, kind=kind, mode=mode, **found[mode]._asdict(), noise=found[CONTROL].high)
            for mode in MODES
        ]
    return rows


def _call(length: int, heads: int, head_dim: int, mode: MemoryMode, *, backward: bool) -> Callable[[], None]:
    spec = auto_configure_memory_pool(length, mode=mode, thresholds=Thresholds()).spec
    first = max(1, min(2048, length // 2))
    segments = [first << i for i in range(4) if first << i <= length]
    pattern = DilatedConfig(segment_lengths=tuple(segments), dilation_rates=tuple(1 << i for i in range(len(segments))))
    shape = (1, length, heads, head_dim)
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(shape, generator=generator).transpose(1, 2).requires_grad_(backward) for _ in range(3))
    gradient = torch.ones(shape).transpose(1, 2)

    def call() -> None:
        output = dilated_attention(q, k, v, pattern, memory=spec)
        if backward:
            torch.autograd.grad(output, (q, k, v), gradient)

    return call


def _parse(lengths: str) -> list[int]:
    try:
        found = sorted({int(length) for length in lengths.split(",")})
    except ValueError:
        raise typer.BadParameter(
            f"expected tokens such as 2048,8192, got {lengths!r}", param_hint="--lengths"
        ) from None
    if found[0] < 1:
        raise typer.BadParameter(f"expected tokens, got {found[0]}", param_hint="--lengths")
    return found


def _table(rows: list[Measurement]) -> Table:
    table = Table("tokens", "", "mode", "× torch", "95 %", "noise up to")
    for row in rows:
        interval = f"[{row.low:.2f}, {row.high:.2f}]"
        table.add_row(f"{row.length:,}", row.kind, row.mode, f"{row.ratio:.2f}", escape(interval), f"{row.noise:.2f}")
    return table
