#!/usr/bin/env bash
# Set up, then train from scratch, evaluate and sample. An earlier run of the same name is renamed, never deleted.
# To resume a stopped run instead: python -m protlig_dd.training experiment=demo
#
#   ./start_fresh_training.sh                                  # trains experiment=demo in minutes on 2 CPU cores
#   ./start_fresh_training.sh experiment=demo optim.lr=1e-3    # with any Hydra overrides
set -euo pipefail
case "${1:-}" in -h | --help) sed -n '2,6s/^# \{0,1\}//p' "$0"; exit 0 ;; esac
root=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
"$root/scripts/setup.sh"
cd "$root"
experiment="experiment=demo"
for override in "$@"; do
    case "$override" in experiment=* | --config-name*) experiment="" ;; esac
done
exec "${PROTLIG_VENV:-.venv}/bin/python" -m protlig_dd.training ${experiment:+"$experiment"} run.fresh=true "$@"
