"""The run of ``benchmark.py ring`` in every process: check, measure, print."""

import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from rich.console import Console
from rich.table import Table

from benchmarking.cases import describe_machine
from benchmarking.ring import RingCase, bandwidth, check, measure


def run_ring(cases: Sequence[RingCase], transports: list[str], modes: Sequence[str], rounds: int, path: Path) -> None:
    """Write rows and print a table in the first process.

    Raises:
        SystemExit: If a result differs from the oracle, before anything is timed, or without torchrun.
    """
    if "RANK" not in os.environ:
        raise SystemExit("run it with: torchrun --nproc-per-node P scripts/benchmark.py ring")
    device = cases[0].device
    if device == "cuda":
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    dist.init_process_group("nccl" if device == "cuda" else "gloo")
    try:
        wrong: list[Any] = [None] * dist.get_world_size()
        dist.all_gather_object(wrong, [line for name in transports for line in check(cases[0], name)])
        if any(wrong):
            raise SystemExit(
                "No times are reported, because results are wrong:\n"
                + "\n".join(line for lines in wrong for line in lines)
            )
        machine = describe_machine(device) | {"link_bytes_per_second": bandwidth(device)}
        rows = [row for case in cases for mode in modes for row in measure(case, mode, transports, rounds)]
        if dist.get_rank() == 0:
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text("".join(json.dumps({"kind": "ring", **row, "machine": machine}) + "\n" for row in rows))
            _print(rows, machine, path)
    finally:
        dist.destroy_process_group()


def _print(rows: Sequence[dict[str, Any]], machine: dict[str, Any], path: Path) -> None:
    link = machine["link_bytes_per_second"] / 1e9
    title = f"ring, {dist.get_world_size()} × {machine['device']}, torch {machine['torch']}, link {link:.1f} GB/s"
    table = Table("tokens", "mode", "variant", "ms", "eta", "TFLOP/s a process", "extra MB", title=title)
    for row in rows:
        case = row["case"]
        if row["status"] != "measured":
            table.add_row(f"{case['length']:,}", row["mode"], row["variant"], row["status"], row["reason"])
            continue
        ranks = 1 if row["variant"].startswith("one") else row["ranks"]
        flops = 2 * case["heads"] * case["head_dim"] * case["length"] ** 2 * (3.5 if "backward" in row["mode"] else 1)
        speed = f"{flops / row['median'] / ranks / 1e12:.1f}" if _is_dense(case) else ""
        extra = f"{row['extra_memory'] / 1e6:,.0f}"
        columns = (
            f"{case['length']:,}",
            row["mode"],
            row["variant"],
            f"{row['median'] * 1e3:.2f}",
            f"{row['eta']:.3f}",
        )
        table.add_row(*columns, speed, extra)
    Console(width=140).print(table)
    print(f"eta = T(1) / (P T(P)); rows: {path}")


def _is_dense(case: dict[str, Any]) -> bool:
    return bool(case["pattern"] == "dense" and case["documents"] == "one")
