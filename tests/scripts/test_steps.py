"""Steps: in order, once, and again from where something changed."""

import importlib
import json
from functools import partial
from pathlib import Path
from typing import Any

import pytest

steps = importlib.import_module("training.steps")


@pytest.fixture
def taken() -> list[str]:
    return []


def plan(taken: list[str], output: Path, fails: str = "", **options: Any) -> list[Any]:
    def make(name: str) -> None:
        taken.append(name)
        output.joinpath(name).mkdir(exist_ok=name == "resumes")
        if name == fails:
            raise OSError(name)
        output.joinpath(name, "made").write_text(name)

    return [
        steps.Step(
            name=name,
            make=partial(make, name),
            options={"size": options.get(name, 1)},
            replaces=[output / name],
            resumes=name == "resumes",
        )
        for name in ("first", "resumes", "last")
    ]


def test_a_step_is_taken_once(taken: list[str], tmp_path: Path) -> None:
    for _ in range(2):
        steps.take(plan(taken, tmp_path), tmp_path)
    assert taken == ["first", "resumes", "last"]


@pytest.mark.parametrize("name", ["first", "resumes", "last"])
def test_what_failed_is_taken_again(taken: list[str], tmp_path: Path, name: str) -> None:
    with pytest.raises(OSError, match=name):
        steps.take(plan(taken, tmp_path, fails=name), tmp_path)
    (tmp_path / name / "left").touch()
    steps.take(plan(taken, tmp_path), tmp_path)
    assert sorted(taken) == sorted(["first", "resumes", "last", name])
    assert (tmp_path / name / "left").exists() == (name == "resumes")


def test_a_removed_stamp_takes_the_step_and_all_later_ones_again(taken: list[str], tmp_path: Path) -> None:
    steps.take(plan(taken, tmp_path), tmp_path)
    (tmp_path / "steps" / "resumes.json").unlink()
    (tmp_path / "resumes" / "left").touch()
    steps.take(plan(taken, tmp_path, resumes=2), tmp_path)
    assert taken == ["first", "resumes", "last", "resumes", "last"]
    assert not (tmp_path / "resumes" / "left").exists()
    assert json.loads((tmp_path / "steps" / "resumes.json").read_text())["options"] == {"size": 2}


def test_other_options_are_refused_before_anything_is_done(taken: list[str], tmp_path: Path) -> None:
    steps.take(plan(taken, tmp_path), tmp_path)
    (tmp_path / "steps" / "first.json").unlink()
    with pytest.raises(ValueError, match=r"last: size was 1 and is 2; remove .*last\.json"):
        steps.take(plan(taken, tmp_path, last=2), tmp_path)
    assert taken == ["first", "resumes", "last"]


def test_unfinished_steps_may_have_other_options_unless_they_resume(taken: list[str], tmp_path: Path) -> None:
    with pytest.raises(OSError, match="resumes"):
        steps.take(plan(taken, tmp_path, fails="resumes"), tmp_path)
    with pytest.raises(ValueError, match="resumes: size was 1 and is 2"):
        steps.take(plan(taken, tmp_path, resumes=2), tmp_path)
    with pytest.raises(OSError, match="last"):
        steps.take(plan(taken, tmp_path, fails="last"), tmp_path)
    steps.take(plan(taken, tmp_path, last=2), tmp_path)
    assert taken[-1] == "last"


def test_folders_of_others_are_refused(taken: list[str], tmp_path: Path) -> None:
    (tmp_path / "first").mkdir()
    with pytest.raises(ValueError, match="holds other things"):
        steps.take(plan(taken, tmp_path), tmp_path)
    assert (tmp_path / "first").exists()
    assert not taken
