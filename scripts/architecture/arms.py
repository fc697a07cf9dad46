"""The kinds of networks to compare: the baseline, and networks that differ from it in one key."""

import hashlib
from collections.abc import Sequence
from pathlib import Path

from protlig_dd.model.config import MLPS
from protlig_dd.model.positions import POSITIONS

BASELINE = "rope"
NETWORK = {"positions": "rope", "mixers": "attention", "mlp": "gelu", "tie_weights": "false"}
BLOCKS = 2  # of the demo's network
WARMUP = 15  # a warm-up step for this many steps, as in the demo


def alternating(n_blocks: int) -> str:
    """Return model.mixers with test-time training in every other block."""
    return f"[{','.join(['attention', 'ttt_linear'][block % 2] for block in range(n_blocks))}]"


ENCODINGS = sorted(POSITIONS, key=lambda name: name != BASELINE)  # the baseline first
ARMS: dict[str, dict[str, str]] = {
    **{name: {"positions": name} for name in ENCODINGS},
    "ttt_linear": {"mixers": alternating(BLOCKS)},
    **{name: {"mlp": name} for name in MLPS if name != NETWORK["mlp"]},
    "tied": {"tie_weights": "true"},
}


def label(arm: str) -> str:
    """Return the name of an arm as the tables print it: the keys of `model` in which it differs from the baseline."""
    if arm == BASELINE:
        return "baseline: " + ", ".join(f"`{key}={value}`" for key, value in NETWORK.items())
    if ARMS.get(arm, {}).get("mixers", "").startswith("["):
        return f"`{arm}` in every other block"
    return ", ".join(f"`{key}={value}`" for key, value in ARMS[arm].items()) if arm in ARMS else arm


def model_overrides(arm: str, n_blocks: int = BLOCKS) -> list[str]:
    """Return the config overrides that choose the kinds of an arm, all of them explicitly."""
    kinds = NETWORK | ARMS[arm]
    if kinds["mixers"].startswith("["):
        kinds["mixers"] = alternating(n_blocks)
    return [f"model.{key}={value}" for key, value in kinds.items()]


def overrides(arm: str, *, seed: int, data: Path, steps: int | None, options: Sequence[str] = ()) -> list[str]:
    """Return the overrides of a run with the demo's network and budget, without evaluations during training.

    Args:
        data: a store, as an absolute path.
        steps: number of training steps; None: the demo's.
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
    """Return the run's name, which contains a hash of its overrides. The folder of its data does not matter."""
    keys = [Path(argument).name if argument.startswith("data.path=") else argument for argument in arguments]
    return f"{arm}_{seed}_{hashlib.sha256(' '.join(keys).encode()).hexdigest()[:8]}"
