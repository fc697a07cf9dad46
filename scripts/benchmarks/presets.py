"""Estimated cost of training each model preset."""

import argparse
from dataclasses import replace
from typing import Any

import torch

from protlig_dd.config.read import read_config
from protlig_dd.config.train import TrainConfig
from protlig_dd.system.terminal import ProgressBar
from protlig_dd.training.cost import H100_FLOPS, MFU, plan
from scripts.benchmarks.tables import open_store, table
from scripts.benchmarks.variants import composed


def presets(arguments: argparse.Namespace) -> list[dict[str, Any]]:
    """Print the estimated cost of training each preset in bf16, with and without activation checkpointing.

    The estimates are those that `python -m protlig_dd.training plan=true` prints.
    """
    store, rows = open_store(arguments.fasta, arguments.folder), []
    names = ("tiny", "small", "medium", "large")
    with ProgressBar("presets", 4) as bar:
        for name in names:
            found = []
            for checkpointing in (False, True):
                overrides = [f"model={name}", f"model.checkpointing={checkpointing}"]
                config = replace(read_config(composed(*overrides), TrainConfig), time_conditioning=False)
                found.append(plan(config, store, torch.device("cpu"), "bf16", 1, peak=H100_FLOPS))
            rows.append({"preset": name, **found[0], "checkpointed": found[1]["activation_bytes_per_token"]})
            bar.advance()
    print(
        f"\n{rows[0]['steps']:,} steps of {rows[0]['step_tokens']:,} tokens; assumes an H100 at {MFU:.0%} of "
        f"{H100_FLOPS / 1e12:.0f} TFLOP/s\n"
    )
    table(
        [
            "preset",
            "M parameters",
            "GFLOP per token",
            "GiB of weights, gradients, averages, optimizer",
            "KiB of activations per token",
            "with checkpointing",
            "days on an H100",
        ],
        [
            [
                row["preset"],
                f"{row['parameters'] / 1e6:,.1f}",
                f"{row['flops_per_token'] / 1e9:.3f}",
                f"{row['state_bytes'] / 2**30:.2f}",
                f"{row['activation_bytes_per_token'] / 1024:,.0f}",
                f"{row['checkpointed'] / 1024:,.0f}",
                f"{row['steps'] * row['step_tokens'] * row['flops_per_token'] / (MFU * H100_FLOPS) / 86400:.2f}",
            ]
            for row in rows
        ],
    )
    return rows
