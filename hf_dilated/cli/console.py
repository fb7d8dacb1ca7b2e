"""Where the commands print."""

import warnings
from collections.abc import Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.markup import escape

console = Console()
errors = Console(stderr=True)


@contextmanager
def notes() -> Iterator[None]:
    """Print warnings as lines of their own."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        yield
    for message in dict.fromkeys(str(warning.message) for warning in caught if warning.category is UserWarning):
        errors.print(f"[yellow]note[/] {escape(message)}")
