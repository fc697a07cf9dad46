"""The objective that training minimises."""

from dataclasses import dataclass

import torch
from jaxtyping import Float32
from torch import Tensor

from protlig_dd.batch import PackedBatch
from protlig_dd.config.components import build_graph, build_noise, resolve_max_weight
from protlig_dd.config.train import TrainConfig
from protlig_dd.diffusion.graphs.base import Graph
from protlig_dd.diffusion.loss import score_entropy_loss
from protlig_dd.diffusion.noise import Noise, curriculum_t_max
from protlig_dd.diffusion.score import Network, ScoreFn


@dataclass(frozen=True)
class Objective:
    """The score-entropy loss of a diffusion process, with limits on its noise times and their weights.

    Args:
        autocast: dtype in which the network computes; None for the dtype of its weights.
        curriculum_steps: number of training steps over which the largest noise time grows to 1. 0: it is always 1.
        max_weight: cap on the loss weight of a noise time (see `score_entropy_loss`); None for no cap.
    """

    graph: Graph
    noise: Noise
    parametrisation: str
    time_conditioning: bool
    autocast: torch.dtype | None = None
    curriculum_steps: int = 0
    max_weight: float | None = None

    def score_fn(self, network: Network) -> ScoreFn:
        """Return a network wrapped as a score function of this diffusion process."""
        return ScoreFn(network, self.graph, self.noise, self.parametrisation, self.time_conditioning, self.autocast)

    def loss(self, score_fn: ScoreFn, batch: PackedBatch, generator: torch.Generator, step: int) -> Float32[Tensor, ""]:
        """Return the loss in nats, summed over the residues of a pack.

        Args:
            step: the training step, counted from 0. A curriculum sets the largest noise time of each step.
        """
        t_max = curriculum_t_max(step, self.curriculum_steps, self.noise.t_min)
        return score_entropy_loss(score_fn, batch, generator, t_max, self.max_weight)[0]


def objective_of(config: TrainConfig, autocast: torch.dtype | None) -> Objective:
    """Return the objective that a config describes."""
    graph = build_graph(config.graph)
    return Objective(
        graph=graph,
        noise=build_noise(config.noise, graph),
        parametrisation=config.parametrisation,
        time_conditioning=config.time_conditioning,
        autocast=autocast,
        curriculum_steps=config.noise.get("curriculum", 0),
        max_weight=resolve_max_weight(config.noise, graph),
    )
