#!/usr/bin/env bash
# Set up and run everything that must pass: lint, format, types, tests with every annotated shape checked.
#
#   scripts/test.sh [pytest arguments]
set -euo pipefail
case " $* " in *" -h "* | *" --help "*) sed -n '2,4s/^# \{0,1\}//p' "${BASH_SOURCE[0]}"; exit 0 ;; esac
cd "$(dirname "${BASH_SOURCE[0]}")/.."
scripts/setup.sh --dev
bin=${PROTLIG_VENV:-.venv}/bin
"$bin/ruff" check .
"$bin/ruff" format --check .
"$bin/mypy"
PROTLIG_TYPECHECK=1 "$bin/python" -m pytest -n auto --maxprocesses 4 --dist worksteal "$@"
