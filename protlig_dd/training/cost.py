"""Estimate the FLOPs, memory and time of a run before it starts: `python -m protlig_dd.training plan=true`."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from protlig_dd.batch import PackedBatch
from protlig_dd.config.components import build_model
from protlig_dd.config.train import TrainConfig
from protlig_dd.data.member_packs import MemberDataset
from protlig_dd.data.members import ClusterGroup
from protlig_dd.data.store import StoreGroup
from protlig_dd.model.dit import DiT, kinds_of
from protlig_dd.model.lora import merged_numbers
from protlig_dd.model.mixers import mixers_of_blocks
from protlig_dd.model.mixers.matmul import LONGEST
from protlig_dd.model.positions import POSITIONS
from protlig_dd.runs.checkpoint import trained_parameters
from protlig_dd.system.device import matmul_peak
from protlig_dd.system.terminal import console
from protlig_dd.training.optim.make import make_optimizer
from protlig_dd.training.optim.muon import Muon
from protlig_dd.training.optim.schedule import count_steps
from protlig_dd.training.packs import training_packs

MANY_EPOCHS = 100  # more epochs give a warning; UniRef50 models train for a few epochs
MFU = 0.4  # assumed FLOP/s of training, as a fraction of the FLOP/s of matrix products alone
H100_FLOPS = 989e12  # dense bf16
LONG_RUN_FLOPS = 2e15  # about an hour on 2 CPU cores with bf16; compiling takes half a minute and saves about a tenth
TOKENS = 128  # size of the smaller of two packs; activations are counted in both (see `activation_bytes`)


def activation_bytes(config: TrainConfig, precision: str, backend: str = "sdpa") -> float:
    """Return the peak bytes of activations per token of a pack, in eager mode (compiled blocks keep less).

    This function counts the tensors that the forward pass keeps for the backward pass, in networks of one block and of
    two blocks. The difference is what the second block keeps, and every further block with the same mixer keeps as
    much. With activation checkpointing, the backward pass recomputes one block at a time. The result then also includes
    the tensors of one recomputed block, the one that keeps the most.

    If the position encoding adds a bias to the attention scores, sdpa keeps numbers for each pair of tokens, and matmul
    does up to LONGEST tokens. The tensors of attention blocks are then counted in packs of the longest such proteins
    that training reads. Other blocks are counted in small packs, because their bytes are proportional to the number of
    tokens.

    Args:
        backend: the attention backend, sdpa | matmul. The backends for GPUs keep what sdpa keeps without a bias.
    """
    mixers = mixers_of_blocks(config.model)
    # the first block is attention if there is any: a position encoding with a bias needs attention in the network
    first = "attention" if "attention" in mixers else mixers[0]
    others = Counter(mixers) - Counter([first])
    longest, pairs = longest_counted(config, backend), has_bias(config) or backend == "matmul"

    @cache
    def bytes_per_token(mixers: tuple[str, ...], checkpointing: bool, of_longest: bool) -> float:
        # the second protein is one token shorter, because sequences of equal length share some tensors
        small, large = ([longest], [longest, longest - 1]) if of_longest else ([TOKENS], [2 * TOKENS])
        # the difference of the two packs excludes the bf16 copies of the weights, which do not grow with the pack
        kept = [kept_bytes(config, precision, [*mixers], checkpointing, lengths, backend) for lengths in (small, large)]
        return (kept[1] - kept[0]) / (sum(large) - sum(small))

    def bytes_of_block(mixer: str, checkpointing: bool) -> float:
        one, two = (
            bytes_per_token(names, checkpointing, pairs and mixer == "attention")
            for names in ((first,), (first, mixer))
        )
        return two - one

    total = bytes_per_token((first,), config.model.checkpointing, pairs)
    total += sum(n * bytes_of_block(mixer, config.model.checkpointing) for mixer, n in others.items())
    if config.model.checkpointing:
        total += max(bytes_of_block(mixer, False) for mixer in {first, *others})
    return total


def longest_counted(config: TrainConfig, backend: str) -> int:
    """Return the tokens of the sequences in whose packs attention is counted: those that need the most memory."""
    longest = config.data.max_len + 2
    return min(longest, LONGEST) if backend == "matmul" else longest


def has_bias(config: TrainConfig) -> bool:
    """Whether the position encoding adds a bias to the attention scores."""
    return POSITIONS[config.model.positions].is_biased()


def counted_backend(config: TrainConfig, device: torch.device, precision: str) -> str:
    """Return the attention backend whose activations the estimate counts: matmul if the run will use it, else sdpa."""
    name, kind = config.model.attention_backend, POSITIONS[config.model.positions]
    on_cpu = device.type == "cpu" and precision == "bf16" and "matmul" in kind.backends
    return "matmul" if on_cpu and name in ("auto", "matmul") else "sdpa"


def kept_bytes(
    config: TrainConfig,
    precision: str,
    mixers: list[str],
    checkpointing: bool,
    lengths: Sequence[int],
    backend: str = "sdpa",
) -> int:
    """Return the bytes that a network with one block for each of these mixers keeps for its backward pass.

    Float32 weights are not counted. The tensors are fake: they have shapes and types, but no memory, and nothing is
    computed. If the attention scores have a bias, sdpa keeps the attention weights, which flex does not keep.

    Args:
        lengths: number of tokens of each sequence in the input.
    """
    batch = PackedBatch.pack([torch.zeros(length, dtype=torch.int64) for length in lengths])
    limit = config.model.max_positions  # a table of positions must cover the sequences; its size is not counted
    limit = None if limit is None else max(limit, *lengths)
    model_config = replace(config.model, checkpointing=checkpointing, max_positions=limit)
    model_config = replace(model_config, n_blocks=len(mixers), mixers=mixers)
    kept: dict[int, int] = {}

    def keep(x: torch.Tensor) -> torch.Tensor:
        kept[x.untyped_storage()._cdata] = x.untyped_storage().nbytes()
        return x

    with FakeTensorMode(allow_non_fake_inputs=True):
        model = build_model(model_config, backend, config.time_conditioning).train()
        weights = {parameter.untyped_storage()._cdata for parameter in model.parameters()}
        autocast = torch.autocast("cpu", dtype=torch.bfloat16, enabled=precision == "bf16")
        with torch.autograd.graph.saved_tensors_hooks(keep, lambda x: x), autocast:
            model(batch, torch.ones(len(lengths)))
    return sum(size for storage, size in kept.items() if storage not in weights)


def kept_weight_bytes(model: DiT, precision: str) -> int:
    """Return the bytes of weights that the forward pass computes and the backward pass needs again.

    With bf16 these are the bf16 copies of the weights in matrix products. With float32 they are the sums of weights and
    adapters; activation checkpointing computes the sums again, one block at a time.
    """
    summed = merged_numbers(model)
    if precision == "bf16":
        repeated = summed - merged_numbers(model, once=True)
        return 2 * (model.weights_per_token + model.weights_per_sequence + repeated)
    return 4 * summed // (len(model.blocks) if model.checkpointing else 1)


def with_available_data(config: TrainConfig) -> TrainConfig:
    """Return the config. If its data do not exist yet, print a message and return it with `data.path=auto`.

    The estimate can use other data instead, because it depends only on the lengths of the proteins. A config with
    trainer.epochs is returned unchanged, because its number of steps depends on the data.
    """
    paths = list(config.data.path) if isinstance(config.data.path, list) else [config.data.path]
    paths += [config.data.members] if config.data.members is not None else []
    missing = next((path for path in paths if path != "auto" and not Path(path).exists()), None)
    if missing is None or config.trainer.max_steps is None:
        return config
    console.print(
        f"{missing} does not exist: protein lengths and epochs are estimated from other data (data.path=auto)"
    )
    return replace(config, data=replace(config.data, path="auto", weights=None, context="none", members=None))


def plan(
    config: TrainConfig,
    store: StoreGroup,
    device: torch.device,
    precision: str,
    processes: int,
    peak: float | None = None,
) -> dict[str, Any]:
    """Return estimates for a run by name: its parameters, FLOPs, bytes of memory and seconds.

    Args:
        processes: number of processes of the run.
        peak: FLOP/s of the device's matrix products; measured if None.
    """
    data, optim = config.data, config.optim
    train = store.split("train")
    dataset = training_packs(config, store)
    with torch.device("meta"):
        model = build_model(config.model, "sdpa", config.time_conditioning)
        optimizer = make_optimizer(model, replace(optim, weight_decay=0.0), "fp32")
    parameters = sum(parameter.numel() for parameter in model.parameters())
    trained = sum(parameter.numel() for parameter in trained_parameters(model).values())
    by_muon = sum(p.numel() for p in optimizer.param_groups[0]["params"]) if isinstance(optimizer, Muon) else 0
    chosen = np.random.default_rng(0).choice(len(train), min(100_000, len(train)), replace=False)
    rows = train[np.sort(chosen)]
    if isinstance(dataset, MemberDataset):
        rows = dataset.draw(rows, epoch=0)
    tokens = np.minimum(dataset.group.lengths[rows], data.max_len).astype(np.int64) + 2
    flops = model.training_flops(tokens.tolist()) / int(tokens.sum())
    per_token = activation_bytes(config, precision, counted_backend(config, device, precision))
    step_tokens, steps = optim.packs_per_step * data.tokens_per_pack, count_steps(config, dataset)
    peak = matmul_peak(device, precision) if peak is None else peak
    devices = processes if device.type == "cuda" else 1  # processes on a CPU share its cores
    return {
        "parameters": parameters,
        "trained_parameters": trained,
        "flops_per_token": flops,
        "step_tokens": step_tokens,
        "sequences": len(dataset.rows),
        "steps": steps,
        "epochs": steps * optim.packs_per_step / dataset.packs_per_epoch,
        # in float32: weights, and for those that are trained also gradients, averages and the optimizer's state (AdamW
        # keeps two numbers for each weight that it updates, Muon one)
        "state_bytes": 4 * (parameters + 4 * trained - by_muon) + kept_weight_bytes(model, precision),
        "activation_bytes_per_token": per_token,
        "pack_bytes": per_token * data.tokens_per_pack,
        "peak_flops": peak,
        "seconds": steps * step_tokens * flops / (MFU * peak * devices),
    }


def is_worth_compiling(config: TrainConfig, store: StoreGroup) -> bool:
    """Whether a run on a CPU takes so many FLOPs that compiling its network saves time."""
    with torch.device("meta"):
        model = build_model(config.model, "sdpa", config.time_conditioning)
    length = config.data.max_len + 2
    tokens: float
    if config.trainer.max_steps is not None:
        tokens = config.trainer.max_steps * config.optim.packs_per_step * config.data.tokens_per_pack
    else:
        assert config.trainer.epochs is not None  # check_train_config requires exactly one of the two
        tokens = config.trainer.epochs * int(store.token_counts[0].sum())
    return tokens * model.training_flops([length]) / length >= LONG_RUN_FLOPS


def warning_of_epochs(epochs: float, sequences: int) -> str | None:
    """Return a warning if the run passes over its training sequences more than MANY_EPOCHS times, else None."""
    if epochs <= MANY_EPOCHS:
        return None
    return (
        f"warning: {epochs:,.0f} epochs of only {sequences:,} training sequences; train on more sequences "
        "(data.path), or set fewer steps (trainer.max_steps, or trainer.epochs with trainer.max_steps=null)"
    )


def describe_members(group: ClusterGroup) -> str:
    """Return a sentence about the sequences that an epoch reads in place of the clusters' representatives."""
    sizes = group.members.sizes(group.split("train"))
    empty, members = int((sizes == 0).sum()), group.members
    alone = f"; {empty:,} of these clusters have no member, and their representatives are read" if empty else ""
    return (
        f"each epoch reads a random member of each of {len(sizes):,} training clusters, which have "
        f"{int(sizes.sum()):,} members in {members.store.path} ({members.path}){alone}"
    )


