"""Speed of each mixer for several sequence lengths."""

import argparse
import statistics
import time
from typing import Any

import torch
import torch.nn.functional as F

from protlig_dd.batch import PackedBatch
from protlig_dd.model.config import ModelConfig
from protlig_dd.model.dit import DiT
from protlig_dd.model.mixers import MIXERS
from protlig_dd.model.mixers.attention import resolve_attention_backend
from protlig_dd.system.device import resolve_device, resolve_precision
from protlig_dd.system.terminal import ProgressBar
from scripts.benchmarks.tables import table
from scripts.benchmarks.variants import MODELS, NETWORK


def mixers(arguments: argparse.Namespace) -> list[dict[str, Any]]:
    """Measure tokens/s of an eager forward and backward pass, with the same mixer in all blocks.

    Each round measures the networks of all mixers. The printed speeds and ratios are medians over the rounds.
    """
    device = resolve_device(arguments.device)
    precision = resolve_precision(arguments.precision, device)
    rows: list[dict[str, Any]] = []
    for size in arguments.models:
        networks = {name: network_with(name, size, device, precision) for name in MIXERS}
        for length in arguments.lengths:
            sequences = max(1, arguments.tokens // length)
            generator = torch.Generator().manual_seed(0)
            tokens = torch.randint(0, 20, (sequences, length), generator=generator)
            batch = PackedBatch.pack([*tokens]).to(device)
            rates: dict[str, list[float]] = {name: [] for name in networks}
            with ProgressBar(f"{size}, length {length}", arguments.repeats) as bar:
                for name in networks:
                    seconds_of_pass(networks[name], batch, precision, arguments.warmup)
                for _ in range(arguments.repeats):
                    for name, found in rates.items():
                        seconds = seconds_of_pass(networks[name], batch, precision, arguments.steps)
                        found.append(sequences * length / seconds)
                    bar.advance()
            for name, found in rates.items():
                ratios = [rate / base for rate, base in zip(found, rates["attention"], strict=True)]
                rows.append(
                    {
                        "model": size,
                        "length": length,
                        "sequences": sequences,
                        "mixer": name,
                        "tokens_per_s": statistics.median(found),
                        "ratio": statistics.median(ratios),
                        "ratio_low": min(ratios),
                        "ratio_high": max(ratios),
                        "gflop_per_token": networks[name].flops(batch.lengths) / sequences / length / 1e9,
                    }
                )
    print(f"\nForward and backward pass, {precision}, eager, {device}\n")
    table(
        ["mixer", "network", "tokens", "tokens/s", "ratio to attention (lowest, highest)", "GFLOP per token, forward"],
        [
            [
                row["mixer"],
                row["model"],
                f"{row['sequences']} x {row['length']:,}",
                f"{row['tokens_per_s']:,.0f}",
                f"{row['ratio']:.2f} ({row['ratio_low']:.2f}, {row['ratio_high']:.2f})",
                f"{row['gflop_per_token']:.3f}",
            ]
            for row in rows
        ],
    )
    return rows


def network_with(mixer: str, size: str, device: torch.device, precision: str) -> DiT:
    """Return a network without time conditioning, with this mixer in all blocks."""
    config = ModelConfig(**{**NETWORK, **MODELS[size], "qk_norm": True, "norm": "rms"}, mixers=mixer)
    backend = resolve_attention_backend("auto", device, precision, config.head_dim)
    torch.manual_seed(0)
    with device:
        return DiT(config, backend, time_conditioning=False).train()


def seconds_of_pass(model: DiT, batch: PackedBatch, precision: str, passes: int) -> float:
    """Run `passes` forward and backward passes, and return their mean time in seconds."""
    device = batch.tokens.device
    sigma = torch.ones(len(batch.lengths), device=device)
    began = time.perf_counter()
    for _ in range(passes):
        with torch.autocast(device.type, torch.bfloat16, enabled=precision == "bf16"):
            logits = model(batch, sigma)
        F.cross_entropy(logits, batch.tokens).backward()
        model.zero_grad()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return (time.perf_counter() - began) / max(1, passes)
