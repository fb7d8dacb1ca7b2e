"""Where the commands print, and how they stop."""

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Annotated, NoReturn

import torch
import typer
from huggingface_hub.errors import StrictDataclassError
from rich.console import Console
from rich.markup import escape

from hf_dilated.config import ConfigError
from hf_dilated.integration.report import ReportError
from hf_dilated.integration.support import UnsupportedError

console = Console()
errors = Console(stderr=True)

TrustRemoteCode = Annotated[
    bool, typer.Option("--trust-remote-code", help="Run model code that the checkpoint brings.")
]


def _usable(name: str) -> str:
    """Take the name of a device that is there."""
    try:
        torch.empty(0, device=name)
    except (RuntimeError, AssertionError) as error:
        raise typer.BadParameter(str(error).splitlines()[0]) from error
    return name


Device = Annotated[str, typer.Option(help="cpu, cuda, …", callback=_usable)]
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


@contextmanager
def notes() -> Iterator[None]:
    """Print warnings as lines of their own."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        yield
    for message in dict.fromkeys(str(warning.message) for warning in caught if warning.category is UserWarning):
        errors.print(f"[yellow]note[/] {escape(message)}")


@contextmanager
def refusals(
    subject: str = "", *also: type[Exception], unread: str = "refused", unread_code: int = 1
) -> Iterator[None]:
    """Print what is wrong with a model or an option as a line of its own, and exit.

    Args:
        subject: What is refused.
        also: Further errors that are expected.
        unread: The first words where it cannot be read or run at all, so that this package has no say.
        unread_code: The exit code in that case; what this package refuses exits with 1.
    """
    expected: tuple[type[Exception], ...] = (ReportError, StrictDataclassError, ValueError, OSError, *also)
    try:
        yield
    except (UnsupportedError, ConfigError) as error:
        _stop("refused", subject, error, 1)
    except expected as error:
        _stop(unread, subject, error, unread_code)


@contextmanager
def pictures() -> Iterator[None]:
    """Exit with 2 if matplotlib cannot be imported."""
    try:
        yield
    except ImportError as error:
        if (error.name or "").partition(".")[0] != "matplotlib":
            raise
        errors.print("[bold red]no picture[/]: needs matplotlib; `pip install hf_dilated\\[eval]`")
        raise typer.Exit(2) from error


def _stop(label: str, subject: str, error: Exception, code: int) -> NoReturn:
    message = str(error).replace("the argument `trust_remote_code=True`", "--trust-remote-code")
    errors.print(f"[bold red]{label}[/] {escape(f'{subject}: {message}' if subject else message)}")
    raise typer.Exit(code) from error
