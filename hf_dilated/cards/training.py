"""How a checkpoint was made, as a card tells it."""

import dataclasses
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from hf_dilated.config import ConfigError


@dataclass(frozen=True, kw_only=True)
class Training:
    """What ``training.json`` holds; everything may be left out.

    Args:
        command: The exact command, from a clean checkout.
        data: Every data set: its name on the Hub, or what it is.
        recipe: Settings by name, such as ``{"steps": 400, "tokens": 13107200, "learning rate": 2e-4}``.
        hardware: Name and number of devices.
        seconds: How long it took.
        results: What came out, such as ``{"loss at the end": 1.39}``.

    Example:
        >>> Training(data=["my/texts"], recipe={"tokens": 13107200}, hardware="1 × H100", seconds=140).lines()
        ['data: my/texts', 'tokens: 13,107,200', 'hardware: 1 × H100', 'time: 140 s']
    """

    command: str | None = None
    data: tuple[str, ...] = ()
    recipe: Mapping[str, Any] = field(default_factory=dict)
    hardware: str | None = None
    seconds: float | None = None
    results: Mapping[str, Any] = field(default_factory=dict)

    @classmethod
    def load(cls, path: Path) -> "Training":
        """Read a ``training.json``.

        Raises:
            ConfigError: If it has other keys, or is no JSON.
        """
        try:
            values = json.loads(path.read_text(encoding="utf-8"))
        except ValueError as error:
            raise ConfigError(f"{path}: expected JSON: {error}") from error
        if not isinstance(values, Mapping):
            raise ConfigError(f"{path}: expected a dictionary, got {type(values).__name__}")
        names = {one.name for one in dataclasses.fields(cls)}
        if unknown := sorted(set(values) - names):
            raise ConfigError(f"{path}: unknown {', '.join(unknown)}; known are {', '.join(sorted(names))}")
        data = values.get("data", ())
        return cls(**{**values, "data": (data,) if isinstance(data, str) else tuple(data)})

    def lines(self) -> list[str]:
        """Return one line for each thing that is known."""
        lines = [f"data: {name}" for name in self.data]
        lines += [f"{name}: {_text(value)}" for name, value in self.recipe.items()]
        if self.hardware is not None:
            lines.append(f"hardware: {self.hardware}")
        if self.seconds is not None:
            lines.append(f"time: {self.seconds:,.0f} s")
        lines += [f"{name}: {_text(value)}" for name, value in self.results.items()]
        return [*lines, *([f"`{self.command}`"] if self.command else [])]


def _text(value: Any) -> str:
    return f"{value:,}" if isinstance(value, int) and not isinstance(value, bool) else str(value)
