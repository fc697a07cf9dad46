"""Bounds of proteins that are longer than those on which the network was trained."""

import argparse
from pathlib import Path
from typing import Any

import numpy as np

from protlig_dd.config.read import read_config
from protlig_dd.config.verbs import EvaluateConfig
from protlig_dd.data.store import SequenceStore
from protlig_dd.evaluation.likelihood.scoring import column, score
from protlig_dd.inference.model import load_trained
from protlig_dd.model.positions import POSITIONS
from scripts.architecture.arms import ARMS, NETWORK
from scripts.architecture.runs import REPORT, Job, job, measure, store_of
from scripts.benchmarks.variants import composed

MAX_LEN = 256
RANGES = ((0, 256), (256, 512), (512, 1024))  # residues: more than the first number, at most the second


def lengths(arguments: argparse.Namespace) -> bool:
    """Train each arm on proteins of at most MAX_LEN residues, and bound held-out proteins of each range of lengths."""
    store = store_of(arguments)
    rows = np.concatenate([store.split(split) for split in ("validation", "test")])
    selected = {
        (low, high): rows[(store.lengths[rows] > low) & (store.lengths[rows] <= high)][: arguments.proteins]
        for low, high in RANGES
    }
    options = [f"data.max_len={MAX_LEN}", *REPORT]
    jobs = [job(arguments, arm, 0, arguments.steps, options) for arm in arguments.only]

    def finish(job: Job, report: dict[str, Any]) -> dict[str, Any]:
        found = [bound(job, arguments, store, rows) for rows in selected.values()]
        return {"step": report["step"], "ranges": [[*limits] for limits in selected], "bounds": found}

    return measure(jobs, arguments, finish)


def bound(job: Job, arguments: argparse.Namespace, store: SequenceStore, rows: np.ndarray) -> dict[str, Any]:
    """Return the nats and residues of each protein, at full length, or the message of an encoding that rejects them."""
    run: Path = job.folder(arguments.folder)
    keys = [f"from={run}", f"input={store.path}", f"draws={arguments.draws}", "tokens_per_pack=4096"]
    config = read_config(composed(*keys, name="evaluate"), EvaluateConfig)
    trained = load_trained(config.from_, device=config.device, precision=config.precision)
    try:
        scored = score(trained, [store[row] for row in rows], config, None, bound_only=True)
    except ValueError as error:
        if not POSITIONS[(NETWORK | ARMS[job.arm])["positions"]].limited:
            raise
        return {"rejected": str(error)}
    return {"nats": column(scored, "bound").tolist(), "lengths": [protein.residues for protein in scored]}
