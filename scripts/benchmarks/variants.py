"""The training steps that the benchmarks compare (variants): on packs, or on the batches of a baseline."""

import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import count, cycle, islice
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from hydra import compose, initialize_config_dir
from omegaconf import DictConfig
from torch import Tensor

from protlig_dd.batch import PackedBatch, StaticShape, sequence_slots
from protlig_dd.config.read import config_folder, read_config
from protlig_dd.config.train import TrainConfig
from protlig_dd.data.loader import PackDataset
from protlig_dd.data.store import StoreGroup
from protlig_dd.diffusion.graphs.absorbing import Absorbing
from protlig_dd.diffusion.noise import LogLinearNoise
from protlig_dd.model.config import ModelConfig
from protlig_dd.model.dit import DiT
from protlig_dd.model.layers import modulate
from protlig_dd.model.mixers.attention import GRAPHABLE, resolve_attention_backend
from protlig_dd.model.positions.rotary import apply_rotary_pos_emb, rotary_cos_sin
from protlig_dd.system.distributed import ALONE
from protlig_dd.system.signals import StopRequests
from protlig_dd.tokenizer import PAD
from protlig_dd.training.context import RunContext, Start
from protlig_dd.training.objective import Objective
from protlig_dd.training.trainer import Trainer, count_residues

MODELS = {
    "256 x 2": {"hidden_size": 256, "n_heads": 8, "n_blocks": 2},
    "384 x 6": {"hidden_size": 384, "n_heads": 6, "n_blocks": 6},
    "768 x 12": {"hidden_size": 768, "n_heads": 12, "n_blocks": 12},
}
NETWORK: dict[str, Any] = {
    "cond_dim": 128,
    "dropout": 0.0,
    "attention_backend": "auto",
    "norm": "layer",
    "mlp": "gelu",
    "qk_norm": False,
    "checkpointing": False,
}
DEFAULT_NETWORK = {"time_conditioning": False, "qk_norm": True, "norm": "rms"}
TRAINED = (
    "optim.lr=1e-3",
    "optim.betas=[0.9,0.99]",
    "optim.ema_decay=0.999",
    "optim.packs_per_step=1",
    "optim.warmup_steps=0",
    "optim.min_lr_ratio=1",
    "trainer.max_steps=1000000",
    "seed=0",
)
LOADED = 100  # batches for each variant; at max_len 512 their padding ratio is within 2% of the full data set's


class RectangleDiT(DiT):
    """Computes a DiT on rectangular batches (sequences, length), with one attention call per block and no mask.

    The input is a pack whose sequences were padded or cut to the same length.
    """

    def forward(self, batch: PackedBatch, sigma: Tensor) -> Tensor:
        length = batch.max_seqlen
        cos, sin = rotary_cos_sin(length, self.positions.head_dim, device=sigma.device)
        x = self.embedding(batch.tokens.view(-1, length))
        assert self.sigma_embedding is not None
        cond = self.sigma_embedding(sigma)
        for block in self.blocks:
            shift_a, scale_a, gate_a, shift_m, scale_m, gate_m = block.adaln(cond)[:, None].chunk(6, dim=-1)
            h = modulate(block.attention_norm(x), shift_a, scale_a)
            qkv = block.qkv(h).unflatten(-1, (3, block.mixer.n_heads, self.positions.head_dim))
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
    """Yield the sequences of the packs in order, `sequences` at a time, each padded to `length` with <pad>."""
    waiting: list[Tensor] = []
    for pack in packs:
        waiting += pack.unpack(pack.tokens)
        while len(waiting) >= sequences:
            yield PackedBatch.pack(
                [F.pad(tokens, (0, length - len(tokens)), value=PAD) for tokens in waiting[:sequences]]
            )
            del waiting[:sequences]


def blocks(packs: Iterator[PackedBatch], rows: int, length: int) -> Iterator[PackedBatch]:
    """Join the tokens of the packs into one stream, and cut it into blocks of `length` tokens.

    Yield `rows` blocks at a time. SEDD cuts its texts this way. A block can contain several proteins, which attend to
    each other.
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
    """Mean number of amino acids in a step's batch, without special tokens such as <pad>."""
    flops: float
    """Mean FLOPs of a step's matrix products. The padding of packs for compiled networks on GPUs does not count."""
    slots: int
    """Number of tokens in a step's batch, including <pad>. For packs: the token budget, even if packs have fewer."""
    first_s: float = 0.0


