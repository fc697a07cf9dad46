"""Position encodings: one file per kind, listed here by name."""

from protlig_dd.model.positions.base import PositionEncoding
from protlig_dd.model.positions.rotary import Rotary

POSITIONS: dict[str, type[PositionEncoding]] = {"rope": Rotary, "none": PositionEncoding}
