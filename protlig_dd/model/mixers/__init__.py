"""Mixers, the layers in which the tokens of a sequence exchange information. MIXERS lists them by name."""

from protlig_dd.model.config import ModelConfig, unknown_choice
from protlig_dd.model.mixers.attention import Attention
from protlig_dd.model.mixers.base import Mixer
from protlig_dd.model.mixers.ttt import TTTMLP, TTTLinear

MIXERS: dict[str, type[Mixer]] = {"attention": Attention, "ttt_linear": TTTLinear, "ttt_mlp": TTTMLP}


def name_of(mixer: Mixer) -> str:
    """Return the mixer's name in MIXERS, or the name of its class if MIXERS does not contain the class."""
    return next((name for name, kind in MIXERS.items() if type(mixer) is kind), type(mixer).__name__)


def mixers_of_blocks(config: ModelConfig) -> list[str]:
    """Return the name of each block's mixer.

    Raises:
        ValueError: an unknown name, or a list whose length is not n_blocks.
    """
    listed = isinstance(config.mixers, list)
    for i, name in enumerate(config.mixers if listed else [config.mixers]):
        if str(name) not in MIXERS:
            raise ValueError(unknown_choice(f"model.mixers[{i}]" if listed else "model.mixers", name, MIXERS))
    names: list[str] = config.mixers if listed else [config.mixers] * config.n_blocks
    if len(names) != config.n_blocks:
        raise ValueError(
            f"model.mixers has {len(names)} names, but model.n_blocks={config.n_blocks}: give a list with one name for "
            "each block, or one name for all"
        )
    return names
