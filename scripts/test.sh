#!/usr/bin/env bash
# Set up and run what must pass: lint, format, types, and the tests with run-time checks of all annotated shapes.
#
#   scripts/test.sh                   all tests except those marked `system` (Slurm, MMseqs2, browser, g++) or `campaign`
#   scripts/test.sh -m "not slow"     the quick tests, to run after each edit
#   scripts/test.sh --all             every test, as in .ci/run; scripts/setup.sh --dev --system installs the programs
#   scripts/test.sh [arguments]       other arguments are passed to pytest, as in scripts/test.sh tests/test_noise.py -x
set -euo pipefail
case " $* " in *" -h "* | *" --help "*) sed -n '2,7s/^# \{0,1\}//p' "${BASH_SOURCE[0]}"; exit 0 ;; esac
cd "$(dirname "${BASH_SOURCE[0]}")/.."
chosen=(-m "not system and not campaign")
arguments=()
for argument in "$@"; do
    case "$argument" in
        --all) chosen=(--hypothesis-profile=thorough) ;;
        -m | -m?*) chosen=(); arguments+=("$argument") ;;
        *) arguments+=("$argument") ;;
    esac
done
scripts/setup.sh --dev
bin=${PROTLIG_VENV:-.venv}/bin
"$bin/ruff" check .
"$bin/ruff" format --check .
"$bin/mypy"
code=0
PROTLIG_TYPECHECK=1 "$bin/python" -m pytest -n auto --dist worksteal \
    ${chosen[@]+"${chosen[@]}"} ${arguments[@]+"${arguments[@]}"} || code=$?
if [ "${chosen[0]-}" = -m ]; then
    echo "Not run: tests marked system (Slurm, MMseqs2, browser, g++, root) or campaign (faults)."
    echo "./scripts/test.sh --all runs them too; docs/testing.md describes them."
fi
exit "$code"
