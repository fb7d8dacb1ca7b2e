"""``hf-dilated bench``: how fast a model is with several attentions, on this machine."""

import json
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from rich.markup import escape
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table
from transformers import AutoConfig, AutoModelForCausalLM

from hf_dilated.cli.console import DEVICE, Device, TrustRemoteCode, console, errors, refusals
from hf_dilated.config import DilatedConfig
from hf_dilated.evaluation.bench import CONTROL, MODES, Bench, Timing, check
from hf_dilated.evaluation.bench import bench as measure
from hf_dilated.evaluation.suite import DENSE, environment
from hf_dilated.integration.persistence import stored_config
from hf_dilated.integration.reach import reach_of
from hf_dilated.timing import parse_lengths

LONGEST = {"cpu": 8192}  # tokens, unless longer ones are asked for; elsewhere as far as the model reads


def bench(
    model: Annotated[str, typer.Argument(help="A causal language model: a folder or a name on the Hub.")],
    length: Annotated[
        str, typer.Option(help="Tokens, such as 2k,32k; by default doubling from 2k to what the model reads.")
    ] = "",
    attention: Annotated[
        list[str] | None, typer.Option(help="dense, or a backend; repeat it. By default dense and the stored one.")
    ] = None,
    mode: Annotated[
        list[str] | None, typer.Option(help=f"Some of {', '.join(MODES)}; repeat it. By default the first three.")
    ] = None,
    rounds: Annotated[int, typer.Option(help="Samples of each attention.", min=3)] = 7,
    seconds: Annotated[float, typer.Option(help="Budget; what does not fit into it is left out.", min=1)] = 600,
    device: Device = DEVICE,
    dtype: Annotated[str, typer.Option(help="auto, float32, bfloat16, …")] = "auto",
    output: Annotated[Path | None, typer.Option(help="JSON file for the rows, as they come.", dir_okay=False)] = None,
    trust_remote_code: TrustRemoteCode = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print the rows as JSON, and nothing else.")] = False,
) -> None:
    """Time a model's forward pass, training step and decoding with dense and sparse attention, side by side.

    Attentions take turns in random order, the first one twice: its second turn shows the noise. Exits with 1 if the
    model or an option is refused, or nothing was measured.
    """
    with refusals(model, ImportError):
        result = run(
            model, output, length=length, attentions=attention, modes=mode, rounds=rounds, seconds=seconds,
            device=device, dtype=dtype, trust_remote_code=trust_remote_code,
        )  # fmt: skip
    if as_json:
        typer.echo(_json(model, *result))
    else:
        _show(model, *result)
    if not any(row.seconds for row in result[1]):
        raise typer.Exit(1)


def run(
    model: str,
    output: Path | None,
    *,
    length: str,
    attentions: list[str] | None,
    modes: list[str] | None,
    rounds: int,
    seconds: float,
    device: str,
    dtype: str,
    trust_remote_code: bool,
) -> tuple[dict[str, str], list[Timing]]:
    """Load and measure; options as above. What was measured is written at once.

    Raises:
        ValueError: If an option is malformed.
        OSError: If ``output`` cannot be written; nothing was measured then.
        UnsupportedError: If the model would be refused.
    """
    config = AutoConfig.from_pretrained(model, trust_remote_code=trust_remote_code)
    lengths = parse_lengths(length) if length else _lengths(config, device)
    chosen: dict[str, Any] = {"modes": modes} if modes else {}
    attentions = attentions or [DENSE, stored_config(config).attn_implementation or "dilated"]
    plan = Bench(lengths=lengths, attentions=attentions, rounds=rounds, seconds=seconds, **chosen)
    check(config, plan, torch.device(device))
    if "dilated" in plan.attentions and stored_config(config).dilated is None:
        config.hf_dilated = DilatedConfig.from_model_config(config, max_length=max(lengths))
    loaded = AutoModelForCausalLM.from_pretrained(
        model, config=config, dtype=dtype, trust_remote_code=trust_remote_code
    ).to(device)
    where = environment(loaded)
    columns = (TextColumn("{task.description}"), BarColumn(), TextColumn("{task.completed}/{task.total}"))
    with Progress(*columns, TimeElapsedColumn(), console=errors, transient=True) as progress:
        bar = progress.add_task("bench", total=len(plan.lengths) * len(plan.modes))

        def advance(rows: list[Timing]) -> None:
            if output is not None:
                output.parent.mkdir(parents=True, exist_ok=True)
                output.write_text(_json(model, where, rows) + "\n", "utf-8")
            done = list(dict.fromkeys(f"{row.mode}, {row.tokens:,} tokens" for row in rows))
            progress.update(bar, completed=len(done), description=done[-1] if done else "bench")

        return where, measure(loaded, plan, advance)


def _lengths(config: Any, device: str) -> list[int]:
    reach = reach_of(config)
    if reach is None:
        raise ValueError("length: the configuration does not tell how far the model reads; pass --length")
    longest = min(reach, LONGEST.get(device, reach))
    return sorted({min(2048 << step, longest) for step in range(longest.bit_length())})


def _json(model: str, environment: dict[str, str], rows: list[Timing]) -> str:
    values = {"model": model, "environment": environment, "rows": [row.to_dict() for row in rows]}
    return json.dumps(values, indent=1)


def _show(model: str, environment: dict[str, str], rows: list[Timing]) -> None:
    where = ", ".join(f"{name} {value}" for name, value in environment.items())
    table = Table("mode")
    for name in ("tokens", "attention", "ms", "× first", "95 %", "peak, MiB"):
        table.add_column(name, justify="left" if name == "attention" else "right", no_wrap=name != "95 %")
    for index, row in enumerate(rows):
        last = index + 1 == len(rows) or (rows[index + 1].mode, rows[index + 1].tokens) != (row.mode, row.tokens)
        table.add_row(row.mode, f"{row.tokens:,}", escape(row.attention), *_cells(row), end_section=last)
    console.print(f"{escape(model)}; {escape(where)}", soft_wrap=True)
    console.print(table)
    console.print(f"medians;{CONTROL}: the same measured twice, which shows the noise", markup=False, soft_wrap=True)


def _cells(row: Timing) -> list[str]:
    if row.median is None:
        return ["–", "", escape(row.reason or ""), ""]
    ratio, low, high = row.speedup or (1.0, 1.0, 1.0)
    interval = "" if row.speedup is None else f"{low:.2f}–{high:.2f}"
    peak = "" if row.peak_bytes is None else f"{row.peak_bytes / 2**20:,.1f}"
    return [f"{1e3 * row.median:,.2f}", f"{ratio:.2f}", interval, peak]
