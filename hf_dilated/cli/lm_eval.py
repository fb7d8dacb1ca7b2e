"""``hf-dilated lm-eval``: the tasks of EleutherAI's lm-evaluation-harness."""

import json
from pathlib import Path
from typing import Annotated, Any

import typer

from hf_dilated.cli.console import DEVICE, Device, TrustRemoteCode, console, errors, refusals


def lm_eval(
    model: Annotated[str, typer.Argument(help="A causal language model: a folder or a name on the Hub.")],
    tasks: Annotated[str, typer.Option(help="Names of tasks of the harness, with commas between them.")],
    attention: Annotated[
        str | None, typer.Option(help="dense, or a backend; by default what the checkpoint holds.")
    ] = None,
    pattern: Annotated[str | None, typer.Option(help="JSON of the backend's pattern.")] = None,
    include_path: Annotated[
        Path | None, typer.Option(help="Folder with tasks of your own.", exists=True, file_okay=False)
    ] = None,
    num_fewshot: Annotated[int | None, typer.Option(help="Examples before each question.", min=0)] = None,
    limit: Annotated[int | None, typer.Option(help="Questions of each task, for a trial.", min=1)] = None,
    batch_size: Annotated[str, typer.Option(help="A number, or auto.")] = "1",
    max_length: Annotated[int | None, typer.Option(help="Longest input in tokens; by default the model's.")] = None,
    device: Device = DEVICE,
    dtype: Annotated[str, typer.Option(help="auto, float32, bfloat16, …")] = "auto",
    output: Annotated[Path | None, typer.Option(help="JSON file for the results.")] = None,
    trust_remote_code: TrustRemoteCode = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print the results as JSON, and nothing else.")] = False,
) -> None:
    r"""Run tasks of the lm-evaluation-harness (needs `pip install "hf_dilated\[lm-eval]"`).

    Exits with 1 if the model or an option is refused, with 2 if the harness is not installed.
    """
    try:
        from lm_eval import simple_evaluate
        from lm_eval.tasks import TaskManager
        from lm_eval.utils import handle_non_serializable, make_table

        from hf_dilated.evaluation.harness import DilatedLM
    except ImportError as error:
        errors.print(f'[bold red]lm-evaluation-harness is missing[/]: pip install "hf_dilated\\[lm-eval]" ({error})')
        raise typer.Exit(2) from error
    with refusals(model, KeyError):
        loaded = DilatedLM(
            model, attention, pattern, device=device, dtype=dtype, batch_size=batch_size, max_length=max_length,
            trust_remote_code=trust_remote_code,
        )  # fmt: skip
        manager = TaskManager(include_path=str(include_path) if include_path else None)
        results: dict[str, Any] | None = simple_evaluate(
            loaded, tasks=tasks.split(","), num_fewshot=num_fewshot, limit=limit, task_manager=manager
        )
    if results is None:  # another rank reports
        return
    text = json.dumps(results, indent=1, default=handle_non_serializable, ensure_ascii=False)
    if output is not None:
        output.parent.mkdir(parents=True, exist_ok=True)
        output.write_text(text + "\n", "utf-8")
    if as_json:
        typer.echo(text)
    else:
        console.print(make_table(results), markup=False, soft_wrap=True)
