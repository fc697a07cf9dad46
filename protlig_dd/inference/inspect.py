"""Look inside a trained network: compute its attention weights, or run code on it in evaluation mode.

The methods of `protlig_dd.hub.ProteinDiffusion` call these functions (docs/inspect.md). This module does not use Hydra.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from numbers import Real

import numpy as np
import torch
from jaxtyping import Float, Float32
from torch import Tensor, nn

from protlig_dd.batch import PackedBatch
from protlig_dd.diffusion.sampling import sigma_of_masks
from protlig_dd.diffusion.score import ScoreFn
from protlig_dd.inference.sequences import FREE, check_list, check_trained_length, check_whole, encode_with_free
from protlig_dd.model.block import Block
from protlig_dd.model.dit import DiT
from protlig_dd.model.mixers import name_of
from protlig_dd.model.mixers.attention import Attention
from protlig_dd.model.mixers.scores import ScoreInputs, with_columns
from protlig_dd.model.positions.base import PositionEncoding
from protlig_dd.tokenizer import MASK


def attention(
    score_fn: ScoreFn,
    sequences: Sequence[str],
    *,
    blocks: Sequence[int] | None = None,
    heads: Sequence[int] | None = None,
    t: float | None = None,
    max_len: int,
) -> list[Float32[Tensor, "blocks heads tokens tokens"]]:
    """Return the attention weights of each protein, on the CPU.

    Entry [b, h, i, j] is the weight with which token i reads token j in head heads[h] of block blocks[b]. The tokens
    are `<bos> residues <eos>`, so a protein of L residues has L + 2 tokens, and residue k (from 0) is token k + 1.
    Each row sums to 1. The weights are computed in float32 from the queries, keys and bias that the attention kernel
    receives. Inputs that the kernel receives in a lower precision are rounded to that precision first. The network runs
    in evaluation mode on one protein at a time, up to the last selected block. The weights of a protein take
    4 (L + 2)^2 bytes per block and head.

    Args:
        sequences: letters in either case; `_` is a masked residue (only for graphs with a mask).
        blocks, heads: numbers from 0, in the order that the result is to have; -1 is the last block or head. None
            selects all.
        t: time, from the noise schedule's t_min to 1, that sets the noise level for a network with time conditioning.
            None: the level that matches the protein's fraction of masked residues, as in sampling; for graphs without a
            mask, the level at t_min.
        max_len: largest number of residues that the model was trained on.

    Raises:
        ValueError: a block or head that the network does not have; a block whose mixer is not attention; a single
            string, no sequence, an illegal letter, or `_` if the graph has no mask; a protein longer than max_len; t
            out of range.
    """
    network = network_of(score_fn)
    chosen = choose("block", blocks, len(network.blocks))
    mixers = {number: attention_of(network, number) for number in dict.fromkeys(chosen)}
    chosen_heads = choose("head", heads, min(mixer.n_heads for mixer in mixers.values()))
    check_list(sequences, "attention takes a list of sequences")
    packs = [pack_of(score_fn, text, f"sequences[{i}]", max_len) for i, text in enumerate(sequences)]
    return [
        torch.stack([weights[number] for number in chosen])
        for pack in packs
        for weights in [weights_of_pack(score_fn, pack, sigma_of(score_fn, pack, t), list(mixers), chosen_heads)]
    ]


def weights_of_pack(
    score_fn: ScoreFn, batch: PackedBatch, sigma: Float32[Tensor, "1"], blocks: Sequence[int], heads: Sequence[int]
) -> dict[int, Float32[Tensor, "heads tokens tokens"]]:
    """Return the attention weights of each block, by its number, for a pack of one sequence."""
    network, weights = network_of(score_fn), dict[int, Tensor]()
    batch, sigma = batch.to(score_fn.device), sigma.to(score_fn.device)
    network_sigma = sigma if score_fn.time_conditioning else torch.zeros_like(sigma)
    with (
        ExitStack() as stack,
        analysis(network),
        torch.autocast(score_fn.device.type, dtype=score_fn.autocast, enabled=score_fn.autocast is not None),
    ):
        for number in blocks:
            stack.enter_context(recording(network, number, heads, weights))
        network.hidden_states(batch, network_sigma, max(blocks) + 1)
    return weights


@contextmanager
def recording(network: DiT, number: int, heads: Sequence[int], weights: dict[int, Tensor]) -> Iterator[None]:
    """Store the attention weights of block `number` in `weights` while the network runs on a pack of one sequence.

    The attention weights are computed from the input of the mixer's method `mix`, which contains the queries and keys
    that the kernel receives.
    """
    block = network.blocks[number]
    assert isinstance(block, Block)
    mix: Callable[..., Tensor] = block.mixer.mix
    rounded = network.attention_backend == "sdpa"

    def record(
        projected: Tensor, batch: PackedBatch, *others: PositionEncoding | Tensor, scores: ScoreInputs | None = None
    ) -> Tensor:
        weights[number] = attention_weights(projected, scores, heads, rounded=rounded).cpu()
        return mix(projected, batch, *others, scores=scores)

    block.mixer.__dict__["mix"] = record  # hides the method of the class
    try:
        yield
    finally:
        del block.mixer.__dict__["mix"]


def attention_weights(
    projected: Float[Tensor, "tokens 3 all_heads head_dim"],
    scores: ScoreInputs | None,
    heads: Sequence[int],
    *,
    rounded: bool,
) -> Float32[Tensor, "heads tokens tokens"]:
    """Return softmax(q k^T / sqrt(head_dim) + bias) of the given heads in float32, for a pack of one sequence.

    Args:
        projected: the queries, keys and values that the block's mixer has computed (`Mixer.project`).
        scores: the position encoding's bias of the attention scores, in the form that the kernel takes; None if the
            kernel needs only q, k and v.
        rounded: whether the kernel receives the bias in the dtype of the queries, as sdpa does.
    """
    head_dim, bias = projected.shape[-1], None
    if scores is not None and scores.columns is not None:
        projected = with_columns(projected, scores.columns)
    elif scores is not None and scores.bias is not None:
        # the bias is computed under the network's autocast, like the bias that the kernel receives
        bias = scores.bias.matrix(len(projected)) if scores.matrices is None else scores.matrices[0]
        bias = bias[list(heads)].to(projected.dtype if rounded else torch.float32).float()
    q, k, _ = projected[:, :, list(heads)].float().unbind(1)
    with torch.autocast(projected.device.type, enabled=False):
        products = torch.einsum("qhd,khd->hqk", q, k) * head_dim**-0.5
        return (products if bias is None else products + bias).softmax(-1)


def attention_of(network: DiT, number: int) -> Attention:
    """Return the mixer of a block. Raise a ValueError if the mixer is not attention."""
    block = network.blocks[number]
    assert isinstance(block, Block)
    if not isinstance(block.mixer, Attention):
        attending = [str(number) for number, attends in enumerate(network.attends) if attends]
        others = f"choose from blocks {', '.join(attending)}" if attending else "no block of this network has attention"
        raise ValueError(f"block {number} has no attention weights: its mixer is {name_of(block.mixer)}; {others}")
    return block.mixer


def choose(part: str, numbers: Sequence[int] | None, n: int) -> list[int]:
    """Return the selected blocks or heads as numbers from 0. Negative numbers count from the end; None selects all."""
    if numbers is None:
        return list(range(n))
    numbers = numbers.tolist() if isinstance(numbers, Tensor | np.ndarray) else numbers
    check_list(numbers, f"{part}s is a list of numbers, such as [0, -1]")
    for number in numbers:
        check_whole(number, f"{part}s is a list of whole numbers")
        if not -n <= number < n:
            raise ValueError(f"{part} {number} does not exist: this model has {part}s 0 to {n - 1}; -1 is the last")
    return [number % n for number in numbers]


def pack_of(score_fn: ScoreFn, sequence: str, name: str, max_len: int) -> PackedBatch:
    """Return a pack of one protein, after checking its letters and length."""
    tokens = encode_with_free(sequence, name)
    if MASK in tokens and not score_fn.graph.masks:
        raise ValueError(f"{name} has `{FREE}`, but the graph {score_fn.graph.name} has no mask")
    check_trained_length(len(tokens) - 2, name, max_len)
    return PackedBatch.pack([torch.from_numpy(tokens)])


def sigma_of(score_fn: ScoreFn, batch: PackedBatch, t: float | None) -> Float32[Tensor, " n"]:
    """Return the total noise sigma that the network receives for each sequence; `t` is described in `attention`."""
    noise, graph = score_fn.noise, score_fn.graph
    if t is not None and (not isinstance(t, Real) or isinstance(t, bool) or not noise.t_min <= t <= 1):
        raise ValueError(f"t must be a number in [{noise.t_min:g}, 1], got {t!r:.40}")
    if t is None and graph.masks:
        lowest, highest = noise(torch.tensor([noise.t_min, 1.0], dtype=torch.float64))[0].tolist()
        counted_T = batch.tokens == graph.mask if score_fn.trained_with_context else None  # as in sampling
        return sigma_of_masks(batch, graph, lowest, highest, counted_T=counted_T).float()
    return noise(torch.full((len(batch.lengths),), noise.t_min if t is None else t))[0]


@contextmanager
def analysis(model: nn.Module) -> Iterator[None]:
    """Run the body of the `with` statement with the model in evaluation mode and without gradients.

    Each module's training mode is restored afterwards, even if the body raises or the modules' modes differ.
    """
    modules = list(model.modules())
    modules += [module.mixer for module in modules if isinstance(module, Block)]  # a block does not register its mixer
    modes = [module.training for module in modules]
    try:
        model.eval()
        with torch.no_grad():
            yield
    finally:
        for module, training in zip(modules, modes, strict=True):
            module.training = training


def network_of(score_fn: ScoreFn) -> DiT:
    assert isinstance(score_fn.model, DiT)
    return score_fn.model
