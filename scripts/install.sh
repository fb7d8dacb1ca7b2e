#!/usr/bin/env bash
# Installs hf_dilated into a virtual environment:   bash scripts/install.sh [extras]
#
# VENV              where the virtual environment lives (default .venv)
# PYTHON            the interpreter that makes it (default python3; 3.11 or newer)
# TORCH_INDEX_URL   the index that torch alone comes from, to choose a CPU or a CUDA build
#
# Safe to rerun: nothing is installed again while pyproject.toml and constraints.txt stay as they are.
set -euo pipefail
cd "$(dirname "$0")/.."

extras="${1:-}"
venv="${VENV:-.venv}"
python="${PYTHON:-python3}"
export PIP_DISABLE_PIP_VERSION_CHECK=1

if [ ! -x "$venv/bin/python" ]; then
    "$python" -c 'import sys; sys.exit(sys.version_info < (3, 11))' || {
        echo "hf_dilated needs Python 3.11 or newer, but $python is $("$python" --version); set PYTHON=…" >&2
        exit 1
    }
    echo "== virtual environment: $venv"
    "$python" -m venv "$venv"
fi

stamp="$venv/.installed${extras:+-${extras//,/-}}"
wanted="$(cat pyproject.toml constraints.txt scripts/install.sh | sha256sum)"
if [ "$(cat "$stamp" 2>/dev/null)" = "$wanted" ]; then
    exit 0
fi

# --no-compile: Python compiles what is imported, when it is; most of the packages never are
install() {
    "$venv/bin/python" -m pip install --quiet --no-compile --constraint constraints.txt "$@"
}

echo "== install: torch"
install ${TORCH_INDEX_URL:+--index-url "$TORCH_INDEX_URL"} torch
echo "== install: hf_dilated${extras:+[$extras]}"
install setuptools
install --no-build-isolation --editable ".${extras:+[$extras]}"
echo "$wanted" > "$stamp"
