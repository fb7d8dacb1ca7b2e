"""Steps that leave a stamp when they are finished, so that the same command goes on where it was stopped."""

import json
import shutil
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import typer

STAMPS = "steps"


@dataclass(frozen=True, kw_only=True)
class Step:
    """One step.

    Args:
        name: Its stamp is ``steps/name.json``.
        make: Does it.
        options: What decides what comes out, as plain JSON values; a finished step is kept for the same ones only.
        replaces: Files and folders that must not be there from before; deleted first.
        resumes: Whether ``make`` goes on with what an unfinished attempt has left.
    """

    name: str
    make: Callable[[], None]
    options: dict[str, Any]
    replaces: Sequence[Path] = ()
    resumes: bool = False


def take(steps: Sequence[Step], output: Path) -> None:
    """Take every step that is not finished, in order; what is made again is made again to the end.

    Args:
        steps: The steps.
        output: Folder of everything that they make, and of their stamps.

    Raises:
        ValueError: Before anything is done, as :func:`check`.
    """
    check(steps, output)
    stamps = [_stamp(step, output) for step in steps]
    for number, (step, stamp) in enumerate(zip(steps, stamps, strict=True), 1):
        title = f"== {number} of {len(steps)}: {step.name}"
        if _is_finished(stamp):
            typer.echo(f"{title}: finished before")
            continue
        typer.echo(title)
        if not (step.resumes and stamp.exists()):
            for path in step.replaces:
                _remove(path)
        for later in stamps[number:]:
            _remove(later)
        save(stamp, {"is_finished": False, "options": step.options})
        started = time.perf_counter()
        step.make()
        save(stamp, {"is_finished": True, "options": step.options})
        typer.echo(f"{title}: {time.perf_counter() - started:.0f} s")


def check(steps: Sequence[Step], output: Path) -> None:
    """Check that the steps can be taken, without doing anything.

    Raises:
        ValueError: If the folder holds other things, or a step had other options.
    """
    if output.exists() and not (output / STAMPS).is_dir() and any(output.iterdir()):
        raise ValueError(f"{output}: holds other things; choose a new folder with --output")
    for step in steps:
        stamp = _stamp(step, output)
        if stamp.exists() and (step.resumes or _is_finished(stamp)):
            _check_options(step, stamp)


def made_with(steps: Sequence[Step], output: Path) -> dict[str, dict[str, Any]]:
    """Return the options of the steps that are finished, by name."""
    stamps = {step.name: _stamp(step, output) for step in steps}
    return {name: json.loads(path.read_text("utf-8"))["options"] for name, path in stamps.items() if _is_finished(path)}


def save(path: Path, values: dict[str, Any]) -> None:
    """Write JSON, whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_suffix(".unfinished")
    unfinished.write_text(json.dumps(values, indent=1, ensure_ascii=False) + "\n", "utf-8")
    unfinished.replace(path)


def _stamp(step: Step, output: Path) -> Path:
    return output / STAMPS / f"{step.name}.json"


def _is_finished(stamp: Path) -> bool:
    return stamp.exists() and json.loads(stamp.read_text("utf-8"))["is_finished"]


def _check_options(step: Step, stamp: Path) -> None:
    before = json.loads(stamp.read_text("utf-8"))["options"]
    if changed := [name for name in step.options if before.get(name) != step.options[name]]:
        what = ", ".join(f"{name} was {before.get(name)!r} and is {step.options[name]!r}" for name in changed)
        raise ValueError(f"{step.name}: {what}; remove {stamp} to take this step and all later ones again")


def _remove(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)
