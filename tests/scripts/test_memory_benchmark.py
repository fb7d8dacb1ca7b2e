"""`scripts/benchmark.py memory | soak` on tiny shapes."""

import json
from pathlib import Path

import benchmark
import pytest
from benchmarking import pooling
from typer.testing import CliRunner


@pytest.mark.timeout(250)
def test_rows_of_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pooling, "jobs", lambda *_: [pooling.Job("varying", 512, True, "cpu", "float32", 2, 16)])
    monkeypatch.setattr(pooling, "CPU_VARIANTS", (pooling.CPU_VARIANTS[0], pooling.CPU_VARIANTS[-1]))
    arguments = ["memory", "--rounds", "5", "--output", str(tmp_path), "--name", "rows"]
    result = CliRunner().invoke(benchmark.app, arguments)
    assert result.exit_code == 0, result.output
    rows = [json.loads(line) for line in (tmp_path / "rows.jsonl").read_text().splitlines()]
    assert [(row["mode"], row["variant"]) for row in rows] == [("step", "torch"), ("step", "levers + full")]
    assert all(len(row["seconds"]) == 5 for row in rows)


@pytest.mark.parametrize("case", ["dilated", "standard", "ring", "varying", "write"])
def test_every_case_runs_in_every_mode(case: str) -> None:
    for variant in (pooling.Variant("torch"), pooling.Variant("full", "full")):
        pooling.prepare(pooling.Job(case, 300, case != "write", "cpu", "float32", 2, 8), variant)()


def test_the_reports_rows_are_measured() -> None:
    found = pooling.jobs("cpu", [4096, 8192, 16384], [1], 8, 64, "float32")
    assert {(job.case, job.length) for job in found} >= set(pooling.REPORT)


def test_soak() -> None:
    result = CliRunner().invoke(benchmark.app, ["soak", "--seconds", "3", "--threads", "2", "--longest", "1024"])
    assert result.exit_code == 0, result.output
    assert "0 wrong, hung: False, live at the end 0 bytes" in result.output
