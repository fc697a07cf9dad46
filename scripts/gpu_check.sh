#!/usr/bin/env bash
# Run the tests that need a CUDA GPU, then the throughput benchmark, which prints its tables at the end.
#
#   scripts/gpu_check.sh [--fasta proteins.fasta.gz] [other arguments of scripts.benchmarks]
set -euo pipefail
case " $* " in *" -h "* | *" --help "*) sed -n '2,4s/^# \{0,1\}//p' "${BASH_SOURCE[0]}"; exit 0 ;; esac
cd "$(dirname "${BASH_SOURCE[0]}")/.."
python=${PYTHON:-${PROTLIG_VENV:-.venv}/bin/python}
if ! "$python" -c 'import torch; raise SystemExit(not torch.cuda.is_available())'; then
    echo "error: no CUDA GPU on this machine (torch.cuda.is_available() is false)" >&2
    exit 1
fi
"$python" -m pytest -q -m gpu tests
"$python" -m scripts.benchmarks --tokens 16384 --steps 5 "$@"
