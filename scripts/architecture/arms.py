"""The kinds of networks to compare (arms): the baseline, and networks that differ from the baseline in one key."""

import hashlib
from collections.abc import Sequence
from pathlib import Path

from protlig_dd.model.config import MLPS
from protlig_dd.model.positions import POSITIONS

BASELINE = "rope"
NETWORK = {"positions": "rope", "mixers": "attention", "mlp": "gelu", "tie_weights": "false"}
BLOCKS = 2  # number of blocks of the demo's network
WARMUP = 15  # there is one warm-up step for every 15 training steps, as in the demo


def alternating(n_blocks: int) -> str:
    """Return a value of model.mixers that alternates attention with test-time training."""
    return f"[{','.join(['attention', 'ttt_linear'][block % 2] for block in range(n_blocks))}]"


ENCODINGS = sorted(POSITIONS, key=lambda name: name != BASELINE)  # position encodings, the baseline first
ARMS: dict[str, dict[str, str]] = {
    **{name: {"positions": name} for name in ENCODINGS},
    "ttt_linear": {"mixers": alternating(BLOCKS)},
    **{name: {"mlp": name} for name in MLPS if name != NETWORK["mlp"]},
    "tied": {"tie_weights": "true"},
}


def label(arm: str) -> str:
    """Return the name of an arm for the tables.

    The name lists the keys of `model` in which the arm differs from the baseline.
    """
    if arm == BASELINE:
        return "baseline: " + ", ".join(f"`{key}={value}`" for key, value in NETWORK.items())
    if ARMS.get(arm, {}).get("mixers", "").startswith("["):
        return f"`{arm}` in every other block"
    return ", ".join(f"`{key}={value}`" for key, value in ARMS[arm].items()) if arm in ARMS else arm


def model_overrides(arm: str, n_blocks: int = BLOCKS) -> list[str]:
    """Return overrides for all keys in NETWORK, including the keys in which the arm is equal to the baseline."""
    kinds = NETWORK | ARMS[arm]
    if kinds["mixers"].startswith("["):
        kinds["mixers"] = alternating(n_blocks)
    return [f"model.{key}={value}" for key, value in kinds.items()]


def overrides(arm: str, *, seed: int, data: Path, steps: int | None, options: Sequence[str] = ()) -> list[str]:
    """Return the overrides of experiment=demo that train the arm, without evaluations during training.

    Args:
        data: a store, as an absolute path.
        steps: number of training steps; None for the demo's number.
        options: further overrides.
    """
    budget = [] if steps is None else [f"trainer.max_steps={steps}", f"optim.warmup_steps={max(1, steps // WARMUP)}"]
    return [
        "experiment=demo",
        "logger=none",
        *model_overrides(arm),
        f"data.path={data}",
        f"seed={seed}",
        *budget,
        "trainer.eval_every=0",
        "report.samples=0",
        "report.untrained=false",
        *options,
    ]


def run_name(arm: str, seed: int, arguments: Sequence[str]) -> str:
    """Return the run's name: the arm, the seed and a hash of the overrides.

    Of the path in `data.path`, only the file's name enters the hash.
    """
    keys = [Path(argument).name if argument.startswith("data.path=") else argument for argument in arguments]
    return f"{arm}_{seed}_{hashlib.sha256(' '.join(keys).encode()).hexdigest()[:8]}"
