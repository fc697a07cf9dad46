"""Mixers, in which the tokens of a sequence exchange information: one file per kind, listed here by name."""

from protlig_dd.model.mixers.attention import Attention
from protlig_dd.model.mixers.base import Mixer

MIXERS: dict[str, type[Mixer]] = {"attention": Attention}
