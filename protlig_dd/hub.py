"""A trained model in one line of Python, from an exported folder or the Hugging Face Hub.

    from protlig_dd.hub import ProteinDiffusion

    model = ProteinDiffusion.from_pretrained("models/demo")          # made by python -m protlig_dd.export
    vectors = model.embed(["MKTAYIAKQR", "MSHHWGYG"])                # (2, hidden)

A name on the hub, and `push_to_hub`, need huggingface_hub: pip install 'protlig_dd[hub]'. Weights are safetensors and
the config is data: nothing that is loaded can run code.
"""

import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from protlig_dd.batch import PackedBatch
from protlig_dd.config.components import load_model
from protlig_dd.inference.embedding import embed, resolve_layer
from protlig_dd.inference.exported import (
    CARD,
    DESCRIPTION,
    EXPORTED,
    WEIGHTS,
    is_exported,
    read_description,
    write_exported,
)
from protlig_dd.model.config import ModelConfig
from protlig_dd.model.dit import DiT
from protlig_dd.system.device import resolve_device, resolve_precision
from protlig_dd.system.files import replacing
from protlig_dd.tokenizer import ProteinTokenizer


class ProteinDiffusion(nn.Module):
    """An exported model: `network`, `score_fn`, `noise`, and the `description` that its config.json holds.

    `protlig_dd.diffusion.sampling.sample` and `protlig_dd.diffusion.likelihood.nll_bound` take its score_fn.
    """

    def __init__(self, folder: Path, device: torch.device, precision: str) -> None:
        super().__init__()
        self.description = read_description(folder)
        self.card = (folder / CARD).read_text()
        try:
            self.score_fn = load_model(
                folder / WEIGHTS,
                model=ModelConfig(**self.description["model"]),
                graph=self.description["graph"],
                noise=self.description["noise"],
                parametrisation=self.description["parametrisation"],
                time_conditioning=self.description["time_conditioning"],
                device=device,
                precision=precision,
            )
        except (KeyError, TypeError, AttributeError) as error:
            raise ValueError(f"{folder / DESCRIPTION}: not what protlig_dd has written ({error!r})") from error
        network = self.score_fn.model
        assert isinstance(network, DiT)
        self.network, self.noise = network, self.score_fn.noise
        self.eval()

    @classmethod
    def from_pretrained(
        cls, name: str | Path, *, revision: str | None = None, device: str = "auto", precision: str = "fp32"
    ) -> "ProteinDiffusion":
        """Load an exported folder, or a model of that name from the hub (or from its cache, where it is there).

        Args:
            revision: of a model on the hub: a branch, tag or commit.
            device: auto | cpu | cuda | cuda:N | mps.
            precision: auto | bf16 | fp32.

        Raises:
            ValueError: neither a folder nor a model on the hub, or huggingface_hub is missing; a damaged or foreign
                file, named.
        """
        folder = Path(name)
        if not folder.is_dir():
            folder = download(str(name), revision)
        if not is_exported(folder):
            raise ValueError(f"{folder}: not an exported model; `python -m protlig_dd.export` makes one of a run")
        where = resolve_device(device)
        return cls(folder, where, resolve_precision(precision, where))

    @property
    def max_len(self) -> int:
        """Residues of the longest sequence that it was trained on."""
        return int(self.description["max_len"])

    def forward(self, batch: PackedBatch, sigma: Tensor) -> Float[Tensor, "total 20"]:
        """Logits of a pack at noise levels sigma (n,)."""
        return self.score_fn.logits(batch, sigma)

    def embed(self, sequences: Sequence[str], *, layer: int = -1) -> Float[Tensor, "n hidden"]:
        """The mean hidden state of each protein, as `python -m protlig_dd.embed long=window` makes it; on the CPU.

        Args:
            layer: 0 the embedding, k after k blocks, -1 the last, behind its norm.

        Raises:
            ValueError: a single string, no sequence, or an illegal letter; names the sequence.
        """
        if isinstance(sequences, str) or not len(sequences):
            raise ValueError(f"embed takes a list of sequences, got {sequences!r:.40}")
        encode = ProteinTokenizer().encode
        tokens = [encode(sequence.upper(), f"sequence {i}") for i, sequence in enumerate(sequences, start=1)]
        chosen = resolve_layer(layer, len(self.network.blocks))
        means = [
            embed(self.network, self.score_fn, [one], layer=chosen, max_len=self.max_len)[0].mean(0) for one in tokens
        ]
        return torch.stack(means)

    def save_pretrained(self, folder: str | Path) -> None:
        """Write the model, with the weights that it has now, to a folder that does not exist yet.

        Raises:
            ValueError: the folder exists.
        """
        with replacing(Path(folder)) as temporary:
            write_exported(temporary, self.network.state_dict(), self.description, self.card)

    def push_to_hub(self, name: str, *, private: bool = True, message: str = "A protlig_dd model") -> str:
        """Upload what `save_pretrained` writes, and nothing else, to owner/name on the hub; returns the commit's URL.

        Args:
            private: of a repository that this makes; one that exists stays as it is.
        """
        api = hugging_face().HfApi()
        api.create_repo(name, private=private, exist_ok=True)
        with tempfile.TemporaryDirectory() as parent:
            folder = Path(parent) / "model"
            self.save_pretrained(folder)
            return str(api.upload_folder(repo_id=name, folder_path=folder, commit_message=message))


def download(name: str, revision: str | None) -> Path:
    """The exported files of a model on the hub, in the hub's cache."""
    try:
        return Path(hugging_face().snapshot_download(name, revision=revision, allow_patterns=list(EXPORTED)))
    except (OSError, ValueError) as error:
        why = str(error).strip().splitlines()[0]
        raise ValueError(f"{name} does not exist here, and was not found on the hub: {why}") from error


def hugging_face() -> Any:
    try:
        import huggingface_hub
    except ImportError as error:
        raise ValueError("huggingface_hub is not installed: pip install 'protlig_dd[hub]'") from error
    return huggingface_hub
