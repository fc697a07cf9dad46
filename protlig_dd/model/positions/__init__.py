"""Position encodings: one file per kind, listed here by name."""

from protlig_dd.model.positions.adaptive import Adaptive
from protlig_dd.model.positions.alibi import Alibi
from protlig_dd.model.positions.base import PositionEncoding
from protlig_dd.model.positions.diet import Diet
from protlig_dd.model.positions.diet_rel import DietRelative
from protlig_dd.model.positions.rotary import Rotary
from protlig_dd.model.positions.sinusoidal import Sinusoidal
from protlig_dd.model.positions.t5 import T5Relative

POSITIONS: dict[str, type[PositionEncoding]] = {
    "rope": Rotary,
    "sinusoidal": Sinusoidal,
    "t5": T5Relative,
    "diet": Diet,
    "diet_rel": DietRelative,
    "alibi": Alibi,
    "adaptive": Adaptive,
    "none": PositionEncoding,
}
