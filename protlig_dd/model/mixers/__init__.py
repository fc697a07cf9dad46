"""What lets the tokens of a sequence see one another: a file for each kind, and its name here."""

from protlig_dd.model.mixers.attention import Attention
from protlig_dd.model.mixers.base import Mixer

MIXERS: dict[str, type[Mixer]] = {"attention": Attention}
