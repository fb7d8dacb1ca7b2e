"""`hf-dilated evaluate` on a tiny checkpoint."""

import importlib
import json
import sys
from pathlib import Path

import pytest
from typer.testing import CliRunner

from hf_dilated import patch_checkpoint
from hf_dilated.cli import app
from tests.tiny_checkpoint import TEXT, save_tiny_checkpoint


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = save_tiny_checkpoint(tmp_path_factory.mktemp("tiny"))
    (folder / "text.py").write_text(TEXT)
    return folder


def test_the_command(folder: Path, tmp_path: Path) -> None:
    arguments = ["evaluate", str(folder), "--text", str(folder / "text.py"), "--output", str(tmp_path / "out")]
    arguments += ["--max-length", "256", "--task", "passkey", "--device", "cpu", "--attention", "dense"]
    arguments += ["--attention", "dilated", "--attention", "block_sparse"]
    result = CliRunner().invoke(app, arguments, env={"COLUMNS": "160"})
    assert result.exit_code == 0, result.output
    for words in ("Perplexity by position", "Found, by length", "Short texts", "Time and memory", "block_sparse"):
        assert words in result.output
    report = json.loads((tmp_path / "out" / "report.json").read_text())
    assert report["plan"]["lengths"] == [64, 128, 256]
    assert report["attention"]["dilated"]["segment_lengths"] == [64, 128, 256]
    assert {path.name for path in (tmp_path / "out").iterdir()} >= {"report.md", "perplexity.png", "retrieval.png"}


def test_json_alone(folder: Path, tmp_path: Path) -> None:
    arguments = ["evaluate", str(folder), "--text", str(folder / "text.py"), "--output", str(tmp_path)]
    result = CliRunner().invoke(app, [*arguments, "--part", "short", "--device", "cpu", "--json"])
    assert result.exit_code == 0, result.output
    assert [row["attention"] for row in json.loads(result.stdout)["short"]] == ["dense", "dilated"]


def test_dynamic_positions_are_measured_as_far_as_they_reach(folder: Path, tmp_path: Path) -> None:
    patch_checkpoint(folder, tmp_path / "long", max_position_embeddings=128, rope_scaling="dynamic")
    arguments = ["evaluate", str(tmp_path / "long"), "--text", str(folder / "text.py"), "--output", str(tmp_path)]
    result = CliRunner().invoke(app, [*arguments, "--part", "short", "--device", "cpu", "--json"])
    assert result.exit_code == 0, result.output
    plan = json.loads(result.stdout)["plan"]
    assert (plan["max_length"], plan["trained_length"]) == (128, 64)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--part", "speed"], "parts: unknown speed"),
        (["--task", "chess"], "tasks: unknown chess"),
        (["--attention", "ring_of_fire"], "ring_of_fire"),
    ],
)
def test_bad_options_exit_with_1_and_write_nothing(
    folder: Path, tmp_path: Path, options: list[str], message: str
) -> None:
    arguments = ["evaluate", str(folder), "--text", str(folder / "text.py"), "--output", str(tmp_path / "out")]
    result = CliRunner().invoke(app, [*arguments, "--device", "cpu", *options], env={"COLUMNS": "200"})
    assert result.exit_code == 1, result.output
    assert message in result.output
    assert not (tmp_path / "out").exists()


def test_nothing_is_measured_that_could_not_be_drawn_or_saved(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    measured: list[object] = []
    monkeypatch.setattr(sys.modules["hf_dilated.cli.evaluate"], "measure", lambda *given: measured.append(given))
    (tmp_path / "file").touch()
    arguments = ["evaluate", str(folder), "--text", str(folder / "text.py"), "--device", "cpu", "--output"]
    in_the_way = CliRunner().invoke(app, [*arguments, str(tmp_path / "file")])
    assert in_the_way.exit_code == 1, in_the_way.output
    assert "refused" in in_the_way.output
    monkeypatch.delitem(sys.modules, "hf_dilated.evaluation.plots", raising=False)
    for name in [name for name in sys.modules if name.partition(".")[0] == "matplotlib"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    without = CliRunner().invoke(app, [*arguments, str(tmp_path / "out")])
    assert without.exit_code == 2, without.output
    assert "needs matplotlib" in without.output
    assert not (tmp_path / "out").exists()
    assert not measured


def test_files_are_laid_end_to_end() -> None:
    joined = importlib.import_module("training.library").joined
    texts = {name: name * 4 for name in "abcde"}
    assert joined(texts, 7) == {"a": "aaaabbbb", "c": "ccccdddd"}
    assert joined({"a": "x"}, 7) == {"a": "x"}
