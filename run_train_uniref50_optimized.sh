#!/usr/bin/env bash
# Train on UniRef50, on all GPUs of this machine or, without a GPU, in one process. The same command resumes the run.
# Exit code 75 means that the run was stopped before its end, after it had written a checkpoint.
#
#   ./run_train_uniref50_optimized.sh
#   ./run_train_uniref50_optimized.sh model=medium run.name=medium    # with any Hydra overrides
set -euo pipefail
case "${1:-}" in -h | --help) sed -n '2,6s/^# \{0,1\}//p' "$0"; exit 0 ;; esac
root=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
"$root/scripts/setup.sh"
cd "$root"
exec "${PROTLIG_VENV:-.venv}/bin/python" -m protlig_dd.training --config-name config_uniref50_stable "$@"