@dataclass(frozen=True)
class Setup:
    """Settings shared by the variants of a comparison."""

    store: StoreGroup
    sizes: dict[str, int]
    """ModelConfig fields of the network's size."""
    max_len: int
    tokens: int
    """Maximum number of tokens in a pack, or in a batch of a baseline."""
    device: torch.device


def make_variant(
    name: str, setup: Setup, precision: str, *, baseline: str | None = None, compiled: bool = False, **options: Any
) -> Variant:
    """Return a variant with a network and a trainer of its own. All variants of a setup read the same packs.

    Args:
        baseline: padded | concatenated; None for packs. A batch of a baseline has rows of max_len + 2 tokens, as many
            as fit in `setup.tokens`.
        compiled: whether the network is compiled. On a GPU, packs are then also padded to a fixed shape, and CUDA
            graphs are used if the attention backend and the mixers support them.
        options: fields of ModelConfig, and also `time_conditioning` and `optimizer`.
    """
    time_conditioning, optimizer = options.pop("time_conditioning", True), options.pop("optimizer", "adamw")
    network = ModelConfig(**{**NETWORK, **setup.sizes, **options})
    context = context_of(setup.device, precision, network)
    torch.manual_seed(0)
    with setup.device:
        model = (RectangleDiT if baseline else DiT)(
            network, context.attention_backend, time_conditioning=time_conditioning
        )
    dataset = PackDataset(
        setup.store, setup.store.split("train"), seed=0, max_len=setup.max_len, tokens_per_pack=setup.tokens
    )
    if compiled:
        model.compile_blocks(dynamic=setup.device.type != "cuda")
        if setup.device.type == "cuda":
            spare = sequence_slots(setup.tokens, dataset.mean_tokens)
            model.pad_packs(StaticShape(setup.tokens, spare, setup.max_len + 2))
            if context.attention_backend in GRAPHABLE and not model.uncapturable:  # as in a training run
                model.capture(context.autocast)
    objective = Objective(Absorbing(), LogLinearNoise(), "x0", time_conditioning, context.autocast)
    config = read_config(composed(f"optim={optimizer}", *TRAINED), TrainConfig)
    trainer = Trainer(model, objective, dataset, config, context)
    stream: Iterator[PackedBatch] = (dataset[i] for i in count())
    if baseline:
        cut = {"padded": rectangles, "concatenated": blocks}[baseline]
        stream = cut(stream, setup.tokens // (setup.max_len + 2), setup.max_len + 2)
    ready = list(islice(stream, LOADED))  # loaded in advance, so that the loader is not measured
    batches = cycle([batch.pin_memory() for batch in ready] if setup.device.type == "cuda" else ready)
    steps = count()
    residues = statistics.mean(count_residues(batch) for batch in ready)
    flops = 3 * statistics.mean(model.flops(batch.lengths) for batch in ready)
    slots = len(ready[0].tokens) if baseline else setup.tokens
    return Variant(name, lambda: trainer.step(next(steps), batches, []), precision, residues, flops, slots)


def context_of(device: torch.device, precision: str, network: ModelConfig) -> RunContext:
    """Return the context of a single process that writes no files."""
    backend = resolve_attention_backend("auto", device, precision, network.head_dim, network.positions)
    return RunContext(
        folder=Path(),
        attempt=1,
        start=Start(),
        device=device,
        precision=precision,
        attention_backend=backend,
        compiled=False,
        processes=ALONE,
        stop=StopRequests(),
        deadline=None,
    )


def composed(*overrides: str, name: str = "train") -> DictConfig:
    with initialize_config_dir(str(config_folder()), version_base=None):
        return compose(name, overrides=list(overrides))


def timed(variant: Variant, steps: int, device: torch.device) -> float:
    """Run `steps` steps of a variant, and return the mean seconds of a step."""
    began = time.perf_counter()
    for _ in range(steps):
        variant.step()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return (time.perf_counter() - began) / max(1, steps)
