"""Run `python -m protlig_dd.training` with a clock one hour ahead, for scripts/host_trials.py."""

import runpy
import time

if __name__ == "__main__":
    true_time = time.time
    time.time = lambda: true_time() + 3600
    runpy.run_module("protlig_dd.training", run_name="__main__", alter_sys=True)
