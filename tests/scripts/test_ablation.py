"""The ablation in small: every variant is there, is tuned, and is read before and after."""

import importlib
import json
from pathlib import Path

import pytest
from typer.testing import CliRunner

from tests.tiny_checkpoint import TEXT, save_tiny_checkpoint

ablation = importlib.import_module("ablation")


def test_variants_are_tuned_and_measured(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ablation, "read_library", lambda: {f"{n}.py": TEXT for n in range(30)})
    monkeypatch.setattr(ablation, "DEPTHS", (0.5,))
    model = save_tiny_checkpoint(tmp_path / "model")
    arguments = ["--output", str(tmp_path / "out"), "--model", str(model), "--device", "cpu", "--max-length", "256"]
    arguments += ["--trained", "64", "--steps", "2", "--rows", "1", "--documents", "1", "--repeats", "1"]
    app = importlib.import_module("typer").Typer()
    app.command()(ablation.main)
    chosen = ["--only", "dense", "--only", "all", "--only", "block_sparse"]
    result = CliRunner().invoke(app, arguments + chosen)
    assert result.exit_code == 0, result.output
    rows = [json.loads(line) for line in (tmp_path / "out" / "ablation.jsonl").read_text().splitlines()]
    assert [row["variant"] for row in rows] == ["dense", "all", "block_sparse"]
    for row, own in zip(rows, ("dense", "dilated", "block_sparse"), strict=True):
        assert [entry["loss"] > 0 for entry in row["log"]] == [True, True]
        assert {found["attention"] for found in row["before"]["short"]} == {own}
        assert {found["attention"] for found in row["after"]["retrieval"]} == {own, "dense"}
        assert row["before"]["perplexity"][-1]["stop"] == 256
        assert (tmp_path / "out" / row["variant"] / "model.safetensors").exists()
    assert rows[0]["before"]["perplexity"] != rows[0]["after"]["perplexity"]
    table = (tmp_path / "out" / "ablation.md").read_text().splitlines()
    assert len(table) == 2 + (2 + 2) + (1 + 3) * 2
    assert CliRunner().invoke(app, [*arguments, "--only", "magic"]).exit_code == 2
