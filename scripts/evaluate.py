"""Evaluate a checkpoint on files of Python's standard library that the shipped model has never seen.

    python scripts/evaluate.py --model outputs/long --output outputs/evaluation
    python scripts/evaluate.py --model outputs/long --output outputs/evaluation --max-length 32768 --device cuda

It is `hf-dilated evaluate` with the texts chosen: held-out files laid end to end, in order of their paths, into
documents of the greatest length. docs/evaluation.md explains the numbers.
"""

from pathlib import Path
from typing import Annotated

import torch
import typer
from train_base import is_held_out, read_library
from training.library import CHARACTERS_PER_TOKEN, joined

from hf_dilated.cli.console import pictures, refusals
from hf_dilated.cli.evaluate import run, show
from hf_dilated.evaluation.suite import PARTS
from hf_dilated.tasks import TASKS


def main(
    model: Annotated[str, typer.Option(help="A causal language model: a folder or a name on the Hub.")],
    output: Annotated[Path, typer.Option(help="Folder for report.json, report.md and the plots.")],
    documents: Annotated[int, typer.Option(help="How many to read.", min=1)] = 4,
    max_length: Annotated[int, typer.Option(help="Longest text in tokens.", min=2)] = 16384,
    attention: Annotated[list[str] | None, typer.Option(help="dense, or a backend; repeat it.")] = None,
    part: Annotated[list[str] | None, typer.Option(help=f"Some of {', '.join(PARTS)}; repeat it.")] = None,
    task: Annotated[list[str] | None, typer.Option(help=f"Some of {', '.join(TASKS)}; repeat it.")] = None,
    repeats: Annotated[int, typer.Option(help="Samples of every task, length and depth.", min=1)] = 1,
    device: Annotated[str, typer.Option(help="cpu, cuda, …")] = "cuda" if torch.cuda.is_available() else "cpu",
    dtype: Annotated[str, typer.Option(help="auto, float32, bfloat16, …")] = "auto",
) -> None:
    """Evaluate a checkpoint on held-out files of the standard library."""
    held_out = {path: text for path, text in read_library().items() if is_held_out(path)}
    chosen = dict(list(joined(held_out, max_length * CHARACTERS_PER_TOKEN).items())[:documents])
    with refusals(model, ImportError), pictures():
        report = run(
            model, chosen, output, max_length=max_length, attentions=attention, parts=part, tasks=task, repeats=repeats,
            device=device, dtype=dtype,
        )  # fmt: skip
    show(report, output)


if __name__ == "__main__":
    typer.run(main)
