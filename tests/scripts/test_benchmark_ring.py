"""The ring benchmark checks, measures and writes rows, in two processes."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from benchmarking.ring import RingCase
from benchmarking.ring_traffic import bytes_of, run_traffic

ROOT = Path(__file__).parents[2]


@pytest.mark.timeout(120)
def test_rows_of_two_processes(tmp_path: Path) -> None:
    sizes = ["--lengths", "256", "--heads", "2", "--kv-heads", "1", "--head-dim", "8", "--rounds", "5"]
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--standalone"]
    command += [
        "scripts/benchmark.py",
        "ring",
        *sizes,
        "--transports",
        "gather,rows,symmetric",
        "--output",
        str(tmp_path),
    ]
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=110)
    assert done.returncode == 0, done.stderr[-2000:]
    rows = [json.loads(line) for path in tmp_path.glob("*.jsonl") for line in path.read_text().splitlines()]
    alone = {"one process", "one process (again)", "one process, torch"}
    assert {row["variant"] for row in rows} == alone | {"ring gather", "ring rows"}
    assert all(row["median"] > 0 and len(row["seconds"]) == 5 for row in rows)
    assert {row["mode"] for row in rows} == {"forward", "forward+backward"}
    assert "not available: symmetric" in done.stdout
    for row in (row for row in rows if row["bytes_sent"] is not None):  # of rank 0
        counted = bytes_of(RingCase(**row["case"]), 2, 0, row["variant"].removeprefix("ring "))
        assert row["bytes_sent"] == (counted[0] if row["mode"] == "forward" else sum(counted)) > 0


def test_patterns_send_less_than_dense_attention(tmp_path: Path) -> None:
    shape = {"device": "cpu", "dtype": "bfloat16", "heads": 8, "kv_heads": 2, "head_dim": 16, "length": 8192}
    cases = [RingCase(**shape, documents="one", pattern=pattern) for pattern in ("dense", "1024:1,2048:2,8192:8")]
    run_traffic(cases, 4, tmp_path / "rows.jsonl")
    dense, dilated = (json.loads(line) for line in (tmp_path / "rows.jsonl").read_text().splitlines())
    assert 0 < dilated["forward_mean"] < dense["forward_mean"] / 2
    assert dense["forward_most"] == 3 * 2048 * 2 * 16 * 2 * 2  # the first rank's whole shard goes to three others
