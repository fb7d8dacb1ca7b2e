"""What comes out: rows as JSON lines, a table, a plot."""

import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import matplotlib
from rich.console import Console
from rich.table import Table

from benchmarking.variants import CONTROL
from hf_dilated.memory.measure import ratio

matplotlib.use("Agg")

import matplotlib.pyplot as plt

Row = dict[str, Any]

WIDTH = 120
HEADERS = {"forward+backward": "fwd + bwd"}


def write_row(path: Path, row: Row, *, is_first: bool) -> None:
    """Append one row; what was measured survives whatever comes after it, an earlier run not the first row."""
    with path.open("w" if is_first else "a") as file:
        file.write(json.dumps(row) + "\n")


def find(rows: Iterable[Row], length: int, mode: str, variant: str) -> Row | None:
    """Return the row of one measurement, if it has a time."""
    for row in rows:
        if (row["length"], row["mode"], row["variant"]) == (length, mode, variant) and row["median"] is not None:
            return row
    return None


def baseline_of(rows: Sequence[Row], length: int, mode: str, *, fastest: bool) -> Row | None:
    """Return the dense row that others are compared with: the first that was measured, or the fastest."""
    dense = [
        row
        for row in rows
        if (row["length"], row["mode"]) == (length, mode)
        and row["variant"].startswith("dense")
        and not row["variant"].endswith(CONTROL)
        and row["median"] is not None
    ]
    if not dense:
        return None
    if fastest:
        return min(dense, key=lambda row: row["median"])
    return next((row for row in dense if row["status"] == "measured"), dense[0])


def speedup(row: Row, baseline: Row) -> tuple[float, float, float]:
    """Return how many times faster a row is than the baseline; an extrapolated baseline has no interval."""
    if row["seconds"] and baseline["seconds"]:
        return ratio(baseline["seconds"], row["seconds"])
    value = baseline["median"] / row["median"]
    return value, value, value


def print_table(rows: Sequence[Row], title: str, *, fastest: bool) -> None:
    """Print a line for each length and variant."""
    modes = list(dict.fromkeys(row["mode"] for row in rows))
    has_memory = any(row["extra_memory"] is not None for row in rows)
    table = Table()
    table.add_column("length", justify="right", no_wrap=True)
    table.add_column("variant", no_wrap=True)
    for mode in modes:
        table.add_column(f"{HEADERS.get(mode, mode)}, ms", justify="right", no_wrap=True)
        table.add_column("× dense", justify="right", no_wrap=True)
    if has_memory:
        table.add_column("extra / q", justify="right", no_wrap=True)
    lengths = list(dict.fromkeys(row["length"] for row in rows))
    for length in lengths:
        names = list(dict.fromkeys(row["variant"] for row in rows if row["length"] == length))
        for name in names:
            cells = [f"{length:,}" if name == names[0] else "", name]
            memory = "–"
            for mode in modes:
                cells += _cells(rows, length, mode, name, fastest=fastest)
                row = find(rows, length, mode, name)
                if row and row["extra_memory"] is not None:
                    memory = f"{row['extra_memory']:.2f}"
            table.add_row(*cells, *[memory] * has_memory, end_section=name == names[-1])
    console = Console(width=WIDTH, highlight=False)
    console.print(title, markup=False)
    console.print(table)


def _cells(rows: Sequence[Row], length: int, mode: str, name: str, *, fastest: bool) -> list[str]:
    row = find(rows, length, mode, name)
    if row is None:
        keys = (length, mode, name)
        status = next((x["status"] for x in rows if (x["length"], x["mode"], x["variant"]) == keys), "–")
        return [status, ""]
    milliseconds = f"{'~' if row['status'] == 'extrapolated' else ''}{row['median'] * 1e3:,.3f}"
    baseline = baseline_of(rows, length, mode, fastest=fastest)
    if baseline is None:
        return [milliseconds, ""]
    value, low, high = speedup(row, baseline)
    if row is baseline:
        return [milliseconds, "1"]
    if not (row["seconds"] and baseline["seconds"]):
        return [milliseconds, f"~{value:.2f}"]
    return [milliseconds, f"{value:.2f} [{low:.2f}, {high:.2f}]"]


def plot(rows: Sequence[Row], path: Path, title: str) -> None:
    """Draw time over length, one panel for each mode; extrapolated times are dashed."""
    modes = list(dict.fromkeys(row["mode"] for row in rows))
    figure, axes = plt.subplots(1, len(modes), figsize=(6 * len(modes), 4.5), squeeze=False, layout="constrained")
    names = [name for name in dict.fromkeys(row["variant"] for row in rows) if not name.endswith(CONTROL)]
    for axis, mode in zip(axes[0], modes, strict=True):
        for index, name in enumerate(names):
            timed = [x for x in rows if (x["variant"], x["mode"]) == (name, mode) and x["median"] is not None]
            for status, style, label in (("measured", "o-", name), ("extrapolated", "o--", None)):
                points = sorted((x["length"], x["median"] * 1e3) for x in timed if x["status"] == status)
                if points:
                    axis.plot(*zip(*points, strict=True), style, color=f"C{index}", markersize=3, label=label)
        axis.set(xscale="log", yscale="log", xlabel="tokens", ylabel="milliseconds", title=mode)
        axis.set_xscale("log", base=2)
        axis.grid(alpha=0.3)
        axis.legend(fontsize=8)
    figure.suptitle(title, fontsize=10)
    figure.savefig(path, dpi=110)
    plt.close(figure)
