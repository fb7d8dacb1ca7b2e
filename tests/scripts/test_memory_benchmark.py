"""`scripts/benchmark.py memory | soak` on tiny shapes."""

import json
import mmap
from pathlib import Path

import benchmark
import pytest
from benchmarking import pooling
from typer.testing import CliRunner


@pytest.mark.timeout(250)
def test_rows_of_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pooling, "jobs", lambda *_: [pooling.Job("varying", 512, True, "cpu", "float32", 2, 16)])
    monkeypatch.setattr(pooling, "CPU_VARIANTS", (pooling.CPU_VARIANTS[0], pooling.CPU_VARIANTS[-1]))
    arguments = ["memory", "--rounds", "5", "--heads", "2", "--output", str(tmp_path), "--name", "rows"]
    result = CliRunner().invoke(benchmark.app, arguments)
    assert result.exit_code == 0, result.output
    rows = [json.loads(line) for line in (tmp_path / "rows.jsonl").read_text().splitlines()]
    assert [(row["mode"], row["variant"]) for row in rows] == [("step", "torch"), ("step", "levers + full")]
    assert all(len(row["seconds"]) == len(row["user"]) == len(row["system"]) == 5 for row in rows)
    assert all(row["page_faults"] >= 0 for row in rows)


def test_what_a_pool_can_bring_is_bounded_by_the_kernels_time() -> None:
    measured = pooling.Measured([pooling.Sample(9.0, 1.5, 0.5, 9.0)] * 3, None)
    assert measured.kernel_share() == 0.25
    assert measured.bound() == 2 / 1.5
    assert measured.median("faults") == 9


def test_samples_count_faults() -> None:
    """Fresh pages are faults; the same memory again is not."""
    size = 64 * mmap.PAGESIZE
    fresh = pooling._sample(lambda: mmap.mmap(-1, size).write(b"1" * size), 4)
    assert fresh.faults >= 1
    kept = bytearray(size)
    assert pooling._sample(lambda: kept.__setitem__(0, 1), 100).faults < fresh.faults


@pytest.mark.parametrize("case", ["dilated", "standard", "ring", "varying", "write"])
def test_every_case_runs_in_every_mode(case: str) -> None:
    for variant in (pooling.Variant("torch"), pooling.Variant("full", "full")):
        pooling.prepare(pooling.Job(case, 300, case != "write", "cpu", "float32", 2, 8), variant)()


def test_the_reports_rows_are_measured() -> None:
    found = pooling.jobs("cpu", [4096, 8192, 16384], [1], [32, 8], 64, "float32")
    assert {(job.case, job.length) for job in found if job.heads == 8} >= set(pooling.REPORT)
    assert {(job.case, job.length) for job in found if job.heads == 32} == {
        ("dilated", 8192), ("dilated", 16384), ("varying", 8192),
    }  # fmt: skip
    assert {len(job.variants(8)) for job in found} == {6, 3}


def test_soak() -> None:
    result = CliRunner().invoke(benchmark.app, ["soak", "--seconds", "3", "--threads", "2", "--longest", "1024"])
    assert result.exit_code == 0, result.output
    assert "0 wrong, hung: False, live at the end 0 bytes" in result.output
