#!/usr/bin/env bash
# Set up and run everything that must pass: lint, format, types, tests with every annotated shape checked.
#
#   scripts/test.sh [pytest arguments]
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
scripts/setup.sh --dev
bin=${PROTLIG_VENV:-.venv}/bin
"$bin/ruff" check .
"$bin/ruff" format --check .
"$bin/mypy"
PROTLIG_TYPECHECK=1 "$bin/python" -m pytest -n auto --maxprocesses 4 --dist worksteal "$@"
