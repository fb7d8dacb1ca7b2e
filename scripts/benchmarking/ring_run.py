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


def run_ring(
    cases: Sequence[RingCase], transports: list[str], modes: Sequence[str], rounds: int, path: Path, *, alone: bool
) -> None:
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
        transports = _checked(cases[0], transports)
        machine = describe_machine(device) | {"link_bytes_per_second": bandwidth(device)}
        rows = []
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("w" if dist.get_rank() == 0 else "a") as file:
            for row in (
                row for case in cases for mode in modes for row in measure(case, mode, transports, rounds, alone=alone)
            ):
                rows.append(row)
                if dist.get_rank() == 0:  # as they come: what is cut short keeps what it has
                    file.write(json.dumps({"kind": "ring", **row, "machine": machine}) + "\n")
                    file.flush()
        if dist.get_rank() == 0:
            _print(rows, machine, path)
    finally:
        dist.destroy_process_group()


def _checked(case: RingCase, transports: list[str]) -> list[str]:
    """Hold every transport against the oracle; leave out those that this machine cannot use.

    Raises:
        SystemExit: If a result is wrong.
    """
    usable, wrong = [], []
    for name in transports:
        try:
            own: list[str] | str = check(case, name)
        except (RuntimeError, ValueError) as error:
            own = str(error).splitlines()[0]
        everywhere: list[Any] = [None] * dist.get_world_size()
        dist.all_gather_object(everywhere, own)
        reasons = [found for found in everywhere if isinstance(found, str)]
        if reasons and dist.get_rank() == 0:
            print(f"not available: {name}, {reasons[0]}", flush=True)
        elif not reasons:
            usable.append(name)
        wrong += [line for found in everywhere if not isinstance(found, str) for line in found]
    if wrong:
        raise SystemExit("No times are reported, because results are wrong:\n" + "\n".join(wrong))
    return usable


def _print(rows: Sequence[dict[str, Any]], machine: dict[str, Any], path: Path) -> None:
    link = machine["link_bytes_per_second"] / 1e9
    title = f"ring, {dist.get_world_size()} × {machine['device']}, torch {machine['torch']}, link {link:.1f} GB/s"
    columns = ("tokens", "mode", "variant", "ms", "eta", "TFLOP/s a process", "extra MB", "MB sent", "kernel")
    table = Table(*columns, title=title)
    for row in rows:
        case = row["case"]
        start = f"{case['length']:,}", row["mode"], row["variant"]
        if row["status"] != "measured":
            table.add_row(*start, row["status"], row["reason"])
            continue
        speed = "" if row["flops_per_second"] is None else f"{row['flops_per_second'] / 1e12:.1f}"
        sent = "" if row["bytes_sent"] is None else f"{row['bytes_sent'] / 1e6:,.1f}"
        eta = "" if row["eta"] is None else f"{row['eta']:.3f}"
        extra = f"{row['extra_memory'] / 1e6:,.0f}"
        table.add_row(*start, f"{row['median'] * 1e3:.2f}", eta, speed, extra, sent, row["kernel"])
    Console(width=140).print(table)
    print(f"eta = T(1) / (P T(P)); rows: {path}")
