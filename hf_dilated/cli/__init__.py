"""The command ``hf-dilated``: one module a sub-command."""

from typing import Annotated

import typer

import hf_dilated
from hf_dilated.cli.bench import bench
from hf_dilated.cli.card import card
from hf_dilated.cli.console import console
from hf_dilated.cli.evaluate import evaluate
from hf_dilated.cli.info import info
from hf_dilated.cli.lm_eval import lm_eval
from hf_dilated.cli.memory import memory
from hf_dilated.cli.patch import patch, unpatch
from hf_dilated.cli.profile import profile
from hf_dilated.cli.show import show

app = typer.Typer(help="Long-context attention for the Transformers models you already have.", no_args_is_help=True)


@app.callback(invoke_without_command=True)
def main(version: Annotated[bool, typer.Option("--version", help="Print the version and exit.")] = False) -> None:
    """Long-context attention for the Transformers models you already have."""
    if version:
        console.print(f"hf_dilated {hf_dilated.__version__}")
        raise typer.Exit


app.command()(info)
app.command()(show)
app.command()(memory)
app.command()(patch)
app.command()(unpatch)
app.command()(profile)
app.command()(evaluate)
app.command("lm-eval")(lm_eval)
app.command()(bench)
app.command()(card)
