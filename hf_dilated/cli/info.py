"""``hf-dilated info``: what every layer of a model runs."""

import json
import re
from itertools import groupby
from typing import Annotated

import typer
from rich.markup import escape
from rich.table import Table
from transformers import AutoConfig

from hf_dilated.cli.console import TrustRemoteCode, console, notes, refusals
from hf_dilated.config import BlockSparseConfig, DilatedConfig
from hf_dilated.integration.backends import BACKENDS
from hf_dilated.integration.persistence import stored_config
from hf_dilated.integration.report import LayerReport, ModelReport, keys_per_query, report
from hf_dilated.patterns import DilatedPattern


def info(
    model: Annotated[str, typer.Argument(help="A folder with a config.json, or a model's name on the Hub.")],
    backend: Annotated[
        str | None, typer.Option(help="dilated, block_sparse, …; by default the stored one, else dilated.")
    ] = None,
    max_length: Annotated[
        int | None, typer.Option(help="Choose the pattern for inputs of this many tokens, not the stored one.")
    ] = None,
    trust_remote_code: TrustRemoteCode = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print the report as JSON, and nothing else.")] = False,
) -> None:
    """Show what a backend runs in every layer of a model; reads its config.json alone.

    Exits with 1 if the model, or one of its layers, would be refused.
    """
    with refusals(model, unread="no report on", unread_code=2):
        config = AutoConfig.from_pretrained(model, trust_remote_code=trust_remote_code)
        with notes():
            backend = backend or stored_config(config).attn_implementation or "dilated"
            if max_length is not None and backend in BACKENDS:
                config.hf_dilated = BACKENDS[backend].config_class.from_model_config(config, max_length=max_length)
            result = report(config, backend)
    if as_json:
        typer.echo(json.dumps(result.to_dict(), indent=1))
    else:
        _show(result)
    if not result.runs:
        raise typer.Exit(1)


def _show(result: ModelReport) -> None:
    direction = "causal" if result.is_causal else "in both directions"
    console.print(
        f"[bold]{result.model}[/], {result.heads} query heads, {result.kv_heads} key-value heads, attends {direction}"
    )
    console.print(_layer_table(result))
    for (mode, why), numbers in _memory(result.layers).items():
        console.print(f"memory of layers {_ranges(numbers)}: [bold]{mode}[/], {why}")
    for name in result.unseen:
        console.print(f"not reached by this report: {escape(name)}")
    if any(layer.kind == "pattern" for layer in result.layers):
        origin = "given or stored in config.json" if result.is_stored else "chosen for max_position_embeddings"
        console.print(f"pattern {origin}")
        if isinstance(result.pattern, DilatedConfig):
            console.print(_branch_table(result))
        elif isinstance(result.pattern, BlockSparseConfig):
            console.print(_part_table(result.pattern))
        length = "at any length" if result.is_dense else f"up to {result.dense_length:,} tokens"
        console.print(f"{length} every layer is exactly the dense model's")


def _layer_table(result: ModelReport) -> Table:
    table = Table("layers", "module", "runs", "why")
    for (module, kind, why), names in _grouped(result.layers):
        colour = {"pattern": "green", "refused": "red"}.get(kind, "default")
        table.add_row(_ranges(names), escape(module), f"[{colour}]{kind}[/]", escape(why))
    return table


def _memory(layers: tuple[LayerReport, ...]) -> dict[tuple[str, str], list[int]]:
    """Gather layers whose memory comes from the same pool for the same reason."""
    groups: dict[tuple[str, str], list[int]] = {}
    for layer in layers:
        if layer.memory is not None:
            groups.setdefault((layer.memory.mode, layer.memory.reason), []).append(layer.index)
    return groups


def _grouped(layers: tuple[LayerReport, ...]) -> list[tuple[tuple[str, str, str], list[int]]]:
    """Gather layers that do the same, in the order of their first."""
    groups: dict[tuple[str, str, str], list[int]] = {}
    for layer in layers:
        module = re.sub(r"\d+", "*", layer.name, count=1)
        groups.setdefault((module, layer.kind, layer.why), []).append(layer.index)
    return list(groups.items())


def _ranges(numbers: list[int]) -> str:
    """Write 0, 1, 2, 5 as ``0-2, 5``."""
    runs = [
        [n for _, n in run] for _, run in groupby(enumerate(sorted(set(numbers))), key=lambda pair: pair[1] - pair[0])
    ]
    return ", ".join(str(run[0]) if len(run) == 1 else f"{run[0]}-{run[-1]}" for run in runs)


def _branch_table(result: ModelReport) -> Table:
    config = result.pattern
    length = config.sink_tokens + config.segment_lengths[-1]
    shares = keys_per_query(
        DilatedPattern(config=config),
        length,
        heads=result.heads,
        kv_heads=result.kv_heads,
        is_causal=result.is_causal,
    )
    dense = (length + 1) / 2 if result.is_causal else length
    options = f'overlap="{config.overlap}", offset="{config.offset}", phase="{config.phase}", rotate={config.rotate}'
    table = Table(title=f"mean keys per query at {length:,} tokens\n{options}", show_footer=True)
    table.add_column("branch", "together")
    table.add_column("segment", justify="right")
    table.add_column("rate", justify="right")
    table.add_column("keys", f"{sum(shares):,.0f}", justify="right")
    table.add_column("of dense", f"{sum(shares) / dense:.1%}", justify="right")
    if config.sink_tokens:
        table.add_row("sinks", str(config.sink_tokens), "", f"{shares[0]:,.0f}", f"{shares[0] / dense:.1%}")
    for number, (segment, rate) in enumerate(zip(config.segment_lengths, config.dilation_rates, strict=True), 1):
        share = shares[number]
        table.add_row(str(number), f"{segment:,}", str(rate), f"{share:,.0f}", f"{share / dense:.1%}")
    return table


def _part_table(config: BlockSparseConfig) -> Table:
    """The parts of every layer and group of heads, one column each."""
    names = ("local", "global", "stride", "dilated", "random", "topk")
    table = Table("layers", "heads", *names, "mask", title=f"blocks of {config.block_size} tokens")
    layers = max(1, len(config.layers))
    for layer in range(layers):
        groups = config.parts(layer)
        for number, parts in enumerate(groups, 1):
            where = "all" if layers == 1 else f"{layer}, {layer + layers}, …"
            heads = "all" if len(groups) == 1 else f"group {number} of {len(groups)}"
            counts = [str(getattr(parts, f"{name}_blocks") or "") for name in names]
            table.add_row(where, heads, *counts, "own" if parts.block_mask else "")
    return table
