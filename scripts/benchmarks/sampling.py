"""Speed of sampling."""

import argparse
import statistics
import time
from dataclasses import replace
from typing import Any

import torch

from protlig_dd.diffusion.graphs.absorbing import Absorbing
from protlig_dd.diffusion.noise import LogLinearNoise
from protlig_dd.diffusion.samplers.base import SamplerOptions
from protlig_dd.diffusion.sampling import sample
from protlig_dd.diffusion.score import ScoreFn
from protlig_dd.model.config import ModelConfig
from protlig_dd.model.dit import DiT
from protlig_dd.model.mixers.attention import resolve_attention_backend
from protlig_dd.system.device import resolve_device, resolve_precision
from protlig_dd.system.terminal import ProgressBar
from scripts.benchmarks.tables import table
from scripts.benchmarks.variants import MODELS, NETWORK


def sampling(arguments: argparse.Namespace) -> list[dict[str, Any]]:
    """Measure sequences/s of `sample`, with and without reusing the scores of unchanged sequences."""
    device = resolve_device(arguments.device)
    precision = resolve_precision(arguments.precision, device)
    autocast = torch.bfloat16 if precision == "bf16" else None
    size, backend = MODELS["256 x 2"], resolve_attention_backend("auto", device, precision, 32)
    torch.manual_seed(0)
    with device:
        model = DiT(ModelConfig(**{**NETWORK, **size}), backend, time_conditioning=False).eval()
    score_fn = ScoreFn(model, Absorbing(), LogLinearNoise(), "x0", autocast=autocast)
    rows = []
    with ProgressBar("sampling", len(arguments.sampling_steps) * arguments.repeats) as bar:
        for steps in arguments.sampling_steps:
            rates: dict[bool, list[float]] = {False: [], True: []}
            for repeat in range(arguments.repeats):
                for keep, found in rates.items():
                    # with time conditioning, the sampler runs the network at every step and reuses no scores
                    tested = replace(score_fn, time_conditioning=not keep)
                    began = time.perf_counter()
                    sample(tested, [300] * 4, SamplerOptions(steps), torch.Generator().manual_seed(repeat))
                    found.append(4 / (time.perf_counter() - began))
                bar.advance()
            plain, kept = (statistics.median(rates[keep]) for keep in (False, True))
            gain = statistics.median(a / b for a, b in zip(rates[True], rates[False], strict=True))
            rows.append({"steps": steps, "sequences_per_s": plain, "sequences_per_s_kept": kept, "gain": gain})
    print(f"\n4 proteins of 300 residues at a time, 256 x 2, {device}\n")
    table(
        ["steps", "sequences/s, all scores computed", "sequences/s, unchanged scores reused", "speed-up"],
        [
            [
                str(row["steps"]),
                *(f"{row[key]:.3f}" for key in ("sequences_per_s", "sequences_per_s_kept")),
                f"{row['gain']:.2f}",
            ]
            for row in rows
        ],
    )
    return rows
