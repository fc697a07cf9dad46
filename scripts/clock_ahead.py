"""`python -m protlig_dd.training` by a clock that is an hour ahead; one of scripts/host_trials.py."""

import runpy
import time

if __name__ == "__main__":
    right = time.time
    time.time = lambda: right() + 3600
    runpy.run_module("protlig_dd.training", run_name="__main__", alter_sys=True)
