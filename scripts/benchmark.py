"""Measure training on real proteins against padded batches and a concatenated stream, sampling, and how costs grow:

    python -m scripts.benchmark throughput cost profile presets sampling growth --fasta FILE

The baseline is the same network on batches padded to max_len, in float32, eager, with AdamW; beside it stands SEDD's,
all proteins end to end as one stream that is cut into blocks of max_len + 2 tokens. Every figure is a ratio of
steps that were made in turn in this one process; only real residues count. Prints Markdown tables and writes JSON.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from functools import partial
from itertools import count, cycle, islice, repeat
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from hydra import compose, initialize_config_dir
from torch import Tensor
from torch.distributed import init_process_group
from torch.nn.parallel import DistributedDataParallel
from torch.profiler import ProfilerActivity, profile

from protlig_dd.batch import PackedBatch, StaticShape, spare_sequences
from protlig_dd.config.read import config_folder, read_config
from protlig_dd.config.train import TrainConfig
from protlig_dd.data.loader import PackDataset
from protlig_dd.data.prepare.bundled import bundled_store
from protlig_dd.data.store import SequenceStore, StoreGroup
from protlig_dd.diffusion.graphs.absorbing import Absorbing
from protlig_dd.diffusion.noise import LogLinearNoise
from protlig_dd.diffusion.sampling import sample
from protlig_dd.diffusion.score import ScoreFn
from protlig_dd.model.dit import DiT
from protlig_dd.model.layers import modulate
from protlig_dd.model.mixers.attention import resolve_attention_backend
from protlig_dd.model.positions.rotary import apply_rotary_pos_emb, rotary_cos_sin
from protlig_dd.system.device import matmul_peak, peak_memory, resolve_device, resolve_precision
from protlig_dd.system.distributed import Processes
from protlig_dd.system.terminal import ProgressBar
from protlig_dd.tokenizer import PAD
from protlig_dd.training.cost import H100_FLOPS, MFU, plan
from protlig_dd.training.optim.make import make_optimizer
from protlig_dd.training.trainer import Trainer, count_residues
from scripts.benchmark_data import table

MODELS = {
    "256 x 2": {"hidden_size": 256, "n_heads": 8, "n_blocks": 2},
    "384 x 6": {"hidden_size": 384, "n_heads": 6, "n_blocks": 6},
    "768 x 12": {"hidden_size": 768, "n_heads": 12, "n_blocks": 12},
}

LOADED = 100  # packs; at 512 their padding ratio is within 2% of the whole set's
SAMPLED = {"hidden_size": 256, "n_heads": 8, "n_blocks": 2, "cond_dim": 128, "dropout": 0.0}


class RectangleDiT(DiT):
    """The same network, computed as on a rectangle: (sequences, length) with one attention call and no mask.

    It reads a pack whose sequences were all filled up, or cut, to the same length.
    """

    def forward(self, batch: PackedBatch, sigma: Tensor) -> Tensor:
        length = batch.max_seqlen
        cos, sin = rotary_cos_sin(length, self.head_dim, device=sigma.device)
        x = self.embedding(batch.tokens.view(-1, length))
        assert self.sigma_embedding is not None
        cond = self.sigma_embedding(sigma)
        for block in self.blocks:
            shift_a, scale_a, gate_a, shift_m, scale_m, gate_m = block.adaln(cond)[:, None].chunk(6, dim=-1)
            h = modulate(block.attention_norm(x), shift_a, scale_a)
            qkv = block.qkv(h).unflatten(-1, (3, block.n_heads, self.head_dim))
            q, k, v = apply_rotary_pos_emb(qkv, cos, sin).permute(2, 0, 3, 1, 4)
            attended = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
            x = x + gate_a * F.dropout(block.attention_out(attended), block.dropout, self.training)
            hidden = block.mlp(modulate(block.mlp_norm(x), shift_m, scale_m))
            x = x + gate_m * F.dropout(hidden, block.dropout, self.training)
        shift, scale = self.head.adaln(cond)[:, None].chunk(2, dim=-1)
        x = modulate(self.head.norm(x), shift, scale).flatten(0, 1)
        with torch.autocast(x.device.type, enabled=False):
            return self.head.out(x.float())


def rectangles(packs: Iterator[PackedBatch], sequences: int, length: int) -> Iterator[PackedBatch]:
    """The same sequences in the same order, so many at a time, each filled up to `length` with <pad>."""
    waiting: list[Tensor] = []
    for pack in packs:
        waiting += pack.unpack(pack.tokens)
        while len(waiting) >= sequences:
            yield PackedBatch.pack([F.pad(one, (0, length - len(one)), value=PAD) for one in waiting[:sequences]])
            del waiting[:sequences]


def blocks(packs: Iterator[PackedBatch], rows: int, length: int) -> Iterator[PackedBatch]:
    """The same tokens in the same order as one stream, cut every `length` tokens, so many blocks at a time.

    As SEDD cuts its texts: a block holds the end of one protein and the start of the next, which see one another.
    """
    left = torch.empty(0, dtype=torch.int64)
    for pack in packs:
        left = torch.cat([left, pack.tokens])
        while len(left) >= rows * length:
            yield PackedBatch.from_flat(left[: rows * length], [length] * rows)
            left = left[rows * length :]


@dataclass
class Variant:
    name: str
    step: Callable[[], object]
    precision: str
    residues: float
    """Real ones of a step, on average."""
    flops: float
    """That they need in the packed network."""
    slots: int
    """That are computed, <pad> included; on a GPU packs are filled up to their budget."""
    first_s: float = 0.0


def make_variant(
    name: str,
    store: StoreGroup,
    sizes: dict[str, int],
    *,
    max_len: int,
    tokens: int,
    device: torch.device,
    precision: str,
    baseline: str | None = None,
    compiled: bool = False,
    filled: bool = False,
    graphed: bool = False,
    **options: Any,
) -> Variant:
    """A trainer of its own over the same packs.

    Args:
        baseline: padded or concatenated; it takes as many rows of max_len as have fewer slots than `tokens`.
    """
    time_conditioning, optimizer = options.pop("time_conditioning", True), options.pop("optimizer", "adamw")
    backend = resolve_attention_backend("auto", device, precision, sizes["hidden_size"] // sizes["n_heads"])
    torch.manual_seed(0)
    with device:
        model = (RectangleDiT if baseline else DiT)(
            **sizes,
            cond_dim=128,
            dropout=0.0,
            attention_backend=backend,
            time_conditioning=time_conditioning,
            **options,
        )
    dataset = PackDataset(store, store.split("train"), seed=0, max_len=max_len, tokens_per_pack=tokens)
    if compiled:
        model.compile_blocks(dynamic=not filled)
    if filled or graphed:
        model.fill_packs(StaticShape(tokens, spare_sequences(tokens, dataset.mean_tokens), max_len + 2))
    if graphed:
        model.capture(torch.bfloat16 if precision == "bf16" else None)
    autocast = torch.bfloat16 if precision == "bf16" else None
    noise, graph = LogLinearNoise(), Absorbing()
    trainer = Trainer(
        model=model,
        make_score=lambda network: ScoreFn(network, graph, "x0", time_conditioning, autocast),
        graph=graph,
        noise=noise,
        optimizer=make_optimizer(
            optimizer, model, lr=1e-3, betas=(0.9, 0.99), eps=1e-8, weight_decay=0.0, precision=precision
        ),
        dataset=dataset,
        device=device,
        processes=Processes(0, 1, 0),
        seed=0,
        packs_per_step=1,
        max_steps=10**6,
        learning_rate=lambda step: 1e-3,
        grad_clip=1.0,
        ema_decay=0.999,
        curriculum_steps=0,
    )
    stream: Iterator[PackedBatch] = (dataset[i] for i in count())
    if baseline:
        cut = {"padded": rectangles, "concatenated": blocks}[baseline]
        stream = cut(stream, tokens // (max_len + 2), max_len + 2)
    ready = list(islice(stream, LOADED))  # the loader, which is far ahead in training, is not measured
    batches = cycle([batch.pin_memory() for batch in ready] if device.type == "cuda" else ready)
    steps = count()
    residues = statistics.mean(count_residues(batch) for batch in ready)
    flops = 3 * statistics.mean(model.flops(batch.lengths) for batch in ready)
    slots = len(ready[0].tokens) if baseline else tokens
    return Variant(name, lambda: trainer.step(next(steps), batches, []), precision, residues, flops, slots)


def timed(variant: Variant, steps: int, device: torch.device) -> float:
    """Seconds of a step, of so many."""
    began = time.perf_counter()
    for _ in range(steps):
        variant.step()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return (time.perf_counter() - began) / steps


def throughput(arguments: argparse.Namespace) -> list[dict[str, Any]]:
    """Residues/s of each variant, in turn, against the padded baseline."""
    device = resolve_device(arguments.device)
    best = resolve_precision(arguments.precision, device)
    store = open_store(arguments.fasta, arguments.folder)
    found = []
    for size in arguments.models:
        for max_len in arguments.max_len:
            make = partial(
                make_variant, store=store, sizes=MODELS[size], max_len=max_len, tokens=arguments.tokens, device=device
            )
            variants = [make("padded fp32, eager (baseline)", precision="fp32", baseline="padded")]
            if best == "bf16":
                variants.append(make("padded bf16, eager", precision="bf16", baseline="padded"))
            for precision in dict.fromkeys(("fp32", best)):
                variants.append(make(f"concatenated {precision}, eager", precision=precision, baseline="concatenated"))
            variants.append(make(f"packed {best}, eager", precision=best))
            fast = {"compiled": True}
            if device.type == "cuda":
                fast |= {"filled": True, "graphed": True}
            how = "compiled, CUDA graphs" if device.type == "cuda" else "compiled"
            variants.append(make(f"packed {best}, {how}", precision=best, **fast))
            default = {"time_conditioning": False, "qk_norm": True, "norm": "rms"}
            if device.type == "cpu":
                variants.append(make(f"packed {best}, eager, the default network", precision=best, **default))
            variants.append(make(f"packed {best}, {how}, the default network", precision=best, **fast, **default))
            found += compare(variants, arguments, device, size, max_len)
    return found


def cost(arguments: argparse.Namespace) -> list[dict[str, Any]]:
    """What the arms of scripts/arms.py cost for each residue, eager, against the SEDD network with AdamW."""
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
            make_variant(name, store, MODELS[size], max_len=512, tokens=arguments.tokens, device=device,
                         precision=precision, **options)
            for name, options in arms.items()
        ]  # fmt: skip
        found += compare(variants, arguments, device, size, 512)
    return found


def compare(
    variants: list[Variant],
    arguments: argparse.Namespace,
    device: torch.device,
    size: str,
    max_len: int,
) -> list[dict[str, Any]]:
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
        ratios = [mine / theirs for mine, theirs in zip(rates[variant.name], base, strict=True)]
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
    print(f"\n{size}, max_len {max_len}, {arguments.tokens} tokens a pack, {device}\n")
    table(
        ["variant", "residues/s", "ratio to the baseline (lowest, highest)", "slots a residue", "MFU", "first step, s"],
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


def sampling(arguments: argparse.Namespace) -> list[dict[str, Any]]:
    """Sequences/s of `sample`, asked anew at every step, and with the scores kept of sequences that did not change."""
    device = resolve_device(arguments.device)
    precision = resolve_precision(arguments.precision, device)
    backend = resolve_attention_backend("auto", device, precision, 32)
    torch.manual_seed(0)
    with device:
        model = DiT(**SAMPLED, attention_backend=backend, time_conditioning=False).eval()
    graph, autocast = Absorbing(), torch.bfloat16 if precision == "bf16" else None
    rows = []
    with ProgressBar("sampling", len(arguments.sampling_steps) * arguments.repeats) as bar:
        for steps in arguments.sampling_steps:
            rates: dict[bool, list[float]] = {False: [], True: []}
            for repeat in range(arguments.repeats):
                for keep, found in rates.items():
                    # a network that is said to look at sigma is asked at every step
                    score_fn = ScoreFn(model, graph, "x0", time_conditioning=not keep, autocast=autocast)
                    began = time.perf_counter()
                    generator = torch.Generator().manual_seed(repeat)
                    sample(score_fn, LogLinearNoise(), [300] * 4, steps, "analytic", generator, device=device)
                    found.append(4 / (time.perf_counter() - began))
                bar.advance()
            plain, kept = (statistics.median(rates[keep]) for keep in (False, True))
            gain = statistics.median(a / b for a, b in zip(rates[True], rates[False], strict=True))
            rows.append({"steps": steps, "sequences_per_s": plain, "sequences_per_s_kept": kept, "gain": gain})
    print(f"\n4 proteins of 300 residues at a time, {SAMPLED['hidden_size']} x {SAMPLED['n_blocks']}, {device}\n")
    table(
        ["steps", "sequences/s, asked at every step", "sequences/s, unchanged ones skipped", "gain"],
        [
            [str(row["steps"]), *(f"{row[key]:.3f}" for key in ("sequences_per_s", "sequences_per_s_kept")),
             f"{row['gain']:.2f}"]
            for row in rows
        ],
    )  # fmt: skip
    return rows


def profiled(arguments: argparse.Namespace) -> list[dict[str, Any]]:
    """Where the time of an eager packed step goes: shares of what each operator takes by itself."""
    device = resolve_device(arguments.device)
    precision, store = resolve_precision(arguments.precision, device), open_store(arguments.fasta, arguments.folder)
    networks = {"SEDD network": {}, "default network": {"time_conditioning": False, "qk_norm": True, "norm": "rms"}}
    shares: dict[str, dict[str, float]] = {}
    for size in arguments.models:
        for name, options in networks.items():
            variant = make_variant(name, store, MODELS[size], max_len=arguments.max_len[0], tokens=arguments.tokens,
                                   device=device, precision=precision, **options)  # fmt: skip
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
    ranked = sorted({key for one in shares.values() for key in one}, key=lambda key: -shares[columns[0]].get(key, 0.0))
    print(f"\nShares of a packed step of {arguments.tokens} tokens, {precision}, eager, {device}\n")
    table(
        ["operator", *columns],
        [
            [f"`{key}`", *(f"{shares[column].get(key, 0.0):.1%}" for column in columns)]
            for key in ranked
            if max(shares[column].get(key, 0.0) for column in columns) > 0.01
        ],
    )
    return [{"network": column, "shares": shares[column]} for column in columns]


def presets(arguments: argparse.Namespace) -> list[dict[str, Any]]:
    """What `plan=true` says of each preset, and of it with activation checkpointing, in bf16."""
    store, rows = open_store(arguments.fasta, arguments.folder), []
    names = ("tiny", "small", "medium", "large")
    with initialize_config_dir(str(config_folder()), version_base=None), ProgressBar("presets", 4) as bar:
        for name in names:
            found = []
            for checkpointing in (False, True):
                wanted = [f"model={name}", f"model.checkpointing={checkpointing}"]
                config = read_config(compose("train", overrides=wanted), TrainConfig)
                config.time_conditioning = False
                found.append(plan(config, store, torch.device("cpu"), "bf16", 1, peak=H100_FLOPS))
            rows.append({"preset": name, **found[0], "checkpointed": found[1]["activation_bytes_per_token"]})
            bar.advance()
    print(f"\n{rows[0]['steps']:,} steps of {rows[0]['step_tokens']:,} tokens; an H100 at {MFU:.0%} of "
          f"{H100_FLOPS / 1e12:.0f} TFLOP/s, assumed\n")  # fmt: skip
    table(
        ["preset", "M parameters", "GFLOP a token", "GiB of weights, gradients, averages, optimizer",
         "KiB of activations a token", "with checkpointing", "days on an H100"],
        [
            [row["preset"], f"{row['parameters'] / 1e6:,.1f}", f"{row['flops_per_token'] / 1e9:.3f}",
             f"{row['state_bytes'] / 2**30:.2f}", f"{row['activation_bytes_per_token'] / 1024:,.0f}",
             f"{row['checkpointed'] / 1024:,.0f}",
             f"{row['steps'] * row['step_tokens'] * row['flops_per_token'] / (MFU * H100_FLOPS) / 86400:.2f}"]
            for row in rows
        ],
    )  # fmt: skip
    return rows


def growth(arguments: argparse.Namespace) -> list[dict[str, Any]]:
    """Time and memory of a forward and backward pass against what makes it larger, one thing at a time; each in a
    process of its own, or in two that exchange gradients.
    """
    tokens, size = arguments.tokens, MODELS[arguments.models[0]]
    base = {"tokens": tokens, "length": tokens // 8, "n_blocks": size["n_blocks"], "hidden_size": size["hidden_size"],
            "checkpointing": False, "ranks": 1}  # fmt: skip
    changes: dict[str, list[Any]] = {
        "tokens": [tokens // 2, tokens, 2 * tokens, 4 * tokens],
        "length": [tokens // 16, tokens // 8, tokens // 4, tokens // 2, tokens],
        "n_blocks": [size["n_blocks"] // 2, size["n_blocks"], 2 * size["n_blocks"]],
        "hidden_size": [size["hidden_size"] // 2, size["hidden_size"], 2 * size["hidden_size"]],
        "checkpointing": [False, True],
        "ranks": [1, 2],
    }
    rows = []
    with ProgressBar("growth", sum(map(len, changes.values()))) as bar:
        for what, values in changes.items():
            for value in values:
                spec = base | {what: value}
                with (
                    tempfile.TemporaryDirectory() as meeting,
                    ProcessPoolExecutor(spec["ranks"], mp_context=get_context("spawn")) as pool,
                ):
                    found = list(pool.map(step_cost, [spec] * spec["ranks"], range(spec["ranks"]), repeat(meeting)))
                ms, gib = max(one[0] for one in found), max(one[1] for one in found)
                rows.append({"what": what, "value": value, "ms_per_step": ms, "gib": gib, **spec})
                bar.advance()
    print(f"\nForward and backward pass of one pack of {base['tokens']} tokens in sequences of {base['length']}, "
          f"{base['hidden_size']} x {base['n_blocks']}, fp32, eager, cpu; changed is what the line says\n")  # fmt: skip
    table(
        ["what", "value", "ms", "us a token", "GiB above the weights", "KiB a token"],
        [
            [row["what"], str(row["value"]), f"{row['ms_per_step']:,.0f}",
             f"{1e3 * row['ms_per_step'] / row['tokens'] / row['ranks']:,.0f}", f"{row['gib']:.2f}",
             f"{row['gib'] * 2**20 / row['tokens']:,.0f}"]
            for row in rows
        ],
    )  # fmt: skip
    return rows


def step_cost(spec: dict[str, Any], rank: int, meeting: str) -> tuple[float, float]:
    """Median milliseconds of a forward and backward pass, and the GiB that it takes at its peak beside the model."""
    torch.set_num_threads(max(1, (os.cpu_count() or 1) // spec["ranks"]))
    torch.manual_seed(rank)
    width = spec["hidden_size"]
    model = DiT(hidden_size=width, n_heads=width // 64, n_blocks=spec["n_blocks"], cond_dim=128, dropout=0.0,
                attention_backend="sdpa", time_conditioning=False, qk_norm=True, norm="rms",
                checkpointing=spec["checkpointing"]).train()  # fmt: skip
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    wrapped: torch.nn.Module = model
    if spec["ranks"] > 1:
        init_process_group("gloo", init_method=f"file://{meeting}/ranks", rank=rank, world_size=spec["ranks"])
        wrapped = DistributedDataParallel(model)
    device = torch.device("cpu")
    length = spec["length"]
    batch = PackedBatch.pack([torch.randint(0, 20, (length,)) for _ in range(max(1, spec["tokens"] // length))])
    sigma = torch.ones(len(batch.lengths))
    before, times = peak_memory(device), []
    for _ in range(5):
        began = time.perf_counter()
        F.cross_entropy(wrapped(batch, sigma), batch.tokens).backward()
        times.append(time.perf_counter() - began)
    return 1e3 * statistics.median(times), (peak_memory(device) - before) / 2**30


def open_store(fasta: Path | None, folder: Path) -> StoreGroup:
    """The bundled proteins, or a store made of `fasta` once."""
    if fasta is None:
        return StoreGroup([SequenceStore(bundled_store().path)])
    store = folder / f"{fasta.name.split('.')[0]}.h5"
    if not store.exists():
        command = [sys.executable, "-m", "protlig_dd.prepare", f"input={fasta}", f"output={store}"]
        subprocess.run(command, check=True)
    return StoreGroup([SequenceStore(store)])


PARTS = {
    "throughput": throughput,
    "cost": cost,
    "profile": profiled,
    "presets": presets,
    "sampling": sampling,
    "growth": growth,
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("parts", nargs="*", default=["throughput"], help=f"of {', '.join(PARTS)}")
    parser.add_argument("--fasta", type=Path, help="proteins; without it the bundled ones")
    parser.add_argument("--folder", type=Path, default=Path("data"), help="for the store that is made of them")
    parser.add_argument("--models", nargs="+", default=list(MODELS)[1:], choices=list(MODELS))
    parser.add_argument("--max-len", nargs="+", type=int, default=[512, 1024])
    parser.add_argument("--tokens", type=int, default=4096, help="in a pack, and the most slots of a padded batch")
    parser.add_argument("--steps", type=int, default=3, help="that a variant makes in its turn")
    parser.add_argument("--warmup", type=int, default=2, help="steps before the first turn")
    parser.add_argument("--repeats", type=int, default=5, help="turns of each variant")
    parser.add_argument("--sampling-steps", nargs="+", type=int, default=[64, 256, 1024])
    parser.add_argument("--device", default="auto")
    parser.add_argument(
        "--precision", default="auto", choices=["auto", "fp32", "bf16"], help="of what is not a baseline"
    )
    parser.add_argument("--json", type=Path, default=Path("benchmark.json"), help="file to write")
    arguments = parser.parse_args()
    if unknown := set(arguments.parts) - PARTS.keys():
        parser.error(f"no part {', '.join(sorted(unknown))}; there are {', '.join(PARTS)}")
    if arguments.fasta is not None and not arguments.fasta.is_file():
        parser.error(f"{arguments.fasta}: no such file")
    result = {part: PARTS[part](arguments) for part in arguments.parts}
    arguments.json.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