def three_digits(x: float) -> str:
    """Format a number with three significant digits, or as a whole number if it is at least 100."""
    return f"{x:,.0f}" if x >= 100 else f"{x:.3g}"


def print_plan(
    config: TrainConfig,
    store: StoreGroup,
    device: torch.device,
    precision: str,
    processes: int,
    *,
    own_data: bool = True,
    peak: float | None = None,
) -> None:
    """Print the estimates of `plan` as a table.

    Args:
        own_data: whether `store` has the data of the run. If not, no warning about its number of sequences is printed.
        peak: FLOP/s of the device's matrix products; measured if None.
    """
    costs = plan(config, store, device, precision, processes, peak)
    tokens = costs["steps"] * costs["step_tokens"]
    per_token, kept, hours = costs["flops_per_token"], costs["activation_bytes_per_token"], costs["seconds"] / 3600
    gib = {key: costs[f"{key}_bytes"] / 2**30 for key in ("state", "pack")}
    recomputed = ", recomputed in the backward pass" if config.model.checkpointing else ""
    backend = counted_backend(config, device, precision)
    residues = longest_counted(config, backend) - 2
    longest = f"attention's activations are those of {backend} for proteins of {residues:,} residues"
    longest += "; flex keeps less" if has_bias(config) else ""
    trained = f"{three_digits(costs['trained_parameters'] / 1e6)} M are trained ({config.model.lora.description})"
    rows = {
        "network": [kinds_of(config.model, config.model.attention_backend)],
        "parameters": [
            f"{costs['parameters'] / 1e6:,.1f} M",
            *([trained] if config.model.lora.rank is not None else []),
        ],
        "data": [store.name, f"{int(store.token_counts[0].sum()):,} training tokens"],
        **({"members": [describe_members(store)]} if isinstance(store, ClusterGroup) else {}),
        "step": [
            f"{config.optim.packs_per_step} packs x {config.data.tokens_per_pack:,} = {costs['step_tokens']:,} tokens",
            f"{per_token * costs['step_tokens'] / 1e12:,.2f} TFLOP",
        ],
        "run": [f"{costs['steps']:,} steps = {tokens / 1e9:,.3f} G tokens = {costs['epochs']:,.2f} epochs"],
        "FLOPs": [f"{per_token / 1e9:,.3f} GFLOP per token", f"{per_token * tokens:.2e} in total"],
        "memory": [
            f"{sum(gib.values()):,.2f} GiB per process",
            f"{gib['state']:,.2f} for weights, gradients, averages and optimizer",
            f"{gib['pack']:,.2f} for activations, {kept / 1024:,.0f} KiB per token{recomputed}",
            *([longest] if has_bias(config) or backend == "matmul" else []),
        ],
        "time": [
            f"{three_digits(hours)} hours = {three_digits(hours / 24)} days on {processes} x {device}",
            f"matrix products reach {costs['peak_flops'] / 1e12:,.2f} TFLOP/s in {precision}",
            f"the time assumes {MFU:.0%} of this rate",
        ],
        "on an H100": [
            f"{three_digits(per_token * tokens / (MFU * H100_FLOPS) / 86400)} days",
            f"assuming {MFU:.0%} of the {H100_FLOPS / 1e12:.0f} TFLOP/s in its data sheet",
        ],
    }
    console.print("\n".join(f"{name:<11} {'; '.join(parts)}" for name, parts in rows.items()))
    warning = warning_of_epochs(costs["epochs"], costs["sequences"])
    if warning and own_data:
        console.print(warning)
