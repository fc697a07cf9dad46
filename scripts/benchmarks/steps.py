"""Speed of training steps compared with baselines, cost of settings, and time of each operator in a step."""

import argparse
import statistics
from functools import partial
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile

from protlig_dd.system.device import matmul_peak, resolve_device, resolve_precision
from protlig_dd.system.terminal import ProgressBar
from scripts.benchmarks.tables import open_store, table
from scripts.benchmarks.variants import DEFAULT_NETWORK, MODELS, Setup, Variant, make_variant, timed


def throughput(arguments: argparse.Namespace) -> list[dict[str, Any]]:
    """Measure the residues/s of training on packs and on the batches of two baselines.

    Ratios are relative to the padded baseline in float32.
    """
    device = resolve_device(arguments.device)
    best = resolve_precision(arguments.precision, device)
    store = open_store(arguments.fasta, arguments.folder)
    found = []
    for size in arguments.models:
        for max_len in arguments.max_len:
            setup = Setup(store, MODELS[size], max_len, arguments.tokens, device)
            make = partial(make_variant, setup=setup)
            variants = [make("padded fp32, eager (baseline)", precision="fp32", baseline="padded")]
            if best == "bf16":
                variants.append(make("padded bf16, eager", precision="bf16", baseline="padded"))
            for precision in dict.fromkeys(("fp32", best)):
                variants.append(make(f"concatenated {precision}, eager", precision=precision, baseline="concatenated"))
            variants.append(make(f"packed {best}, eager", precision=best))
            how = "compiled, CUDA graphs" if device.type == "cuda" else "compiled"
            variants.append(make(f"packed {best}, {how}", precision=best, compiled=True))
            default, name = DEFAULT_NETWORK, "the default network"
            if device.type == "cpu" and best == "bf16":
                default, name = {**default, "mlp": "gelu_erf"}, "the default network with gelu_erf"
                variants.append(make(f"packed {best}, eager, {name}", precision=best, **default))
            variants.append(make(f"packed {best}, {how}, {name}", precision=best, compiled=True, **default))
            found += compare(variants, arguments, device, size, max_len)
    return found


def cost(arguments: argparse.Namespace) -> list[dict[str, Any]]:
    """Measure the residues/s of eager training with settings that scripts/arms.py compares, and with checkpointing.

    Ratios are relative to the SEDD network with AdamW.
    """
    device = resolve_device(arguments.device)
    precision, store = resolve_precision(arguments.precision, device), open_store(arguments.fasta, arguments.folder)
    free = {"time_conditioning": False}
    qk = {**free, "qk_norm": True}
    muon = {**qk, "optimizer": "muon"}
    arms: dict[str, dict[str, Any]] = {
        "SEDD network, AdamW": {},
        "time-free": free,
        "time-free, QK-norm": qk,
        "time-free, QK-norm, Muon": muon,
        "time-free, QK-norm, Muon, RMSNorm": {**muon, "norm": "rms"},
        "time-free, QK-norm, Muon, SwiGLU": {**muon, "mlp": "swiglu"},
        "time-free, QK-norm, Muon, squared ReLU": {**muon, "mlp": "relu2"},
        "time-free, QK-norm, Muon, checkpointing": {**muon, "checkpointing": True},
    }
    found = []
    for size in arguments.models:
        variants = [
            make_variant(name, Setup(store, MODELS[size], 512, arguments.tokens, device), precision, **options)
            for name, options in arms.items()
        ]
        found += compare(variants, arguments, device, size, 512)
    return found


def compare(
    variants: list[Variant],
    arguments: argparse.Namespace,
    device: torch.device,
    size: str,
    max_len: int,
) -> list[dict[str, Any]]:
    """Measure the variants with `rates`, print the results as a table, and return them."""
    rows = rates(variants, arguments, device, size, max_len)
    print(f"\n{size}, max_len {max_len}, {arguments.tokens} tokens per pack, {device}\n")
    table(
        [
            "variant",
            "residues/s",
            "ratio to the baseline (lowest, highest)",
            "slots per residue",
            "MFU",
            "first step, s",
        ],
        [
            [
                row["variant"],
                f"{row['residues_per_s']:,.0f}",
                f"{row['ratio']:.2f} ({row['ratio_low']:.2f}, {row['ratio_high']:.2f})",
                f"{row['slots_per_residue']:.2f}",
                "" if row["mfu"] is None else f"{row['mfu']:.0%}",
                f"{row['first_step_s']:.1f}",
            ]
            for row in rows
        ],
    )
    return rows


