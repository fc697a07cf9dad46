"""What a config will cost, before it is run: `python -m protlig_dd.training plan=true`."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from protlig_dd.batch import PackedBatch
from protlig_dd.config.components import build_model
from protlig_dd.config.train import TrainConfig
from protlig_dd.data.loader import PackDataset
from protlig_dd.data.store import StoreGroup
from protlig_dd.system.device import matmul_peak
from protlig_dd.system.terminal import console
from protlig_dd.training.optim.make import make_optimizer
from protlig_dd.training.optim.schedule import count_steps

MFU = 0.4  # assumed where nothing was measured: of what matrix products reach
H100_FLOPS = 989e12  # dense bf16
TOKENS = 128  # of the smaller pack whose activations are counted


def activation_bytes(config: TrainConfig, precision: str) -> float:
    """The most bytes of activations at one time, for each token of a pack, in eager mode (compiled blocks keep less).

    Counts the tensors that the forward pass keeps for the backward pass, in networks of one block and of two; every
    further block keeps what the second does. With checkpointing, the backward pass computes one block's again.
    """

    def for_a_token(blocks: int, checkpointing: bool) -> float:
        # what a larger pack keeps more: bf16 copies of the weights are kept too, once
        small, large = (kept_bytes(config, precision, blocks, checkpointing, n) for n in (TOKENS, 2 * TOKENS))
        return (large - small) / TOKENS

    one, two = (for_a_token(blocks, config.model.checkpointing) for blocks in (1, 2))
    total = one + (config.model.n_blocks - 1) * (two - one)
    if config.model.checkpointing:
        total += for_a_token(2, False) - for_a_token(1, False)
    return total


def kept_bytes(config: TrainConfig, precision: str, blocks: int, checkpointing: bool, tokens: int) -> int:
    """Bytes that a network of so many blocks keeps for its backward pass over a sequence, float32 weights left out.

    Its tensors are fake: they have shapes and types, and take neither memory nor arithmetic.
    """
    batch = PackedBatch.pack([torch.zeros(tokens, dtype=torch.int64)])
    part = replace(config.model, n_blocks=blocks, checkpointing=checkpointing)
    kept: dict[int, int] = {}

    def keep(x: torch.Tensor) -> torch.Tensor:
        kept[x.untyped_storage()._cdata] = x.untyped_storage().nbytes()
        return x

    with FakeTensorMode(allow_non_fake_inputs=True):
        model = build_model(part, "sdpa", config.time_conditioning).train()
        weights = {parameter.untyped_storage()._cdata for parameter in model.parameters()}
        autocast = torch.autocast("cpu", dtype=torch.bfloat16, enabled=precision == "bf16")
        with torch.autograd.graph.saved_tensors_hooks(keep, lambda x: x), autocast:
            model(batch, torch.ones(1))
    return sum(size for storage, size in kept.items() if storage not in weights)


def with_data(config: TrainConfig) -> TrainConfig:
    """The config. Where its data do not exist yet, `auto` takes their place, and a message says so: a plan reads only
    lengths. A run with trainer.epochs needs its own data, which tell how many steps it has.
    """
    paths = config.data.path if isinstance(config.data.path, list) else [config.data.path]
    missing = next((path for path in paths if path != "auto" and not Path(path).exists()), None)
    if missing is None or config.trainer.max_steps is None:
        return config
    console.print(f"{missing} does not exist: the proteins' lengths, and the epochs, are those of other data")
    return replace(config, data=replace(config.data, path="auto", weights=None))


def plan(
    config: TrainConfig,
    store: StoreGroup,
    device: torch.device,
    precision: str,
    processes: int,
    peak: float | None = None,
) -> dict[str, Any]:
    """Parameters, FLOPs, memory and time of a run, as numbers.

    Args:
        peak: FLOP/s of the device's matrix products; measured if None.
    """
    data, optim = config.data, config.optim
    train = store.split("train")
    dataset = PackDataset(
        store, train, seed=config.seed, max_len=data.max_len, tokens_per_pack=data.tokens_per_pack, weights=data.weights
    )
    with torch.device("meta"):
        model = build_model(config.model, "sdpa", config.time_conditioning)
        optimizer = make_optimizer(model, replace(optim, weight_decay=0.0), "fp32")
    parameters = sum(parameter.numel() for parameter in model.parameters())
    by_muon = sum(p.numel() for p in optimizer.param_groups[0]["params"]) if optim.name == "muon" else 0
    some = np.sort(np.random.default_rng(0).choice(train, min(100_000, len(train)), replace=False))
    tokens = np.minimum(store.lengths[some], data.max_len).astype(np.int64) + 2
    flops = 3 * model.flops(tokens.tolist()) / int(tokens.sum())
    per_token = activation_bytes(config, precision)
    step_tokens, steps = optim.packs_per_step * data.tokens_per_pack, count_steps(config, dataset)
    peak = matmul_peak(device, precision) if peak is None else peak
    devices = processes if device.type == "cuda" else 1  # processes on a CPU share its cores
    return {
        "parameters": parameters,
        "flops_per_token": flops,
        "step_tokens": step_tokens,
        "steps": steps,
        "epochs": steps * optim.packs_per_step / dataset.packs_per_epoch,
        # weights, gradients and averages, and of AdamW two numbers for each weight, of Muon one, in float32; in bf16
        # a copy of the weights of products is kept for the backward pass
        "state_bytes": 4 * (5 * parameters - by_muon)
        + (2 * (model.weights_per_token + model.weights_per_sequence) if precision == "bf16" else 0),
        "activation_bytes_per_token": per_token,
        "pack_bytes": per_token * data.tokens_per_pack,
        "peak_flops": peak,
        "seconds": steps * step_tokens * flops / (MFU * peak * devices),
    }


def figure(x: float) -> str:
    """Three digits of it."""
    return f"{x:,.0f}" if x >= 100 else f"{x:.3g}"


def print_plan(config: TrainConfig, store: StoreGroup, device: torch.device, precision: str, processes: int) -> None:
    """The plan as a table, for people."""
    found = plan(config, store, device, precision, processes)
    tokens = found["steps"] * found["step_tokens"]
    per_token, kept, hours = found["flops_per_token"], found["activation_bytes_per_token"], found["seconds"] / 3600
    gib = {key: found[f"{key}_bytes"] / 2**30 for key in ("state", "pack")}
    recomputed = ", recomputed in the backward pass" if config.model.checkpointing else ""
    rows = {
        "parameters": [f"{found['parameters'] / 1e6:,.1f} M"],
        "data": [store.name, f"{int(store.token_counts[0].sum()):,} tokens to train on"],
        "step": [
            f"{config.optim.packs_per_step} packs x {config.data.tokens_per_pack:,} = {found['step_tokens']:,} tokens",
            f"{per_token * found['step_tokens'] / 1e12:,.2f} TFLOP",
        ],
        "run": [f"{found['steps']:,} steps = {tokens / 1e9:,.3f} G tokens = {found['epochs']:,.2f} epochs"],
        "FLOPs": [f"{per_token / 1e9:,.3f} GFLOP a token", f"{per_token * tokens:.2e} in all"],
        "memory": [
            f"{sum(gib.values()):,.2f} GiB a process",
            f"{gib['state']:,.2f} of it weights, gradients, averages and optimizer",
            f"{gib['pack']:,.2f} activations, {kept / 1024:,.0f} KiB a token{recomputed}",
        ],
        "time": [
            f"{figure(hours)} hours = {figure(hours / 24)} days on {processes} x {device}",
            f"matrix products reach {found['peak_flops'] / 1e12:,.2f} TFLOP/s in {precision}",
            f"{MFU:.0%} of that is assumed",
        ],
        "on an H100": [
            f"{figure(per_token * tokens / (MFU * H100_FLOPS) / 86400)} days",
            f"{H100_FLOPS / 1e12:.0f} TFLOP/s by its data sheet, of which {MFU:.0%} is assumed",
        ],
    }
    console.print("\n".join(f"{name:<11} {'; '.join(parts)}" for name, parts in rows.items()))
