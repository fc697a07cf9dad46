"""The diffusion transformer (DiT, arXiv 2212.09748, as SEDD uses it, arXiv 2310.16834) on packed tokens.

    tokens -> embedding -> n_blocks x [adaLN, fused qkv, rotary, varlen attention, adaLN, MLP] -> adaLN -> 20 logits
    sigma  -> sinusoids -> MLP -> the shift, scale and gate of every adaLN

Without time conditioning there is no sigma, and adaLN is a plain norm: an ordinary pre-norm transformer.

Shape suffixes: T tokens of the pack, n sequences, H hidden_size, C cond_dim.
"""

from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from jaxtyping import Float, Float32
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from protlig_dd.batch import PackedBatch, StaticShape, check_tokens
from protlig_dd.model.block import Block
from protlig_dd.model.conditioning import SigmaEmbedding
from protlig_dd.model.config import MLPS, NORMS, check_choice, check_dimensions
from protlig_dd.model.cuda_graph import NetworkOnTensors
from protlig_dd.model.layers import Head
from protlig_dd.model.positions.rotary import gather_rotary, rotary_cos_sin
from protlig_dd.tokenizer import PAD, VOCAB_SIZE


class DiT(nn.Module):
    """Maps a pack of tokens and one sigma per sequence to 20 logits per token.

    Args:
        time_conditioning: False builds a network that ignores sigma.
        norm: layer | rms (arXiv 1910.07467).
        mlp: gelu | relu2 (squared ReLU, arXiv 2109.08668) | swiglu (arXiv 2002.05202; 8/3 as wide, for the same size).
        qk_norm: RMS-normalise q and k of each head before they are rotated (arXiv 2010.04245).
        checkpointing: keep only each block's input for the backward pass and compute the rest again.

    The output layer, every shift and every scale start at zero, so a new model returns zeros; the residual gates start
    at one (docs/decisions.md).

    Raises:
        ValueError: dimensions that do not fit one another (at construction); a batch that is not packed, or lies on
            another device than the weights (at the first line of forward).
    """

    def __init__(
        self,
        *,
        hidden_size: int,
        n_heads: int,
        n_blocks: int,
        cond_dim: int,
        dropout: float,
        attention_backend: str,
        time_conditioning: bool = True,
        norm: str = "layer",
        mlp: str = "gelu",
        qk_norm: bool = False,
        checkpointing: bool = False,
    ) -> None:
        super().__init__()
        check_dimensions(hidden_size, n_heads, n_blocks, cond_dim, dropout)
        check_choice("norm", norm, NORMS)
        check_choice("mlp", mlp, MLPS)
        self.head_dim = hidden_size // n_heads
        self.checkpointing = checkpointing
        self.shape: StaticShape | None = None
        self.graphed: Callable[..., Tensor] | None = None
        self.embedding = nn.Embedding(VOCAB_SIZE, hidden_size)
        self.sigma_embedding = SigmaEmbedding(cond_dim) if time_conditioning else None
        width = cond_dim if time_conditioning else None
        self.blocks = nn.ModuleList(
            Block(hidden_size, n_heads, width, dropout, attention_backend, norm, mlp, qk_norm) for _ in range(n_blocks)
        )
        self.head = Head(hidden_size, width, norm)
        nn.init.normal_(self.embedding.weight, std=0.02)
        linear = {name: part.weight.numel() for name, part in self.named_modules() if isinstance(part, nn.Linear)}
        self.weights_per_sequence = sum(n for name, n in linear.items() if "adaln" in name or "sigma" in name)
        self.weights_per_token = sum(linear.values()) - self.weights_per_sequence

    def forward(self, batch: PackedBatch, sigma: Float32[Tensor, " n"]) -> Float[Tensor, "total 20"]:
        """Logits (total, 20) of a pack at noise levels sigma (n,), one per sequence."""
        self.check(batch, sigma)
        if self.shape is None or not self.training or not batch.fits(self.shape):
            return self.network(batch, sigma)
        total, n = len(batch.tokens), len(batch.lengths)
        batch, sigma = batch.filled(self.shape), F.pad(sigma, (0, self.shape.sequences - n))
        if self.graphed is None:
            return self.network(batch, sigma).narrow(0, 0, total)
        logits = self.graphed(batch.tokens, batch.cu_seqlens, batch.segment_ids, batch.positions, sigma)
        return logits.narrow(0, 0, total)

    def hidden_states(
        self, batch: PackedBatch, sigma: Float32[Tensor, " n"], layer: int
    ) -> Float[Tensor, "total hidden"]:
        """What the network makes of each token on its way to the logits.

        Args:
            layer: of n_blocks. 0: the embedding; k: the residual stream after k blocks; n_blocks: what the output
                projection sees, behind the last norm, as ESM-2 has it.

        Raises:
            ValueError: as forward; and a layer outside 0..n_blocks.
        """
        self.check(batch, sigma)
        if not 0 <= layer <= len(self.blocks):
            raise ValueError(f"layer {layer}: this network has 0 (the embedding) to {len(self.blocks)}")
        x_TH, cond_nC = self.trunk(batch, sigma, layer)
        return x_TH if layer < len(self.blocks) else self.head.normed(x_TH, cond_nC, batch.segment_ids)

    def network(self, batch: PackedBatch, sigma: Tensor) -> Tensor:
        """forward, its inputs checked."""
        x_TH, cond_nC = self.trunk(batch, sigma, len(self.blocks))
        return self.head(x_TH, cond_nC, batch.segment_ids)

    def trunk(self, batch: PackedBatch, sigma: Tensor, n_blocks: int) -> tuple[Tensor, Tensor | None]:
        """The residual stream after the first n_blocks, and what conditions the norms."""
        cos, sin = rotary_cos_sin(batch.max_seqlen, self.head_dim, device=sigma.device)
        cos_sin = gather_rotary(cos, sin, batch)
        cond_nC = None if self.sigma_embedding is None else self.sigma_embedding(sigma)
        x_TH = self.embedding(batch.tokens)
        for block in list(self.blocks)[:n_blocks]:
            if self.checkpointing and torch.is_grad_enabled():
                x_TH = checkpoint(block, x_TH, cond_nC, batch, cos_sin, use_reentrant=False)
            else:
                x_TH = block(x_TH, cond_nC, batch, cos_sin)
        return x_TH, cond_nC

    def check(self, batch: PackedBatch, sigma: Tensor) -> None:
        """Raise for a batch that is not packed or not where the weights are, or without one sigma per sequence."""
        if not isinstance(batch, PackedBatch):
            check_tokens(batch)
            raise ValueError(f"the model reads a PackedBatch, got {type(batch).__name__}")
        weight = self.embedding.weight
        for name, tensor in (("tokens", batch.tokens), ("sigma", sigma)):
            if tensor.device != weight.device:
                raise ValueError(f"{name} is on {tensor.device} but the model is on {weight.device}")
        if tuple(sigma.shape) != (len(batch.lengths),):
            raise ValueError(f"sigma has shape {tuple(sigma.shape)} for {len(batch.lengths)} sequences")

    def compile_blocks(self, *, dynamic: bool) -> None:
        """Compile what lies between the attention kernels for training, with torch.compile, once for all blocks.

        Attention stays outside: its kernels gain nothing, and it is checked on the host at each call.

        Args:
            dynamic: packs differ in their number of tokens; False compiles anew for each number.
        """
        for block in self.blocks:
            assert isinstance(block, Block)
            block.compiled = tuple(
                torch.compile(part, dynamic=dynamic) for part in (block.before_attention, block.after_attention)
            )

    def fill_packs(self, shape: StaticShape) -> None:
        """From now on every training pack that fits is filled up to this shape, which its logits do not show."""
        self.shape = shape

    def capture(self, autocast: torch.dtype | None) -> None:
        """Record the forward and the backward pass over a pack of `fill_packs`' shape as two CUDA graphs.

        A replay costs the host one launch instead of a thousand. Gradients then live in fixed memory: they must be
        zeroed, not dropped, between steps (`zero_grad(set_to_none=False)`), as they are accumulated into.

        Args:
            autocast: dtype that the network computes in; None for that of its weights.

        Raises:
            ValueError: a backend whose calls depend on the pack's lengths.
        """
        assert self.shape is not None
        if any(block.attention_backend == "sdpa" for block in self.blocks):
            raise ValueError(
                "attention backend sdpa reads lengths on the host, which a CUDA graph does not; use another"
            )
        device = self.embedding.weight.device
        blank = PackedBatch.pack([torch.full((self.shape.longest,), PAD)]).to(device).filled(self.shape)
        sigma = torch.ones(self.shape.sequences, device=device)
        inputs = (blank.tokens, blank.cu_seqlens, blank.segment_ids, blank.positions, sigma)
        graphed = NetworkOnTensors(self, self.network, blank)
        with torch.autocast(device.type, dtype=autocast, enabled=autocast is not None, cache_enabled=False):
            self.__dict__["graphed"] = torch.cuda.make_graphed_callables(graphed, inputs)  # no submodule: it holds us
        for parameter in self.parameters():
            parameter.grad = torch.zeros_like(parameter)

    def flops(self, lengths: Sequence[int]) -> int:
        """FLOPs of the matrix products of one forward pass over sequences of these lengths (tokens), two for each
        multiply-add; the backward pass takes twice that (arXiv 2204.02311, appendix B).
        """
        products = self.weights_per_token * sum(lengths) + self.weights_per_sequence * len(lengths)
        attention = 2 * len(self.blocks) * self.embedding.embedding_dim * sum(length**2 for length in lengths)
        return 2 * (products + attention)