def rates(
    variants: list[Variant],
    arguments: argparse.Namespace,
    device: torch.device,
    size: str,
    max_len: int,
) -> list[dict[str, Any]]:
    """Return a row for each variant, with its median speed and the ratio of its speed to the first variant's.

    Each round measures all variants, and each ratio compares two variants within one round.

    Args:
        arguments: has `warmup` (steps of each variant before the first round), `repeats` (number of rounds) and `steps`
            (of each variant in each round).
    """
    for variant in variants:
        variant.first_s = timed(variant, 1, device)
        timed(variant, arguments.warmup, device)
    rates: dict[str, list[float]] = {variant.name: [] for variant in variants}
    mfus: dict[str, list[float]] = {variant.name: [] for variant in variants}
    with ProgressBar(f"{size}, {max_len}", arguments.repeats) as bar:
        for _ in range(arguments.repeats):
            for variant in variants:
                peak = matmul_peak(device, variant.precision)
                seconds = timed(variant, arguments.steps, device)
                rates[variant.name].append(variant.residues / seconds)
                mfus[variant.name].append(variant.flops / seconds / peak)
            bar.advance()
    base = rates[variants[0].name]
    rows = []
    for variant in variants:
        ratios = [rate / base_rate for rate, base_rate in zip(rates[variant.name], base, strict=True)]
        rows.append(
            {
                "model": size,
                "max_len": max_len,
                "variant": variant.name,
                "residues_per_s": statistics.median(rates[variant.name]),
                "ratio": statistics.median(ratios),
                "ratio_low": min(ratios),
                "ratio_high": max(ratios),
                "mfu": None
                if variant.name.startswith(("padded", "concatenated"))
                else statistics.median(mfus[variant.name]),
                "slots_per_residue": variant.slots / variant.residues,
                "first_step_s": variant.first_s,
            }
        )
    return rows


def profiled(arguments: argparse.Namespace) -> list[dict[str, Any]]:
    """Print the fraction of a training step's time that each operator takes.

    The time of an operator does not include the operators that it calls. The step is eager, and trains on a pack.
    """
    device = resolve_device(arguments.device)
    precision, store = resolve_precision(arguments.precision, device), open_store(arguments.fasta, arguments.folder)
    networks: dict[str, dict[str, Any]] = {"SEDD network": {}, "default network": DEFAULT_NETWORK}
    shares: dict[str, dict[str, float]] = {}
    for size in arguments.models:
        for name, options in networks.items():
            setup = Setup(store, MODELS[size], arguments.max_len[0], arguments.tokens, device)
            variant = make_variant(name, setup, precision, **options)
            timed(variant, arguments.warmup, device)
            with profile(
                activities=[ProfilerActivity.CUDA if device.type == "cuda" else ProfilerActivity.CPU]
            ) as found:
                timed(variant, arguments.steps, device)
            kind = "device" if device.type == "cuda" else "cpu"
            spent = {event.key: getattr(event, f"self_{kind}_time_total") for event in found.key_averages()}
            total = sum(spent.values())
            shares[f"{name}, {size}"] = {key: value / total for key, value in spent.items()}
    columns = list(shares)
    ranked = sorted(
        {key for network in shares.values() for key in network}, key=lambda key: -shares[columns[0]].get(key, 0.0)
    )
    print(f"\nFraction of the time of a packed step of {arguments.tokens} tokens, {precision}, eager, {device}\n")
    table(
        ["operator", *columns],
        [
            [f"`{key}`", *(f"{shares[column].get(key, 0.0):.1%}" for column in columns)]
            for key in ranked
            if max(shares[column].get(key, 0.0) for column in columns) > 0.01
        ],
    )
    return [{"network": column, "shares": shares[column]} for column in columns]
