"""How the network is told where a token stands: a file for each kind, and its name here."""

from protlig_dd.model.positions.base import PositionEncoding
from protlig_dd.model.positions.rotary import Rotary

POSITIONS: dict[str, type[PositionEncoding]] = {"rope": Rotary, "none": PositionEncoding}
