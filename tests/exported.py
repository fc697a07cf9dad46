"""Small exported models with random weights, for tests of the commands and of the Python interface."""

import json
from pathlib import Path
from typing import Any

from protlig_dd.inference.exported import DESCRIPTION, write_exported

from .conftest import ROOT, make_model

KINDS: dict[str, dict[str, Any]] = {
    "absorbing": {"graph": "absorbing", "parametrisation": "x0", "time_conditioning": False},
    "absorbing, log_score": {"graph": "absorbing", "parametrisation": "log_score", "time_conditioning": True},
    "uniform": {"graph": "uniform", "parametrisation": "x0", "time_conditioning": True},
    "uniform, log_score": {"graph": "uniform", "parametrisation": "log_score", "time_conditioning": True},
}


def write_random(folder: Path, kind: str, *, max_len: int = 60, context: str = "none") -> Path:
    """Write an exported model of a kind in KINDS, and return its folder.

    Args:
        context: the model's `data.context`.
    """
    description = json.loads((ROOT / "tests/golden/files/exported" / DESCRIPTION).read_text())
    options = KINDS[kind]
    model = make_model(time_conditioning=options["time_conditioning"], norm="rms", qk_norm=True)
    if options["parametrisation"] == "log_score":
        model.head.out.weight.data.mul_(0.2)  # so that the scores are near those of a distribution
    description["training"]["data"] |= {"context": context, "max_len": max_len}
    description |= {
        "run": "random",
        "model": description["model"] | {"hidden_size": 32, "n_heads": 4, "n_blocks": 2, "cond_dim": 16, "mlp": "gelu"},
        "graph": {"name": options["graph"]},
        "parametrisation": options["parametrisation"],
        "time_conditioning": options["time_conditioning"],
        "max_len": max_len,
        "length_counts": description["length_counts"][: max_len + 1],
        "cropped_sequences": sum(description["length_counts"][max_len + 1 :]),
    }
    write_exported(folder, model.state_dict(), description)
    return folder
