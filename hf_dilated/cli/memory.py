"""``hf-dilated memory``: the buffers of a run, by kind and over time."""

import json
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.table import Table

from hf_dilated.cli.console import TrustRemoteCode, console, errors, notes, pictures, refusals
from hf_dilated.integration.recording import load, record
from hf_dilated.memory.recording import Recording

MIB = 1 << 20


def memory(
    model: Annotated[str, typer.Argument(help="A folder with a causal model, or its name on the Hub.")],
    length: Annotated[
        int | None, typer.Option(min=1, help="Tokens; by default what the model can, up to 8192.")
    ] = None,
    train: Annotated[bool, typer.Option(help="A training step instead of a forward pass.")] = True,
    output: Annotated[Path, typer.Option(help="The picture, a PNG.", dir_okay=False)] = Path("outputs/memory.png"),
    trust_remote_code: TrustRemoteCode = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print the statistics as JSON, and nothing else.")] = False,
) -> None:
    """Run a model on random tokens and draw which buffers its attention holds, and when (CPU).

    Buffers of any size are shown, also those that are too small to be pooled.
    """
    with pictures():
        import matplotlib.figure  # noqa: F401  (before the model runs)
    with refusals(model, unread="no run of"), notes():
        recording, stats = record(load(model, trust_remote_code=trust_remote_code), length, train=train)
    if not recording.events:
        errors.print("nothing to show: inputs this short run on torch's own attention; try a longer --length")
        raise typer.Exit(1)
    with refusals(str(output)):
        draw(recording, output, f"{Path(model).name}, {'training step' if train else 'forward pass'}")
    if as_json:
        typer.echo(json.dumps(stats))
        return
    console.print(_table(recording, stats))
    console.print(f"{output}: the timeline")


def _table(recording: Recording, stats: dict[str, Any]) -> Table:
    table = Table("kind", show_footer=True)
    total = f"{recording.peak() / MIB:,.1f}"
    table.add_column("buffers", f"{stats['hits'] + stats['misses']:,}", justify="right")
    table.add_column("hit rate", f"{stats['hit_rate']:.0%}", justify="right")
    table.add_column("peak, MiB", total, justify="right")
    for kind in recording.kinds():
        own = stats["types"][kind]
        peak = f"{own['peak_bytes'] / MIB:,.1f}"
        table.add_row(kind, f"{own['hits'] + own['misses']:,}", f"{own['hit_rate']:.0%}", peak)
    table.caption = f"held at most {stats['peak_bytes'] / MIB:,.1f} MiB, fragmentation {stats['fragmentation']:.1%}"
    return table


def draw(recording: Recording, path: Path, title: str) -> None:
    """Draw the bytes in use by kind of buffer."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    seconds, lines = recording.timeline()
    figure, axis = plt.subplots(figsize=(9, 4), layout="constrained")
    milliseconds = [1e3 * second for second in seconds]
    layers = [[size / MIB for size in line] for line in lines.values()]
    axis.stackplot(milliseconds, layers, labels=list(lines), step="post", alpha=0.85)
    axis.set(xlabel="milliseconds", ylabel="MiB in use", title=title)
    axis.grid(alpha=0.3)
    axis.legend(loc="upper left", fontsize=8)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110, format="png")
    plt.close(figure)
