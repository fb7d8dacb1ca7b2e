"""``hf-dilated patch`` and ``hf-dilated unpatch``."""

import json
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.markup import escape
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TransferSpeedColumn
from rich.table import Table

from hf_dilated.cli.console import console, errors, notes, refusals
from hf_dilated.patching import CheckpointPlan, PatchError, plan_patch, plan_unpatch

Source = Annotated[str, typer.Argument(help="Folder of a checkpoint, or a model's name on the Hub.")]
Destination = Annotated[Path, typer.Argument(help="Folder to make; it must not exist.")]
Copy = Annotated[bool, typer.Option("--copy", help="Copy weights also where they could be hard links.")]
DryRun = Annotated[bool, typer.Option("--dry-run", help="Verify everything, show the plan, and write nothing.")]
AsJson = Annotated[bool, typer.Option("--json", help="Print the plan as JSON, once it is done.")]


def patch(
    source: Source,
    destination: Destination,
    backend: Annotated[str | None, typer.Option(help="Backend; by default the pattern's own, or dilated.")] = None,
    attention: Annotated[
        str | None, typer.Option(help="Pattern as JSON, or a JSON file; by default the one that suits the length.")
    ] = None,
    max_position_embeddings: Annotated[
        int | None, typer.Option("--max-position-embeddings", "--length", help="Longest input in tokens, to extend it.")
    ] = None,
    rope_scaling: Annotated[
        str | None, typer.Option(help="yarn (default), linear, dynamic, or parameters as JSON or a JSON file.")
    ] = None,
    remote_code: Annotated[
        bool, typer.Option("--remote-code", help="Carry the code: trust_remote_code=True replaces the import.")
    ] = False,
    copy: Copy = False,
    revision: Annotated[str | None, typer.Option(help="Branch, tag or commit on the Hub.")] = None,
    offline: Annotated[bool, typer.Option("--offline", help="Take a model of the Hub from the local cache.")] = False,
    dry_run: DryRun = False,
    as_json: AsJson = False,
) -> None:
    """Write a copy of a checkpoint that selects its backend by itself.

    Weights are linked or streamed, never loaded. Exits with 1 if the checkpoint or an option is refused.
    """
    with refusals(), notes():
        plan = plan_patch(
            source,
            destination,
            backend=backend,
            attention=None if attention is None else _json("attention", attention),
            max_position_embeddings=max_position_embeddings,
            rope_scaling=_scaling(rope_scaling),
            remote_code=remote_code,
            link=not copy,
            revision=revision,
            local_files_only=offline,
        )
        _run(plan, dry_run, as_json)
    if not (dry_run or as_json):
        console.print("load it with\n")
        console.print(plan.load_statement, markup=False, highlight=False)


def unpatch(
    source: Source,
    destination: Destination,
    keep_rope: Annotated[
        bool, typer.Option("--keep-rope", help="Keep the longer reach, as weights that were trained with it need it.")
    ] = False,
    copy: Copy = False,
    dry_run: DryRun = False,
    as_json: AsJson = False,
) -> None:
    """Write a copy of a patched checkpoint that is the dense model again."""
    with refusals(), notes():
        _run(plan_unpatch(source, destination, keep_rope=keep_rope, link=not copy), dry_run, as_json)


def _run(plan: CheckpointPlan, dry_run: bool, as_json: bool) -> None:
    if not as_json:
        console.print(_table(plan))
    if not dry_run:
        _execute(plan)
    if as_json:  # a program that reads it may take what it says for done
        typer.echo(json.dumps(plan.to_dict(), indent=2))


def _execute(plan: CheckpointPlan) -> None:
    columns = TextColumn("{task.description}"), BarColumn(), DownloadColumn(), TransferSpeedColumn()
    with Progress(*columns, console=errors, transient=True) as bars:
        task = bars.add_task("weights", total=plan.weights.total_bytes)
        done: dict[str, int] = {}

        def advance(name: str, size: int) -> None:
            done[name] = size
            bars.update(task, description=name, completed=sum(done.values()))

        plan.execute(advance)


def _table(plan: CheckpointPlan) -> Table:
    table = Table(show_header=False)
    for name, value in plan.to_dict().items():
        text = value if isinstance(value, str) else json.dumps(value)
        table.add_row(name.replace("_", " "), escape(text))
    return table


def _scaling(text: str | None) -> Any:
    if text is None or not (text.lstrip().startswith("{") or text.endswith(".json")):
        return text
    return _json("rope_scaling", text)


def _json(option: str, text: str) -> Any:
    try:
        return json.loads(text if text.lstrip().startswith("{") else Path(text).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise PatchError(f"{option}: expected JSON or the name of a JSON file: {error}") from error
