"""The command `hf-dilated bench`."""

import json
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner, Result

from hf_dilated.cli import app
from hf_dilated.evaluation import bench as module
from tests.tiny_checkpoint import save_tiny_checkpoint

FEW = ("--device", "cpu", "--rounds", "3")


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny_checkpoint(tmp_path_factory.mktemp("bench"))


def run(*arguments: object) -> Result:
    return CliRunner().invoke(app, ["bench", *map(str, arguments)], env={"COLUMNS": "160"})


def test_a_table(model: Path) -> None:
    result = run(model, "--length", "32", "--mode", "decode", *FEW)
    assert result.exit_code == 0, result.output
    assert "dense (again)" in result.stdout
    assert "dilated" in result.stdout


def test_json_and_nothing_else(model: Path, tmp_path: Path) -> None:
    result = run(model, "--mode", "forward", "--output", tmp_path / "new" / "rows.json", "--json", *FEW)
    assert result.exit_code == 0, result.output
    report = json.loads(result.stdout)
    assert report == json.loads((tmp_path / "new" / "rows.json").read_text())
    assert {row["tokens"] for row in report["rows"]} == {64}  # all that the model reads
    assert {row["attention"] for row in report["rows"]} == {"dense", "dense (again)", "dilated"}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--length", "many"), "lengths: expected tokens such as 500,2k,1M"),
        (("--mode", "sleep"), "modes: unknown sleep"),
        (("--attention", "dense", "--attention", "ring_of_fire"), "ring_of_fire"),
        (("--device", "meta"), "times are taken on cpu and cuda, not on meta"),
    ],
)
def test_refusals(model: Path, tmp_path: Path, arguments: tuple[str, ...], message: str) -> None:
    result = run(model, *FEW, "--output", tmp_path / "rows.json", *arguments)
    assert not list(tmp_path.iterdir())
    assert result.exit_code == 1, result.output
    assert isinstance(result.exception, SystemExit), result.exception
    assert message in " ".join(result.stderr.split())
    assert not result.stdout


def test_a_device_that_is_not_there(model: Path) -> None:
    result = run(model, "--device", "abacus")
    assert result.exit_code == 2
    assert "Invalid value for '--device'" in result.stderr


def test_a_model_that_is_not_there(model: Path) -> None:
    assert run(model.parent / "nowhere", *FEW).exit_code == 1


def no_room(model: object, ids: torch.Tensor) -> None:
    raise torch.OutOfMemoryError


def test_nothing_measured_exits_with_1(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "MODES", {"forward": no_room})
    result = run(model, "--mode", "forward", "--json", *FEW)
    assert result.exit_code == 1
    reasons = [(row["attention"], row["reason"]) for row in json.loads(result.stdout)["rows"]]
    assert reasons == [("dense", "out of memory"), ("dilated", "out of memory")]


def test_a_file_that_cannot_be_written_is_found_before_measuring(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def measured(model: object, ids: torch.Tensor) -> None:
        raise AssertionError("measured first")

    monkeypatch.setattr(module, "MODES", {"forward": measured})
    (tmp_path / "file").touch()
    result = run(model, "--mode", "forward", "--output", tmp_path / "file" / "rows.json", *FEW)
    assert result.exit_code == 1
    assert isinstance(result.exception, SystemExit), result.exception
    assert "file" in result.stderr


def test_what_was_measured_is_kept_when_the_rest_fails(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(model: object, ids: torch.Tensor) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(module, "MODES", module.MODES | {"step": interrupted})
    run(model, "--mode", "forward", "--mode", "step", "--output", tmp_path / "rows.json", *FEW)
    rows = json.loads((tmp_path / "rows.json").read_text())["rows"]
    assert [row["mode"] for row in rows] == ["forward"] * 3
    assert all(row["seconds"] for row in rows)
