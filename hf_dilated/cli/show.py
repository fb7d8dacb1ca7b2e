"""``hf-dilated show``: who sees whom in a layer of a model."""

import json
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import typer
from rich.markup import escape
from rich.table import Table
from transformers import AutoConfig

from hf_dilated.cli.console import TrustRemoteCode, console, notes, pictures, refusals
from hf_dilated.integration.layers import WINDOWED, layer_pattern
from hf_dilated.integration.reach import reach_of
from hf_dilated.integration.report import ModelReport, report
from hf_dilated.integration.support import UnsupportedError
from hf_dilated.patterns import BlockSparsePattern, Pattern
from hf_dilated.patterns.sight import Sight, look

CELLS = 32  # of the map in the terminal
PIXELS = 256  # of the picture
SHADES = "·░▒▓█"  # nothing, up to a third, two thirds, less than all, all
DEFAULT_LENGTH = 8192


def show(
    model: Annotated[str, typer.Argument(help="A folder with a config.json, or a model's name on the Hub.")],
    backend: Annotated[
        str | None, typer.Option(help="dilated, block_sparse, …; by default the stored one, else dilated.")
    ] = None,
    length: Annotated[
        int | None, typer.Option(min=1, help="Tokens in the document; by default the model's, up to 8192.")
    ] = None,
    layer: Annotated[int, typer.Option(min=0, help="Index of the layer.")] = 0,
    head: Annotated[int, typer.Option(min=0, help="Query head.")] = 0,
    output: Annotated[Path | None, typer.Option(help="Write a PNG here.", dir_okay=False)] = None,
    trust_remote_code: TrustRemoteCode = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print the costs as JSON, and nothing else.")] = False,
) -> None:
    """Draw who sees whom in a layer of a model, and say what that costs; reads its config.json alone.

    Exits with 1 if the model would be refused, or the layer has attention of its own.
    """
    with refusals(model, unread="nothing to show of", unread_code=2):
        config = AutoConfig.from_pretrained(model, trust_remote_code=trust_remote_code)
        with notes():
            result = report(config, backend)
        _check_runs(result, layer)
        text_config = config.get_text_config()
        pattern = _pattern(text_config, layer, result.backend)
        length = length or min(reach_of(config) or DEFAULT_LENGTH, DEFAULT_LENGTH)
        sight = look(
            pattern, length, head=head, heads=result.heads, kv_heads=result.kv_heads, is_causal=result.is_causal
        )
    title = f"{result.backend}, layer {layer}, head {head}, {length:,} tokens"
    costs = _costs(sight, result, text_config)
    if output is not None:
        with refusals(str(output)):
            _draw(sight, title, output)
    if as_json:
        values = {name: {"here": ours, "dense": dense} for name, (ours, dense) in costs.items()}
        typer.echo(json.dumps({"backend": result.backend, "layer": layer, "head": head, "tokens": length, **values}))
        return
    console.print(f"[bold]{escape(result.model)}[/] {title}; rows are queries, columns are keys")
    for line in in_blocks(sight):
        console.print(line, highlight=False)
    console.print(_table(costs))
    if isinstance(pattern, BlockSparsePattern) and pattern.chosen_blocks:
        console.print(f"besides, every token chooses up to {pattern.chosen_blocks} blocks by their content")
    if output is not None:
        console.print(f"written to {output}")


def in_blocks(sight: Sight) -> list[str]:
    """Draw a map with characters: two a square of tokens, darker where more pairs of tokens see each other.

    Example:
        >>> from hf_dilated.patterns import DensePattern
        >>> sight = look(DensePattern(window=32), 64, head=0, heads=1, kv_heads=1, is_causal=True)
        >>> in_blocks(sight)[-1].rstrip()[-36:]
        '··░░████████████████████████████████'
    """
    cells = min(CELLS, sight.length)
    return ["".join(2 * _shade(share) for share in row) for row in sight.map(cells)]


def _shade(share: float) -> str:
    if np.isnan(share):
        return " "
    return SHADES[-1] if share == 1 else SHADES[int(np.ceil(share * 3))]


def _check_runs(result: ModelReport, layer: int) -> None:
    """A pattern that never runs is not drawn: one refused layer stops the whole model."""
    for found in result.layers:
        if found.kind == "refused":
            raise UnsupportedError(f"{found.name}: {found.why}")
        if found.kind == "own attention" and found.index == layer:
            raise UnsupportedError(f"{found.name} runs no pattern but {found.why}; choose another --layer")


def _pattern(config: Any, layer: int, backend: str) -> Pattern:
    types = getattr(config, "layer_types", None)
    count = config.num_hidden_layers
    if layer >= count:
        raise ValueError(f"layer: expected 0 to {count - 1}, got {layer}")
    windowed = types is not None and types[layer] in WINDOWED
    return layer_pattern(config, layer, config.sliding_window if windowed else None, backend)


def _costs(sight: Sight, result: ModelReport, config: Any) -> dict[str, tuple[float, float]]:
    """What there is here, and with dense attention: means over the queries that were looked at.

    A query's dense keys are those it could see at most.
    """
    possible, seen = sight.possible, np.array([len(keys) for keys in sight.seen])
    head_size = getattr(config, "head_dim", None) or config.hidden_size // result.heads
    flops = 4 * head_size * result.heads * sight.length / 1e12
    row_mib = 2 * 2 * head_size * result.kv_heads / 2**20  # key and value, two bytes each
    pairs = possible.mean() * sight.length
    found = {
        "keys that a query sees": (seen.mean(), possible.mean()),
        "keys that a query reads, all heads": (sight.read.mean(), possible.mean()),
        "TFLOP of a forward pass": (flops * sight.read.mean(), flops * possible.mean()),
        "MiB of keys and values for the last token": (row_mib * sight.read[-1], row_mib * possible[-1]),
        "pairs that see each other": (pairs * seen.sum() / possible.sum(), pairs),
    }
    return {name: (float(ours), float(dense)) for name, (ours, dense) in found.items()}


def _table(costs: dict[str, tuple[float, float]]) -> Table:
    table = Table("", "here", "dense", "share")
    for name, (ours, dense) in costs.items():
        table.add_row(name, f"{ours:,.4g}", f"{dense:,.4g}", f"{ours / dense:.1%}")
    ours, dense = costs["pairs that see each other"]
    table.title = f"density {ours / dense:.2%} of the pairs of tokens"
    return table


def _draw(sight: Sight, title: str, path: Path) -> None:
    with pictures():
        from matplotlib.figure import Figure
    figure = Figure(figsize=(6, 6), layout="constrained")
    axes = figure.add_subplot()
    cells = min(PIXELS, len(sight.queries))
    extent = (0, sight.length, sight.length, 0)
    image = axes.imshow(sight.map(cells), extent=extent, cmap="viridis", vmin=0, vmax=1, interpolation="nearest")
    axes.set(xlabel="key", ylabel="query", title=title)
    figure.colorbar(image, ax=axes, label="share of the pairs that see each other", shrink=0.8)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=150, format="png")
