"""The command `hf-dilated bench`."""

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner, Result

from hf_dilated.cli import app
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
    ],
)
def test_refusals(model: Path, arguments: tuple[str, ...], message: str) -> None:
    result = run(model, *arguments, *FEW)
    assert result.exit_code == 1, result.output
    assert isinstance(result.exception, SystemExit), result.exception
    assert message in " ".join(result.stderr.split())
    assert not result.stdout


def test_a_device_that_is_not_there(model: Path) -> None:
    result = run(model, "--device", "abacus")
    assert result.exit_code == 2
    assert "Invalid value for '--device'" in result.stderr


def test_nothing_measured_exits_with_1(model: Path) -> None:
    assert run(model.parent / "nowhere", *FEW).exit_code == 1
