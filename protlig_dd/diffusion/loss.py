"""The training loss: denoising score entropy integrated over noise times."""

import torch
from jaxtyping import Float32
from torch import Tensor

from protlig_dd.batch import PackedBatch
from protlig_dd.diffusion.noise import stratified_times
from protlig_dd.diffusion.score import ScoreFn


def score_entropy_loss(
    score_fn: ScoreFn,
    batch: PackedBatch,
    generator: torch.Generator,
    t_max: float = 1.0,
    max_weight: float | None = None,
) -> tuple[Float32[Tensor, ""], int | Tensor]:
    """Return a Monte-Carlo estimate of the pack's loss, with one stratified time and one corruption per sequence.

        sum over residues of (t_max - t_min) dsigma(t) sum_{y != x_t} Q[y, x_t] (s_y - r_y log s_y + K(r_y))

    with dsigma = d sigma / d t, the graph's rates Q and transition probabilities P = exp(sigma(t) Q), the scores s_y,
    r_y = P[x0, y] / P[x0, x_t] and K(a) = a (log a - 1). The mean of the estimate over draws is the likelihood bound's
    integral over [t_min, t_max] (arXiv 2310.16834, eq. 13).

    Args:
        batch: clean sequences x0. Context residues are given to the network without noise and are not in the loss.
        generator: source of all random draws, on the batch's device (on the CPU for MPS).
        t_max: the largest time; 1 unless a curriculum limits it. With a curriculum, the loss is the integral up to
            t_max only.
        max_weight: the largest allowed weight (t_max - t_min) dsigma / (e^sigma - 1); larger weights are reduced to it.
            With the absorbing graph this weight is the factor of a masked residue's cross-entropy. If max_weight is
            set, the loss is not the bound. None: no limit.

    Returns:
        loss_sum: nats, summed over the pack; differentiable.
        n_residues: number of residues in the sum, on the batch's device. <bos>, <eos> and context letters such as X are
            not counted. Context residues are not counted either.
    """
    graph, noise, x0 = score_fn.graph, score_fn.noise, batch.targets
    t = stratified_times(len(batch.lengths), noise.t_min, generator, x0.device, t_max)
    sigma, dsigma = noise(t)
    sigma_T = sigma.index_select(0, batch.segment_ids)
    dsigma_T = dsigma.index_select(0, batch.segment_ids)
    xt = graph.sample_transition(x0, sigma_T, generator)
    log_score = score_fn(batch.with_tokens(xt), sigma)
    weight_T = (t_max - noise.t_min) * dsigma_T
    if max_weight is not None:
        weight_T = torch.minimum(weight_T, max_weight * torch.expm1(sigma_T))
    loss_T = weight_T * graph.score_entropy(log_score, sigma_T, xt, x0)
    return loss_T.sum(), (x0 < graph.n_states).sum()
