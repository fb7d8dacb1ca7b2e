#!/usr/bin/env bash
# Installs what is missing, then checks everything:   bash scripts/test.sh [arguments for pytest]
set -euo pipefail
cd "$(dirname "$0")/.."

bash scripts/install.sh dev
export PATH="${VENV:-.venv}/bin:$PATH" OMP_NUM_THREADS=1
unset PYTHONDONTWRITEBYTECODE # every process would compile what it imports again, and there are dozens

step() {
    echo "== $*"
    "$@"
}

step ruff check --quiet .
step ruff format --check --quiet .
python -c "import tests.distributed.preloaded" & # compiled once, before many want it at the same time
step mypy
step lint-imports --no-logo
wait
step python -m pytest -n 2 --quiet "$@"
echo "== all passed"
