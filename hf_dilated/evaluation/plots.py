"""Pictures of a report."""

from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from hf_dilated.evaluation.report import Report, Rows, short_count


def save_plots(report: Report, folder: Path) -> list[Path]:
    """Draw each part that was measured into a PNG of its own; return their paths."""
    folder.mkdir(parents=True, exist_ok=True)
    paths = []
    for part, draw in (("perplexity", _perplexity), ("retrieval", _retrieval), ("cost", _cost)):
        if rows := report.rows(part):
            figure = Figure(layout="constrained")
            draw(figure, rows)
            paths.append(folder / f"{part}.png")
            figure.savefig(paths[-1], dpi=120)
    return paths


def _perplexity(figure: Figure, rows: Rows) -> None:
    axes = figure.subplots()
    for name, chosen in _by(rows, "attention").items():
        edges = [chosen[0]["start"], *(row["stop"] for row in chosen)]
        axes.stairs([row["perplexity"] for row in chosen], edges, baseline=None, linewidth=2, label=name)
    axes.set(xlabel="position", ylabel="perplexity", yscale="log")
    _lengths(axes, sorted({row["stop"] for row in rows}))
    axes.legend()


def _retrieval(figure: Figure, rows: Rows) -> None:
    """One map of depth and length for every task with depths and every attention; lines for the other tasks."""
    tasks, names = _by(rows, "task"), list(_by(rows, "attention"))
    figure.set_size_inches(4 * len(names), 3 * len(tasks))
    grid = figure.subplots(len(tasks), len(names), squeeze=False)
    lengths = sorted({row["tokens"] for row in rows})
    for line, (task, of_task) in zip(grid, tasks.items(), strict=True):
        for axes, name in zip(line, names, strict=True):
            chosen = [row for row in of_task if row["attention"] == name]
            depths = sorted({row["depth"] for row in chosen if row["depth"] is not None}) or [None]
            scores = [
                [_mean([r["score"] for r in chosen if r["tokens"] == n and r["depth"] == depth]) for n in lengths]
                for depth in depths
            ]
            axes.imshow(scores, vmin=0, vmax=1, cmap="RdYlGn", aspect="auto")
            axes.set_xticks(range(len(lengths)), [short_count(n) for n in lengths])
            axes.set_yticks(range(len(depths)), ["" if depth is None else f"{depth:.0%}" for depth in depths])
            axes.set(title=f"{task}, {name}", xlabel="tokens", ylabel="depth")


def _cost(figure: Figure, rows: Rows) -> None:
    figure.set_size_inches(13, 4)
    panels = (
        ("read_seconds", "seconds to read", 1.0),
        ("seconds_per_token", "ms for a new token", 1e3),
        ("peak_bytes", "memory, MiB", 2**-20),
    )
    for axes, (field, label, unit) in zip(figure.subplots(1, 3), panels, strict=True):
        for name, chosen in _by(rows, "attention").items():
            known = [row for row in chosen if row[field] is not None]
            axes.plot([row["tokens"] for row in known], [row[field] * unit for row in known], "o-", label=name)
        axes.set(xlabel="tokens", ylabel=label, yscale="log")
        _lengths(axes, sorted({row["tokens"] for row in rows}))
        axes.legend()


def _lengths(axes: Axes, lengths: list[int]) -> None:
    axes.set_xscale("log", base=2)
    axes.set_xticks(lengths, [short_count(n) for n in lengths])
    axes.minorticks_off()


def _by(rows: Rows, field: str) -> dict[str, Rows]:
    groups: dict[str, Rows] = {}
    for row in rows:
        groups.setdefault(row[field], []).append(row)
    return groups


def _mean(values: list[float]) -> float:
    return sum(values) / len(values) if values else float("nan")
