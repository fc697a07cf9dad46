"""One block of the transformer: norm, mixer, norm, MLP.

Shape suffixes: T tokens of the pack, n sequences, H hidden_size, C cond_dim, K = 6 hidden_size.
"""

from collections.abc import Callable

import torch.nn.functional as F
from jaxtyping import Float, Int64
from torch import Tensor, nn

from protlig_dd.batch import PackedBatch
from protlig_dd.model.config import ModelConfig
from protlig_dd.model.kernels import per_token
from protlig_dd.model.layers import MLP, make_norm, modulate, zero_linear
from protlig_dd.model.mixers import MIXERS, name_of
from protlig_dd.model.mixers.base import Mixer
from protlig_dd.model.mixers.scores import ScoreInputs
from protlig_dd.model.positions.base import PositionEncoding


class Block(nn.Module):
    """Pre-norm transformer block.

    With time conditioning, a linear layer (adaLN) computes the shifts and scales of the block's two norms, and the
    gates of its two residual connections, from the embedding of sigma.
    """

    mixer: Mixer
    positions: PositionEncoding

    def __init__(
        self,
        config: ModelConfig,
        mixer_name: str,
        backend: str,
        positions: PositionEncoding,
        *,
        time_conditioning: bool,
    ) -> None:
        super().__init__()
        hidden_size, self.dropout = config.hidden_size, config.dropout
        self.compiled: tuple[Callable[..., Tensor], ...] | None = None
        self.adaln = zero_linear(config.cond_dim, 6 * hidden_size) if time_conditioning else None
        if self.adaln is not None:
            # residual gates start at 1: with gates of 0 the features of all masked tokens would be equal at the output
            # layer, which could at first learn only the unigram distribution (docs/decisions.md)
            nn.init.ones_(self.adaln.bias.view(6, hidden_size)[2])
            nn.init.ones_(self.adaln.bias.view(6, hidden_size)[5])
        self.attention_norm = make_norm(config.norm, hidden_size, config.norm_eps, modulated=time_conditioning)
        mixer = MIXERS[mixer_name](config, backend)
        check_mixer(mixer, hidden_size)
        # register the mixer's parts directly, so that checkpoints keep the names blocks.N.qkv, ...
        for name, part in mixer.named_children():
            self.add_module(name, part)
        # not registered as submodules: the mixer's parts are registered already, and all blocks share `positions`
        self.__dict__.update(mixer=mixer, positions=positions)
        self.mlp_norm = make_norm(config.norm, hidden_size, config.norm_eps, modulated=time_conditioning)
        self.mlp = MLP(hidden_size, config.mlp)

    def train(self, mode: bool = True) -> "Block":
        """Set training or evaluation mode, for the mixer too."""
        self.mixer.train(mode)
        return super().train(mode)

    def forward(
        self,
        x_TH: Float[Tensor, "total hidden"],
        cond_nC: Float[Tensor, "n cond_dim"] | None,
        batch: PackedBatch,
        tables: tuple[Tensor, ...],
        scores: ScoreInputs | None = None,
    ) -> Float[Tensor, "total hidden"]:
        """Return the residual stream after this block.

        Args:
            cond_nC: the embedding of each sequence's sigma; None without time conditioning.
            tables: the position encoding's tables for this pack.
            scores: the bias and mask of this block's attention scores; None if the mixer needs neither.
        """
        modulation_nK = None if self.adaln is None else self.adaln(cond_nC)
        before, after = self.before_mixing, self.after_mixing
        if self.compiled is not None and self.training:
            before, after = self.compiled
        projected = before(x_TH, modulation_nK, batch.segment_ids, *tables)
        mixed = self.mixer.mix(projected, batch, self.positions, *tables, scores=scores)
        return after(x_TH, mixed, modulation_nK, batch.segment_ids)

    def before_mixing(
        self,
        x_TH: Float[Tensor, "total hidden"],
        modulation_nK: Float[Tensor, "n width"] | None,
        segment_ids: Int64[Tensor, " total"],
        *tables: Tensor,
    ) -> Tensor:
        """Apply the norm and the mixer's projections."""
        h = self.attention_norm(x_TH)
        if modulation_nK is not None:
            shift, scale = per_token(modulation_nK.chunk(6, dim=-1)[:2], segment_ids)
            h = modulate(h, shift, scale)
        return self.mixer.project(h, self.positions, *tables)

    def after_mixing(
        self,
        x_TH: Float[Tensor, "total hidden"],
        mixed: Tensor,
        modulation_nK: Float[Tensor, "n width"] | None,
        segment_ids: Int64[Tensor, " total"],
    ) -> Float[Tensor, "total hidden"]:
        """Apply the mixer's output projection, then the norm and the MLP. Mixer and MLP have residual connections."""
        # convert to x_TH's dtype explicitly: on a CPU, adding tensors of two dtypes is slower
        mixed = F.dropout(self.mixer.out(mixed), self.dropout, self.training)
        if modulation_nK is None:
            x_TH = x_TH + mixed.to(x_TH.dtype)
            return x_TH + F.dropout(self.mlp(self.mlp_norm(x_TH)), self.dropout, self.training).to(x_TH.dtype)
        gate_a, shift, scale, gate_m = per_token(modulation_nK.chunk(6, dim=-1)[2:], segment_ids)
        x_TH = x_TH + (gate_a * mixed).to(x_TH.dtype)
        hidden = self.mlp(modulate(self.mlp_norm(x_TH), shift, scale))
        return x_TH + (gate_m * F.dropout(hidden, self.dropout, self.training)).to(x_TH.dtype)


def check_mixer(mixer: Mixer, hidden_size: int) -> None:
    """Raise a ValueError if the mixer's width is not the block's, or if the block cannot register the mixer's weights.

    All weights must belong to child modules of the mixer, and no child may have the name of another part of the block.
    """
    kind = name_of(mixer)
    if mixer.hidden_size != hidden_size:
        raise ValueError(
            f"mixer {kind} has width {mixer.hidden_size}, but the Block that contains it has width {hidden_size} "
            "(model.hidden_size): build the mixer from the config of its network"
        )
    direct = [name for name, _ in (*mixer.named_parameters(recurse=False), *mixer.named_buffers(recurse=False))]
    if direct:
        raise ValueError(
            f"mixer {kind}: {direct[0]} must belong to a child module of the mixer, not to the mixer itself"
        )
    taken = {"adaln", "attention_norm", "mlp_norm", "mlp"} & {name for name, _ in mixer.named_children()}
    if taken:
        raise ValueError(f"mixer {kind}: the block already has a part called {min(taken)}; rename the mixer's part")
