"""The graphs, by name."""

from collections.abc import Callable
from functools import partial

from protlig_dd.diffusion.graphs.absorbing import Absorbing
from protlig_dd.diffusion.graphs.base import Graph
from protlig_dd.diffusion.graphs.substitution import make_substitution_graph
from protlig_dd.diffusion.graphs.uniform import Uniform
from protlig_dd.tokenizer import N_STATES

GRAPHS: dict[str, Callable[..., Graph]] = {
    "absorbing": partial(Absorbing, N_STATES),  # the number of states is not configurable
    "uniform": partial(Uniform, N_STATES),
    "substitution": make_substitution_graph,
}
