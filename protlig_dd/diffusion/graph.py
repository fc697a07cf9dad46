"""Old import path of `protlig_dd.diffusion.graphs`, kept for one release."""

from protlig_dd.diffusion.graphs.absorbing import Absorbing
from protlig_dd.diffusion.graphs.base import Graph
from protlig_dd.diffusion.graphs.registry import GRAPHS
from protlig_dd.diffusion.graphs.substitution import SubstitutionGraph
from protlig_dd.diffusion.graphs.uniform import Uniform

__all__ = ["GRAPHS", "Absorbing", "Graph", "SubstitutionGraph", "Uniform"]
