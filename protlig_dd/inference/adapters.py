"""The adapters of a run (see model/lora.py), merged with the weights that they extend.

The checkpoints of a run with adapters contain only the trained parameters. The run folder contains the weights of the
source model once, in base.safetensors.
"""

from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from protlig_dd.config.components import build_model
from protlig_dd.model.config import ModelConfig
from protlig_dd.model.lora import base_weights, merged_weights
from protlig_dd.runs.checkpoint import load_into, trained_parameters
from protlig_dd.system.files import sha256

BASE = "base.safetensors"


@dataclass(frozen=True)
class Adapters:
    """The network with adapters that a checkpoint belongs to.

    Args:
        base: the file of the weights that the adapters extend.
        model: the config of the network, with its adapters.
    """

    base: Path
    model: ModelConfig
    time_conditioning: bool

    def merged(self, trained: Path) -> dict[str, Tensor]:
        """Return the weights of the network without adapters that computes the same function, by name, on the CPU.

        Args:
            trained: the file of the trained parameters.

        Raises:
            ValueError: a file cannot be read, or does not have the tensors of this network; the message names the file.
        """
        with torch.device("meta"):  # without random initial weights
            network = build_model(self.model, "sdpa", self.time_conditioning)
        network.to_empty(device="cpu")
        load_into(base_weights(network), self.base)
        load_into(trained_parameters(network), trained)
        return merged_weights(network)


def check_base(base: Path, checksum: str | None) -> None:
    """Raise a ValueError unless a run's copy of its source's weights has this SHA-256."""
    if (found := sha256(base)) != checksum:
        raise ValueError(
            f"{base}: damaged, SHA-256 is {found[:12]}, but the run started from weights with {str(checksum)[:12]}; "
            "replace it by the weights of the model that the run started from"
        )
