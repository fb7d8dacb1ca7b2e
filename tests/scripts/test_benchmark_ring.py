"""The ring benchmark checks, measures and writes rows, in two processes."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


@pytest.mark.timeout(120)
def test_rows_of_two_processes(tmp_path: Path) -> None:
    sizes = ["--lengths", "256", "--heads", "2", "--kv-heads", "1", "--head-dim", "8", "--rounds", "5"]
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--standalone"]
    command += ["scripts/benchmark.py", "ring", *sizes, "--transports", "gather,rows", "--output", str(tmp_path)]
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=110)
    assert done.returncode == 0, done.stderr[-2000:]
    rows = [json.loads(line) for path in tmp_path.glob("*.jsonl") for line in path.read_text().splitlines()]
    assert {row["variant"] for row in rows} == {"one process", "one process (again)", "ring gather", "ring rows"}
    assert all(row["median"] > 0 and len(row["seconds"]) == 5 for row in rows)
    assert {row["mode"] for row in rows} == {"forward", "forward+backward"}
