"""Speed and memory of a training step of every kind of network, measured alternately in one process."""

import argparse
from pathlib import Path
from typing import Any

from protlig_dd.config.read import read_config
from protlig_dd.config.train import TrainConfig
from protlig_dd.data.store import SequenceStore, StoreGroup
from protlig_dd.system.device import resolve_device, resolve_precision
from protlig_dd.training.cost import activation_bytes
from protlig_dd.training.resolve import resolve
from scripts.architecture import results
from scripts.architecture.arms import BASELINE, model_overrides
from scripts.architecture.runs import store_of
from scripts.benchmarks.steps import rates
from scripts.benchmarks.variants import MODELS, Setup, composed, make_variant

MAX_LEN = 512  # as in the demo


def speed(arguments: argparse.Namespace) -> bool:
    """Measure the residues/s of training steps, and append one row with the figures of all arms.

    A repeated command measures again. On a GPU the networks are compiled, as in a run; on a CPU they are eager.
    """
    device = resolve_device(arguments.device)
    precision = resolve_precision(arguments.precision, device)
    sizes = MODELS[arguments.model]
    setup = Setup(StoreGroup([SequenceStore(store_of(arguments).path)]), sizes, MAX_LEN, arguments.tokens, device)
    arms = sorted(arguments.only, key=lambda arm: arm != BASELINE)  # ratios are relative to the first arm
    configs = {arm: config_of(arm, sizes) for arm in arms}
    compiled = device.type == "cuda"
    variants = [
        make_variant(arm, setup, precision, compiled=compiled, optimizer="muon", **network_of(config))
        for arm, config in configs.items()
    ]
    rows = rates(variants, arguments, device, arguments.model, MAX_LEN)
    for row, config in zip(rows, configs.values(), strict=True):
        row["activation_bytes_per_token"] = activation_bytes(config, precision)
    found = {"part": "speed", "command": arguments.command, "arm": "all", "seed": 0, "rows": rows}
    found |= {"device": str(device), "precision": precision, "tokens": arguments.tokens, "compiled": compiled}
    results.append(arguments.results, found)
    return True


def config_of(arm: str, sizes: dict[str, int]) -> TrainConfig:
    """Return the demo's config, changed to this arm and to a network of these sizes."""
    keys = [f"model.{key}={value}" for key, value in sizes.items()] + model_overrides(arm, sizes["n_blocks"])
    return resolve(read_config(composed("experiment=demo", f"data.max_len={MAX_LEN}", *keys), TrainConfig), Path())


def network_of(config: TrainConfig) -> dict[str, Any]:
    """Return the options of `make_variant` for the network of a config."""
    return vars(config.model) | {"time_conditioning": config.time_conditioning}
