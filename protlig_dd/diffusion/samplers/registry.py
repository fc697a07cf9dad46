"""The samplers, by name."""

from protlig_dd.diffusion.samplers.ancestral import Ancestral
from protlig_dd.diffusion.samplers.base import Analytic
from protlig_dd.diffusion.samplers.euler import Euler

SAMPLERS: dict[str, type[Analytic]] = {"analytic": Analytic, "euler": Euler, "ancestral": Ancestral}
