"""``hf-dilated card``: the model card of a checkpoint."""

from pathlib import Path
from typing import Annotated

import typer
from rich.markup import escape

from hf_dilated.cards import write_card
from hf_dilated.cli.console import TrustRemoteCode, console, refusals


def card(
    folder: Annotated[Path, typer.Argument(help="Folder of a checkpoint that selects a backend.", file_okay=False)],
    evaluation: Annotated[
        Path | None, typer.Option(help="report.json of `hf-dilated evaluate`.", exists=True, dir_okay=False)
    ] = None,
    training: Annotated[
        Path | None, typer.Option(help="training.json: data, recipe, hardware.", exists=True, dir_okay=False)
    ] = None,
    name: Annotated[str | None, typer.Option(help="Name on the Hub, user/model; by default the folder's.")] = None,
    base_model: Annotated[str | None, typer.Option(help="Name on the Hub of the model it was made from.")] = None,
    license: Annotated[str | None, typer.Option(help="Licence, as the Hub knows it, such as apache-2.0.")] = None,
    language: Annotated[list[str] | None, typer.Option(help="Language codes; repeat it.")] = None,
    limit: Annotated[list[str] | None, typer.Option(help="What else a reader must know; repeat it.")] = None,
    trust_remote_code: TrustRemoteCode = False,
) -> None:
    """Write README.md: metadata, backend and exact pattern, how to load it, training, evaluation, limits.

    Exits with 1 if the folder holds no backend, has a card already, or the evaluation is another pattern's.
    """
    with refusals():
        path = write_card(
            folder,
            evaluation=evaluation,
            training=training,
            name=name,
            base_model=base_model,
            license=license,
            language=language or None,
            limits=limit or (),
            trust_remote_code=trust_remote_code,
        )
    upload = escape(f"hf upload {name or 'user/model'} {folder}")
    console.print(f"{escape(str(path))}; publish the folder with `{upload}`", soft_wrap=True)
