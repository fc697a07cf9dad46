"""NLL bounds of held-out proteins by length, for networks that were trained on short proteins.

The held-out proteins have up to four times as many residues as the proteins in training, which are cropped.
"""

import argparse
from typing import Any

import numpy as np

from protlig_dd.config.read import read_config
from protlig_dd.config.verbs import EvaluateConfig
from protlig_dd.evaluation.likelihood.scoring import Given, column, score
from protlig_dd.inference.model import TrainedModel, load_trained
from scripts.architecture.runs import REPORT, Job, job, measure, store_of
from scripts.benchmarks.variants import composed

MAX_LEN = 256
RANGES = ((0, 256), (256, 512), (512, 1024))  # residues: more than the first number, at most the second


def lengths(arguments: argparse.Namespace) -> bool:
    """Train each kind of network on proteins cropped to MAX_LEN residues, and compute bounds for held-out proteins.

    The held-out proteins are not cropped. They are grouped by length (RANGES); proteins longer than the last range are
    left out.
    """
    store = store_of(arguments)
    rows = np.concatenate([store.split(split) for split in ("validation", "test")])
    selected = {
        (low, high): rows[(store.lengths[rows] > low) & (store.lengths[rows] <= high)][: arguments.proteins]
        for low, high in RANGES
    }
    for (low, high), found in selected.items():
        if not len(found):
            raise ValueError(f"{store.path}: no held-out protein has {low + 1} to {high} residues; use another --data")
    options = [f"data.max_len={MAX_LEN}", *REPORT]
    jobs = [job(arguments, arm, 0, arguments.steps, options) for arm in arguments.only]

    def finish(job: Job, report: dict[str, Any]) -> dict[str, Any]:
        keys = [f"from={job.folder(arguments.folder)}", f"input={store.path}", f"draws={arguments.draws}"]
        config = read_config(composed(*keys, "tokens_per_pack=4096", name="evaluate"), EvaluateConfig)
        trained = load_trained(config.from_, device=config.device, precision=config.precision)
        found = [bound(trained, [store[row] for row in rows], config) for rows in selected.values()]
        return {"step": report["step"], "ranges": [[*limits] for limits in selected], "bounds": found}

    return measure(jobs, arguments, finish)


def bound(trained: TrainedModel, proteins: list[np.ndarray], config: EvaluateConfig) -> dict[str, Any]:
    """Return the NLL bound of each protein in nats (`nats`) and its number of residues (`lengths`).

    The proteins are not cropped. If a protein is too long for the position encoding, return only the error message
    (`rejected`), and no bounds.
    """
    try:
        scored = score(trained, [Given(tokens, None) for tokens in proteins], config, None, bound_only=True)
    except ValueError as error:
        limit = trained.saved.config.model.max_positions
        if limit is None or max(map(len, proteins)) <= limit:
            raise
        return {"rejected": str(error)}
    return {"nats": column(scored, "bound").tolist(), "lengths": [protein.residues for protein in scored]}
