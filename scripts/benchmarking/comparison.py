"""One comparison from its check to its table: parity, measurements, rows, plot."""

import re
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import typer

from benchmarking import parity, report
from benchmarking.cases import Case, describe_machine
from benchmarking.runner import Run, measure
from benchmarking.variants import CONTROL, Choice, variants
from hf_dilated.timing import little_garbage


def start(
    kind: str,
    device: str,
    pattern: str,
    choice: Choice,
    rounds: int,
    budget_seconds: float,
    output: Path,
    name: str,
    *,
    memory: bool,
) -> Run:
    """Begin; the first row takes the place of those of an earlier run with this name."""
    machine = describe_machine(device)
    output.mkdir(parents=True, exist_ok=True)
    words = [kind, machine["device"], pattern]
    path = output / f"{name or re.sub(r'[^a-z0-9]+', '-', ' '.join(words).lower()).strip('-')}.jsonl"
    return Run(
        kind=kind,
        machine=machine,
        path=path,
        rounds=rounds,
        deadline=time.monotonic() + budget_seconds,
        choice=choice,
        memory=memory,
    )


def compare(run: Run, cases: Sequence[Case], modes: Sequence[str], *, fastest: bool) -> None:
    """Measure every case in every mode, and print and plot what came out.

    Raises:
        typer.Exit: If a variant is wrong; nothing is timed then.
    """
    with little_garbage():
        _check_parity(run, cases[-1], gradients="forward+backward" in modes)
        for case in cases:
            typer.echo(f"{case.length:,} tokens, {run.left():.0f} s left", err=True)
            measure(run, case, modes)
    case, machine = cases[-1], run.machine
    title = (
        f"{run.kind}, {machine['device']} ({machine['cores']} cores), torch {machine['torch']}, {case.dtype}, "
        f"batch {case.batch}, {case.heads}/{case.kv_heads} heads of {case.head_dim}"
    )
    report.plot(run.rows, run.path.with_suffix(".png"), title)
    for reason in dict.fromkeys(_reasons(run)):
        typer.echo(reason)
    report.print_table(run.rows, title, fastest=fastest)
    typer.echo(
        f"~ extrapolated; [95 % interval];{CONTROL}: the control, the same thing measured twice\n"
        "extra / q: peak memory of the forward call beyond inputs and output, in sizes of q\n"
        f"Rows and plot: {run.path.with_suffix('')}.*"
    )


def _check_parity(run: Run, case: Case, *, gradients: bool) -> None:
    small = parity.small_case(case)
    typer.echo(f"checking every variant against the oracle at {small.length:,} tokens", err=True)
    choice = replace(run.choice, flex_up_to=max(run.choice.flex_up_to, small.length))
    wrong, missing = parity.failures(small, variants(small, choice), gradients=gradients)
    for line in missing:
        typer.echo(f"not available: {line}", err=True)
    if wrong:
        typer.echo("No times are reported, because results are wrong:\n  " + "\n  ".join(wrong), err=True)
        raise typer.Exit(1)


def _reasons(run: Run) -> list[str]:
    return [
        f"{row['length']:,} {row['variant']}, {row['mode']}: {row['status']}, {row['reason']}"
        for row in run.rows
        if row["status"] not in ("measured", "extrapolated")
    ]
