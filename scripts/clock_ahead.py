"""Run protlig_dd.training as the main module, with a `time.time()` that is one hour ahead of the true time.

The trial `clocks` of scripts/host_trials.py runs this module instead of protlig_dd.training on one of two hosts.
"""

import runpy
import time

if __name__ == "__main__":
    true_time = time.time
    time.time = lambda: true_time() + 3600
    runpy.run_module("protlig_dd.training", run_name="__main__", alter_sys=True)
