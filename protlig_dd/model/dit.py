"""The diffusion transformer (DiT, arXiv 2212.09748, as used by SEDD, arXiv 2310.16834) on packed tokens.

    tokens -> embedding -> n_blocks x [adaLN, mixer (attention by default), adaLN, MLP] -> adaLN -> 20 logits
    sigma  -> sinusoids -> MLP -> the shift, scale and gate of every adaLN

Without time conditioning sigma is ignored and each adaLN is a plain norm, as in an ordinary pre-norm transformer.

Shape suffixes: T tokens of the pack, n sequences, H hidden_size, C cond_dim.
"""

import math
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from typing import cast

import torch
import torch.nn.functional as F
from jaxtyping import Float, Float32
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from protlig_dd.batch import PackedBatch, StaticShape, check_tokens
from protlig_dd.model.block import Block
from protlig_dd.model.conditioning import SigmaEmbedding
from protlig_dd.model.config import HEADS, MLPS, NORMS, ModelConfig, unknown_choice
from protlig_dd.model.cuda_graph import capture
from protlig_dd.model.layers import EMBEDDING_STD, Head
from protlig_dd.model.mixers import MIXERS, mixers_of_blocks
from protlig_dd.model.mixers.attention import GRAPHABLE
from protlig_dd.model.mixers.scores import prepare_scores
from protlig_dd.model.positions import POSITIONS
from protlig_dd.tokenizer import MASK, N_STATES, PAD, VOCAB_SIZE

CPU_MULTIPLE = 64  # tokens
TRAINED_MASK_RATIO = 0.15 * 0.8  # ESM-2 chose 15% of the tokens for its loss and replaced 80% of these by <mask>


