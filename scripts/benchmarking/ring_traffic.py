"""What ranks send, counted from the plans: no attention is run, and no process but this one."""

import json
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from benchmarking.cases import DTYPES
from benchmarking.ring import RingCase
from hf_dilated.distributed.pieces import trade_of
from hf_dilated.distributed.ring import attends_densely, groups_of
from hf_dilated.distributed.shares import Problem, seen_plan


def bytes_of(case: RingCase, ranks: int, rank: int, transport: str) -> tuple[int, int]:
    """Return what a rank sends in a forward, and in a backward pass, which brings keys and values once more."""
    layout = case.layout(ranks)
    problem = Problem(layout, case.of_pattern().spec, case.heads, case.kv_heads, is_causal=True, packs=False)
    row = 2 * case.head_dim * DTYPES[case.dtype].itemsize  # a key and a value of a head
    if transport == "rows" or (transport == "auto" and not attends_densely(problem)):
        seen = seen_plan(problem, rank)
        row *= 1 if seen.per_head else case.kv_heads
        out, home = sum(seen.send), sum(seen.receive)
    else:
        groups = groups_of("exchange" if transport == "exchange" else "gather", ranks, fits=True)
        trades = [trade_of(problem, rank, group) for group in groups]
        row *= case.kv_heads
        out, home = (sum(p.count for t in trades for p in side(t).sends) for side in (_out, _home))
    return out * row, (out + home) * row


def _out(trade: Any) -> Any:
    return trade.out


def _home(trade: Any) -> Any:
    return trade.home


def count(cases: Sequence[RingCase], ranks: int) -> Iterator[dict[str, Any]]:
    """Yield a row for each case: bytes a rank sends, on average and at most."""
    for case in cases:
        sent = [bytes_of(case, ranks, rank, "auto") for rank in range(ranks)]
        row: dict[str, Any] = {"kind": "ring traffic", "ranks": ranks, "case": asdict(case)}
        for mode, of_mode in zip(("forward", "backward"), zip(*sent, strict=True), strict=True):
            row |= {f"{mode}_mean": sum(of_mode) / ranks, f"{mode}_most": max(of_mode)}
        yield row


def run_traffic(cases: Sequence[RingCase], ranks: int, path: Path) -> None:
    """Write rows and print a table."""
    rows = list(count(cases, ranks))
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    table = Table("tokens", "pattern", "forward", "backward", "of dense", title=f"MB that each of {ranks} ranks sends")
    dense = {row["case"]["length"]: row for row in rows if row["case"]["pattern"] == "dense"}
    for row in rows:
        case = row["case"]
        share = row["forward_mean"] / dense[case["length"]]["forward_mean"] if case["length"] in dense else None
        columns = [f"{row[f'{mode}_mean'] / 1e6:,.1f}" for mode in ("forward", "backward")]
        table.add_row(f"{case['length']:,}", case["pattern"], *columns, "" if share is None else f"{share:.1%}")
    Console(width=100).print(table)
    print(f"Rows: {path}")
