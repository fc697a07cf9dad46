"""Mixers, in which the tokens of a sequence exchange information: one file per kind, listed here by name."""

import difflib

from protlig_dd.model.config import ModelConfig
from protlig_dd.model.mixers.attention import Attention
from protlig_dd.model.mixers.base import Mixer
from protlig_dd.model.mixers.ttt import TTTMLP, TTTLinear

MIXERS: dict[str, type[Mixer]] = {"attention": Attention, "ttt_linear": TTTLinear, "ttt_mlp": TTTMLP}


def mixers_of_blocks(config: ModelConfig) -> list[str]:
    """Return the name of each block's mixer.

    Raises:
        ValueError: an unknown name, or a list whose length is not n_blocks.
    """
    listed = isinstance(config.mixers, list)
    for i, name in enumerate(config.mixers if listed else [config.mixers]):
        if str(name) not in MIXERS:
            nearest = difflib.get_close_matches(str(name), MIXERS, n=1)
            hint = f"; did you mean {nearest[0]!r}?" if nearest else ""
            key = f"model.mixers[{i}]" if listed else "model.mixers"
            raise ValueError(f"{key}={name}: choose from {', '.join(MIXERS)}{hint}")
    names: list[str] = config.mixers if listed else [config.mixers] * config.n_blocks
    if len(names) != config.n_blocks:
        raise ValueError(
            f"model.mixers has {len(names)} names, but model.n_blocks={config.n_blocks}: give a list with one name for "
            "each block, or one name for all"
        )
    return names
