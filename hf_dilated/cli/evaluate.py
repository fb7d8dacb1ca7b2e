"""``hf-dilated evaluate``: the same weights with several attentions, side by side."""

from pathlib import Path
from typing import Annotated

import typer
from rich.markup import escape
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from hf_dilated.cli.console import DEVICE, Device, TrustRemoteCode, console, errors, pictures, refusals
from hf_dilated.config import DilatedConfig
from hf_dilated.evaluation.report import Report
from hf_dilated.evaluation.suite import DENSE, PARTS, Evaluation, steps
from hf_dilated.evaluation.suite import attention as running
from hf_dilated.evaluation.suite import evaluate as measure
from hf_dilated.integration.persistence import stored_config
from hf_dilated.integration.reach import reach_of, trained_length
from hf_dilated.tasks import TASKS, Haystack


def evaluate(
    model: Annotated[str, typer.Argument(help="A causal language model: a folder or a name on the Hub.")],
    text: Annotated[list[Path], typer.Option(help="UTF-8 files to read; repeat it.", exists=True, dir_okay=False)],
    output: Annotated[Path, typer.Option(help="Folder for report.json, report.md and the plots.")],
    max_length: Annotated[int | None, typer.Option(help="Longest text in tokens; by default the model's.")] = None,
    trained: Annotated[
        int | None, typer.Option(help="Length that the dense model was made for, if the configuration does not tell.")
    ] = None,
    attention: Annotated[
        list[str] | None, typer.Option(help="dense, or a backend; repeat it. By default dense and the stored one.")
    ] = None,
    part: Annotated[list[str] | None, typer.Option(help=f"Some of {', '.join(PARTS)}; repeat it.")] = None,
    task: Annotated[list[str] | None, typer.Option(help=f"Some of {', '.join(TASKS)}; repeat it.")] = None,
    repeats: Annotated[int, typer.Option(help="Samples of every task, length and depth.", min=1)] = 1,
    device: Device = DEVICE,
    dtype: Annotated[str, typer.Option(help="auto, float32, bfloat16, …")] = "auto",
    trust_remote_code: TrustRemoteCode = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print the report as JSON, and nothing else.")] = False,
) -> None:
    """Measure quality, speed and memory of a model with several attentions.

    Reads the texts with each attention and reports perplexity by position, what is found in long texts, perplexity of
    short texts, and time and memory. Exits with 1 if the model, an option or a text would be refused, with 2 without
    matplotlib.
    """
    with refusals(model, ImportError), pictures():
        texts = {path.name: path.read_text("utf-8") for path in text}
        report = run(
            model, texts, output, max_length=max_length, trained=trained, attentions=attention, parts=part, tasks=task,
            repeats=repeats, device=device, dtype=dtype, trust_remote_code=trust_remote_code,
        )  # fmt: skip
    if as_json:
        typer.echo((output / "report.json").read_text("utf-8"), nl=False)
    else:
        show(report, output)


def run(
    model: str,
    texts: dict[str, str],
    output: Path,
    *,
    max_length: int | None = None,
    trained: int | None = None,
    attentions: list[str] | None = None,
    parts: list[str] | None = None,
    tasks: list[str] | None = None,
    repeats: int = 1,
    device: str = "cpu",
    dtype: str = "auto",
    trust_remote_code: bool = False,
) -> Report:
    """Load, measure, and write ``report.json``, ``report.md`` and the plots to ``output``; options as above.

    Raises:
        ValueError: If an option is missing or malformed, or a text is shorter than two tokens.
        UnsupportedError: If the model would be refused.
        ImportError: If there is no matplotlib.
    """
    import hf_dilated.evaluation.plots  # noqa: F401  (before hours of measuring)

    config = AutoConfig.from_pretrained(model, trust_remote_code=trust_remote_code)
    trained = trained or trained_length(config)
    max_length = max_length or reach_of(config)
    if trained is None or max_length is None:
        raise ValueError("max_length: the configuration does not tell; pass --max-length and --trained")
    plan = Evaluation(
        max_length=max_length,
        trained_length=trained,
        attentions=attentions or (DENSE, stored_config(config).attn_implementation or "dilated"),
        parts=parts or PARTS,
        tasks=tasks or tuple(TASKS),
        repeats=repeats,
    )
    tokenizer = AutoTokenizer.from_pretrained(model, trust_remote_code=trust_remote_code)
    if "dilated" in plan.attentions and stored_config(config).dilated is None:
        config.hf_dilated = DilatedConfig.from_model_config(config, max_length=max_length)
    loaded = AutoModelForCausalLM.from_pretrained(
        model, config=config, dtype=dtype, trust_remote_code=trust_remote_code
    ).to(device)
    documents = {
        name: tokenizer(text, return_tensors="pt", verbose=False).input_ids[0].to(device)
        for name, text in texts.items()
    }
    haystack = Haystack(tokenizer, "\n".join(texts.values()))
    for name in plan.attentions:
        with running(loaded, name):
            pass  # an unknown one is refused before anything is measured or made
    output.mkdir(parents=True, exist_ok=True)
    columns = (TextColumn("{task.description}"), BarColumn(), TextColumn("{task.completed}/{task.total}"))
    with Progress(*columns, TimeElapsedColumn(), console=errors) as progress:
        bar = progress.add_task("evaluate", total=steps(plan))
        report = measure(loaded, tokenizer, documents, haystack, plan, lambda done: progress.advance(bar))
    write(report, output)
    return report


def write(report: Report, output: Path) -> None:
    """Write the report as JSON, Markdown and pictures."""
    from hf_dilated.evaluation.plots import save_plots

    report.save(output / "report.json")
    (output / "report.md").write_text(report.markdown(), "utf-8")
    save_plots(report, output)


def show(report: Report, output: Path) -> None:
    """Print the tables."""
    for table in report.tables():
        shown = Table(title=table.title, title_justify="left")
        for column, name in enumerate(table.header):
            shown.add_column(name, justify="right" if column else "left")
        for row in table.rows:
            shown.add_row(*row)
        console.print(shown)
    console.print(f"Numbers, tables and plots: {escape(str(output))}", soft_wrap=True)