class DiT(nn.Module):
    """Maps a pack of tokens and one sigma per sequence to 20 logits per token.

    Args:
        config: the network's dimensions and the kinds of its parts.
        attention_backend: the resolved backend, flash_attn | torch_varlen | flex | matmul | sdpa.
        time_conditioning: False builds a network that ignores sigma.

    The output layer, every shift and every scale start at zero, so an untrained model returns zeros. The residual gates
    start at one (docs/decisions.md).

    Raises:
        ValueError: at construction, if the config's dimensions are inconsistent or the backend cannot compute the
            position encoding. At the start of forward, if the batch is not a PackedBatch, is on another device than the
            weights, does not have one sigma per sequence or has a sequence longer than model.max_positions.
    """

    def __init__(self, config: ModelConfig, attention_backend: str, *, time_conditioning: bool = True) -> None:
        super().__init__()
        check_model(config)
        self.attention_backend, self.checkpointing = attention_backend, config.checkpointing
        self.token_dropout = config.token_dropout
        self.kinds = kinds_of(config, attention_backend)
        self.shape: StaticShape | None = None
        self.graphed: Callable[..., Tensor] | None = None
        self.positions = POSITIONS[config.positions](config)
        self.embedding = nn.Embedding(VOCAB_SIZE, config.hidden_size)
        self.sigma_embedding = SigmaEmbedding(config.cond_dim) if time_conditioning else None
        self.blocks = nn.ModuleList(
            Block(config, mixer, attention_backend, self.positions, time_conditioning=time_conditioning)
            for mixer in mixers_of_blocks(config)
        )
        self.attends = [number in config.attention_blocks for number in range(config.n_blocks)]
        self.uncapturable = sorted({name for name in mixers_of_blocks(config) if not MIXERS[name].capturable})
        cond_dim = config.cond_dim if time_conditioning else None
        self.head = Head(
            config.hidden_size, cond_dim, config.norm, config.norm_eps, kind=config.head, tied=config.tie_weights
        )
        nn.init.normal_(self.embedding.weight, std=EMBEDDING_STD)
        linear = {name: part.weight.numel() for name, part in self.named_modules() if isinstance(part, nn.Linear)}
        self.weights_per_sequence = sum(n for name, n in linear.items() if "adaln" in name or "sigma" in name)
        self.weights_per_token = sum(linear.values()) - self.weights_per_sequence
        if config.tie_weights:
            self.weights_per_token += N_STATES * config.hidden_size
        self.frozen_per_token = 0  # weights per token without a gradient; set by `add_adapters`

    def forward(self, batch: PackedBatch, sigma: Float32[Tensor, " n"]) -> Float[Tensor, "total 20"]:
        """Return the logits (total, 20) of a pack at noise levels sigma (n,), one per sequence."""
        self.check(batch, sigma)
        shape = self.padded_shape(batch)
        if shape is None:
            return self.network(batch, sigma)
        total, n = len(batch.tokens), len(batch.lengths)
        batch, sigma = batch.padded_to(shape), F.pad(sigma, (0, shape.sequences - n))
        if self.graphed is None:
            return self.network(batch, sigma).narrow(0, 0, total)
        logits = self.graphed(batch.tokens, batch.cu_seqlens, batch.segment_ids, batch.positions, sigma)
        return logits.narrow(0, 0, total)

    def hidden_states(
        self, batch: PackedBatch, sigma: Float32[Tensor, " n"], layer: int
    ) -> Float[Tensor, "total hidden"]:
        """Return the hidden state of each token, (total, hidden).

        Args:
            layer: 0 for the embedding, k for the residual stream after k blocks, n_blocks for the input of the output
                projection (after the final norm, as in ESM-2).

        Raises:
            ValueError: as in forward, or a layer outside 0..n_blocks. However, a sequence longer than
                model.max_positions is an error only if the first `layer` blocks include attention.
        """
        self.check(batch, sigma)
        if not 0 <= layer <= len(self.blocks):
            raise ValueError(f"layer must be from 0 (the embedding) to {len(self.blocks)}, got {layer}")
        x_TH, cond_nC = self.trunk(batch, sigma, layer)
        return x_TH if layer < len(self.blocks) else self.head.normed(x_TH, cond_nC, batch.segment_ids)

    def network(self, batch: PackedBatch, sigma: Tensor) -> Tensor:
        """Return the logits (total, 20), without checking the inputs."""
        x_TH, cond_nC = self.trunk(batch, sigma, len(self.blocks))
        return self.head(x_TH, cond_nC, batch.segment_ids, self.embedding.weight)

    def trunk(self, batch: PackedBatch, sigma: Tensor, n_blocks: int) -> tuple[Tensor, Tensor | None]:
        """Return the residual stream after the first n_blocks blocks, and the embedding of sigma.

        The embedding is None without time conditioning.
        """
        tables = self.positions.tables(batch)
        scores = prepare_scores(
            self.positions, batch, self.attention_backend, self.attends[:n_blocks], self.compute_dtype()
        )
        cond_nC = None if self.sigma_embedding is None else self.sigma_embedding(sigma)
        x_TH = self.embedding(batch.tokens)
        if self.token_dropout:
            x_TH = drop_masked(x_TH, batch)
        x_TH = self.positions.add(x_TH, batch)
        # `scores` has n_blocks entries, so the loop ends after the first n_blocks blocks
        for block, block_scores in zip(self.blocks, scores, strict=False):
            if self.checkpointing and torch.is_grad_enabled():
                x_TH = checkpoint(block, x_TH, cond_nC, batch, tables, block_scores, use_reentrant=False)
            else:
                x_TH = block(x_TH, cond_nC, batch, tables, block_scores)
        return x_TH, cond_nC

    def compute_dtype(self) -> torch.dtype:
        """Return the dtype of queries, keys and values: autocast's dtype if autocast applies, else the weights'."""
        weight = self.embedding.weight
        autocast = torch.is_autocast_enabled(weight.device.type) and weight.dtype != torch.float64
        return torch.get_autocast_dtype(weight.device.type) if autocast else weight.dtype

    def check(self, batch: PackedBatch, sigma: Tensor) -> None:
        """Raise a ValueError unless `batch` is a PackedBatch on the weights' device with one sigma per sequence."""
        if not isinstance(batch, PackedBatch):
            check_tokens(batch)
            raise ValueError(f"the model's input must be a PackedBatch, got {type(batch).__name__}")
        weight = self.embedding.weight
        for name, tensor in (("tokens", batch.tokens), ("sigma", sigma)):
            if tensor.device != weight.device:
                raise ValueError(f"{name} is on {tensor.device} but the model is on {weight.device}")
        if tuple(sigma.shape) != (len(batch.lengths),):
            raise ValueError(f"sigma has shape {tuple(sigma.shape)} for {len(batch.lengths)} sequences")

    def compile_blocks(self, *, dynamic: bool) -> None:
        """Compile the code between the calls of `Mixer.mix` with torch.compile.

        Blocks of the same kind share the compiled code, which runs in training mode only.
        `mix` is not compiled: attention kernels would not get faster, and their input is checked on the host at each
        call.

        Args:
            dynamic: True compiles for packs of any number of tokens; False compiles again for each new number.
        """
        for block in self.blocks:
            assert isinstance(block, Block)
            block.compiled = tuple(
                torch.compile(part, dynamic=dynamic) for part in (block.before_mixing, block.after_mixing)
            )

    def padded_shape(self, batch: PackedBatch) -> StaticShape | None:
        """Return the shape to which `forward` pads a pack, or None.

        In training, that is the shape of `pad_packs` if the pack fits. With the attention backend matmul (in bf16 on a
        CPU), it is the next multiple of CPU_MULTIPLE tokens, because oneDNN compiles and keeps code for each size.
        """
        if not self.training:
            return None
        if self.shape is not None:
            return self.shape if batch.fits(self.shape) else None
        if self.attention_backend != "matmul":
            return None
        if not (missing := -len(batch.tokens) % CPU_MULTIPLE):
            return None
        tails = -(-missing // batch.max_seqlen)
        return StaticShape(len(batch.tokens) + missing, len(batch.lengths) + tails, batch.max_seqlen)

    def pad_packs(self, shape: StaticShape) -> None:
        """From now on, pad training packs to a fixed shape. Packs that are too large for this shape are not padded.

        The logits that `forward` returns do not include the padding.
        """
        self.shape = shape

    def capture(self, autocast: torch.dtype | None) -> None:
        """Record the forward and backward pass for packs of the shape set by `pad_packs`, as two CUDA graphs.

        A replay of a graph costs the host one launch instead of a thousand. After this call, the gradients stay in
        fixed memory, and each backward pass adds to them. Between steps they must be set to zero, not to None
        (`zero_grad(set_to_none=False)`).

        Args:
            autocast: dtype in which the network computes; None for the dtype of its weights.

        Raises:
            ValueError: the attention backend reads the sequences' lengths on the host (matmul, sdpa) or builds a mask
                for each pack (flex); or a mixer reads the lengths on the host.
        """
        assert self.shape is not None
        if self.uncapturable:
            raise ValueError(
                f"model.mixers has {', '.join(self.uncapturable)}, which reads lengths on the host, so the network "
                "cannot be recorded as a CUDA graph; use model.mixers=attention or trainer.compile=false"
            )
        if self.attention_backend not in GRAPHABLE:
            reason = "builds a mask for each pack" if self.attention_backend == "flex" else "reads lengths on the host"
            raise ValueError(
                f"attention backend {self.attention_backend} {reason}, so it cannot be recorded as a CUDA graph; "
                f"use {' or '.join(GRAPHABLE)}"
            )
        blank = PackedBatch.pack([torch.full((self.shape.longest,), PAD)]).to(self.embedding.weight.device)
        # not registered as a submodule, because it contains this model
        self.__dict__["graphed"] = capture(self, self.network, blank.padded_to(self.shape), autocast)

    def flops(self, lengths: Sequence[int]) -> int:
        """Return the FLOPs of the matrix products in one forward pass over sequences of these lengths (tokens).

        A multiply-add counts as two FLOPs.
        """
        blocks = cast(Iterable[Block], self.blocks)
        products = self.weights_per_token * sum(lengths) + self.weights_per_sequence * len(lengths)
        products += self.positions.flops(lengths)
        return 2 * (products + sum(block.mixer.flops(lengths) for block in blocks))

    def training_flops(self, lengths: Sequence[int]) -> int:
        """Return the FLOPs of the matrix products in one forward and backward pass over sequences of these lengths.

        The backward pass takes twice as many FLOPs as the forward pass (arXiv 2204.02311, appendix B), less those for
        the gradients of linear layers that adapters leave frozen. The products of the adapters' own matrices are not
        counted: there are rank / (tokens of the pack) times as many as in the forward pass.
        """
        return 3 * self.flops(lengths) - 2 * self.frozen_per_token * sum(lengths)


def drop_masked(x_TH: Float[Tensor, "total hidden"], batch: PackedBatch) -> Float[Tensor, "total hidden"]:
    """Return the embeddings with those of <mask> set to zero, and the others of a protein scaled by 0.88 / (1 - r).

    r is the fraction of the protein's tokens, <bos> and <eos> included, that are <mask>. ESM-2 was trained with 12% of
    the tokens masked, so the sum of a protein's embeddings stays near its value in that training (the token dropout of
    ESM's source code and of transformers' EsmEmbeddings). A crop of which all tokens are <mask> gets zeros.
    """
    masked_T, tokens_n = batch.tokens == MASK, batch.cu_seqlens.diff()
    masked_n = torch.zeros_like(tokens_n).index_add_(0, batch.segment_ids, masked_T.to(tokens_n.dtype))
    scale_n = (1 - TRAINED_MASK_RATIO) * tokens_n / (tokens_n - masked_n).clamp(min=1)
    scale_T = scale_n.index_select(0, batch.segment_ids).masked_fill(masked_T, 0)
    return x_TH * scale_T.to(x_TH.dtype).unsqueeze(1)


def kinds_of(config: ModelConfig, attention_backend: str) -> str:
    """Return a description of the kinds of the network's parts, for progress lines."""
    counts = Counter(mixers_of_blocks(config))
    mixers = " + ".join(
        (f"{n} x " if len(counts) > 1 else "") + (f"attention ({attention_backend})" if name == "attention" else name)
        for name, n in counts.items()
    )
    options = {
        "tied weights": config.tie_weights,
        "lm head": config.head == "lm",
        "token dropout": config.token_dropout,
    }
    others = "".join(f", {name}" for name, chosen in options.items() if chosen)
    return f"positions {config.positions}, mixers {mixers}, mlp {config.mlp}{others}"


def check_model(config: ModelConfig) -> None:
    """Raise a ValueError that names the key and its value if the config does not define a valid network."""
    for name, value in (
        ("hidden_size", config.hidden_size),
        ("n_heads", config.n_heads),
        ("n_blocks", config.n_blocks),
        ("cond_dim", config.cond_dim),
    ):
        if value < 1:
            raise ValueError(f"model.{name} must be at least 1, got {value}")
    if config.max_positions is not None and config.max_positions < 1:
        raise ValueError(f"model.max_positions must be at least 1, got {config.max_positions}")
    if not 0 <= config.dropout < 1:
        raise ValueError(f"model.dropout must lie in [0, 1), got {config.dropout}")
    for name, choice, choices in (
        ("norm", config.norm, NORMS),
        ("mlp", config.mlp, MLPS),
        ("head", config.head, HEADS),
        ("positions", config.positions, POSITIONS),
    ):
        if choice not in choices:
            raise ValueError(unknown_choice(f"model.{name}", choice, choices))
    mixers = mixers_of_blocks(config)
    if POSITIONS[config.positions].is_biased() and "attention" not in mixers:
        mixers_text = f"[{', '.join(mixers)}]" if isinstance(config.mixers, list) else config.mixers
        raise ValueError(
            f"model.positions={config.positions} adds a bias to attention scores, but model.mixers={mixers_text} has "
            "no attention: choose another model.positions, or attention for at least one block"
        )
    hidden_size, n_heads = config.hidden_size, config.n_heads
    if hidden_size % n_heads:
        raise ValueError(
            f"model.hidden_size={hidden_size} is not divisible by model.n_heads={n_heads} "
            f"({hidden_size} = {n_heads} * {config.head_dim} + {hidden_size % n_heads})"
        )
    if config.max_positions is not None and not POSITIONS[config.positions].limited:
        limited = [name for name, kind in POSITIONS.items() if kind.limited]
        raise ValueError(
            f"model.max_positions={config.max_positions} has no effect with model.positions={config.positions}, which "
            f"has no limit; set it to null, or set model.positions to {' or '.join(limited)}"
        )
    if config.sinusoid_scale is not None and not POSITIONS[config.positions].scaled:
        scaled = [name for name, kind in POSITIONS.items() if kind.scaled]
        raise ValueError(
            f"model.sinusoid_scale={config.sinusoid_scale:g} has no effect with model.positions={config.positions}; "
            f"set it to null, or set model.positions to {' or '.join(scaled)}"
        )
    if config.rotary_frequencies is not None and config.positions != "rope":
        raise ValueError(
            f"model.rotary_frequencies has no effect with model.positions={config.positions}; set it to null, or set "
            "model.positions to rope"
        )
    if config.attention_bias and "attention" not in mixers:
        raise ValueError(
            f"model.attention_bias=true has no effect with model.mixers={config.mixers}, which has no attention; "
            "set it to false"
        )
    if config.norm_eps is not None and not 0 < config.norm_eps < math.inf:
        raise ValueError(f"model.norm_eps must be a finite number above 0, got {config.norm_eps}")
    with torch.device("meta"):  # runs the encoding's own checks; uses no memory and draws no random numbers
        POSITIONS[config.positions](config)
