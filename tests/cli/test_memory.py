"""The commands `hf-dilated memory` and `hf-dilated profile`."""

import json
from collections.abc import Iterator
from pathlib import Path

import pytest
from typer.testing import CliRunner, Result

from hf_dilated import DilatedConfig
from hf_dilated.cli import app
from hf_dilated.memory.profile import current_profile
from tests.tiny_models import tiny_model


@pytest.fixture
def profile(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    monkeypatch.setenv("HF_DILATED_PROFILE", str(tmp_path / "profile.json"))
    current_profile.cache_clear()
    yield tmp_path / "profile.json"
    current_profile.cache_clear()


@pytest.fixture
def model(tmp_path: Path) -> Path:
    tiny = tiny_model("llama", "dilated")
    tiny.config.hf_dilated = DilatedConfig(segment_lengths=(8, 64, 256), dilation_rates=(1, 2, 4))
    tiny.save_pretrained(tmp_path / "model")
    return tmp_path / "model"


def run(*arguments: object) -> Result:
    return CliRunner().invoke(app, [str(argument) for argument in arguments], env={"COLUMNS": "160"})


@pytest.mark.parametrize("train", ["--train", "--no-train"])
def test_memory_draws_a_run(model: Path, tmp_path: Path, train: str, profile: Path) -> None:
    picture = tmp_path / "pictures" / "memory.png"
    result = run("memory", model, "--length", 200, train, "--output", picture)
    assert result.exit_code == 0, result.output
    assert "output" in result.output
    assert "100%" in result.output
    assert picture.stat().st_size > 1000
    counted = run("memory", model, "--length", 200, train, "--output", picture, "--json")
    assert json.loads(counted.stdout)["peak_bytes"] > 0


def test_memory_of_what_is_too_short(model: Path, profile: Path) -> None:
    result = run("memory", model, "--length", 8)
    assert result.exit_code == 1
    assert "longer --length" in result.output


def test_memory_of_nothing(tmp_path: Path) -> None:
    assert run("memory", tmp_path / "nowhere").exit_code == 1


def test_profile_measures_and_records_and_is_removed(model: Path, profile: Path) -> None:
    result = run("profile", model, "--lengths", "64,128", "--rounds", 3, "--heads", 2, "--head-dim", 8, "--json")
    assert result.exit_code == 0, result.output
    stored = json.loads(profile.read_text())
    assert json.loads(result.stdout) == stored["measurements"]
    assert {(m["length"], m["kind"], m["mode"]) for m in stored["measurements"]} == {
        (n, kind, mode) for n in (64, 128) for kind in ("forward", "step") for mode in ("lightweight", "full")
    }
    (plan,) = stored["plans"].values()
    assert plan
    assert plan == sorted(plan, reverse=True)
    assert "tokens" in run("info", model).output
    assert run("profile", "--remove").exit_code == 0
    assert not profile.exists()
    assert run("profile", "--remove").exit_code == 0


@pytest.mark.parametrize("lengths", ["many", "0,5"])
def test_bad_lengths(lengths: str, profile: Path) -> None:
    result = run("profile", "--lengths", lengths)
    assert result.exit_code == 2
    assert not profile.exists()
