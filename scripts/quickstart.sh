#!/usr/bin/env bash
# Installs what is missing, then reads a long document on the CPU:   bash scripts/quickstart.sh [--help]
set -euo pipefail
cd "$(dirname "$0")/.."

bash scripts/install.sh bench
exec "${VENV:-.venv}/bin/python" scripts/quickstart.py "$@"
