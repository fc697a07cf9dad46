"""Load a trained model in one line of Python, from an exported folder or the Hugging Face Hub.

    from protlig_dd.hub import ProteinDiffusion

    model = ProteinDiffusion.from_pretrained("models/demo")          # written by python -m protlig_dd.export
    vectors = model.embed(["MKTAYIAKQR", "MSHHWGYG"])                # (2, hidden)

Loading from the hub and `push_to_hub` need huggingface_hub: pip install 'protlig_dd[hub]'. The weights are safetensors
and the config is JSON, so loading a model never runs code from its files.
"""

import tempfile
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import replace
from pathlib import Path

import torch
from jaxtyping import Float, Float32
from torch import Tensor, nn

from protlig_dd.batch import PackedBatch
from protlig_dd.config.components import build_score_fn
from protlig_dd.diffusion.samplers.base import SamplerOptions
from protlig_dd.inference.download import download, hugging_face
from protlig_dd.inference.embedding import mean_embeddings
from protlig_dd.inference.exported import (
    CARD,
    DESCRIPTION,
    EXPORTED,
    WEIGHTS,
    context_in,
    is_exported,
    read_description,
    write_exported,
)
from protlig_dd.inference.hooks import Hook, hooks
from protlig_dd.inference.inspect import analysis, attention
from protlig_dd.inference.steps import SamplingSteps
from protlig_dd.model.config import ModelConfig
from protlig_dd.model.dit import DiT
from protlig_dd.runs.checkpoint import load_weights
from protlig_dd.system.device import resolve_device, resolve_precision
from protlig_dd.system.files import creating


class ProteinDiffusion(nn.Module):
    """An exported model, with the attributes `network`, `score_fn`, `noise` and `description` (its config.json).

    `protlig_dd.diffusion.sampling.sample` and `protlig_dd.diffusion.likelihood.nll_bound` take the `score_fn`.
    """

    def __init__(self, folder: Path, device: torch.device, precision: str) -> None:
        super().__init__()
        self.description = read_description(folder)
        self.card = (folder / CARD).read_text()
        try:
            score_fn = build_score_fn(
                model=ModelConfig(**self.description["model"]),
                graph=self.description["graph"],
                noise=self.description["noise"],
                parametrisation=self.description["parametrisation"],
                time_conditioning=self.description["time_conditioning"],
                device=device,
                precision=precision,
            )
            given = context_in(self.description["training"]) is not None
            self.score_fn = replace(score_fn, trained_with_context=given)
        except (KeyError, TypeError, AttributeError) as error:
            raise ValueError(f"{folder / DESCRIPTION}: damaged, or not written by protlig_dd ({error!r})") from error
        network = self.score_fn.model
        assert isinstance(network, DiT)
        load_weights(folder / WEIGHTS, network)
        self.network, self.noise = network, self.score_fn.noise
        self.eval()

    @classmethod
    def from_pretrained(
        cls, name: str | Path, *, revision: str | None = None, device: str = "auto", precision: str = "fp32"
    ) -> "ProteinDiffusion":
        """Load an exported folder, or a model from the hub or the hub's cache.

        Args:
            name: the folder, or the model's name on the hub: owner/name.
            revision: branch, tag or commit of a model on the hub.
            device: auto | cpu | cuda | cuda:N | mps.
            precision: auto | bf16 | fp32.

        Raises:
            ValueError: neither a folder nor a model on the hub has this name, the folder is not an exported model,
                huggingface_hub is not installed, or a file is damaged or not written by protlig_dd.
        """
        if not isinstance(name, str | Path) or not str(name):
            raise ValueError(f"from_pretrained takes the name of a folder or of a model on the hub, got {name!r:.40}")
        folder = Path(name)
        if not folder.is_dir():
            folder = download(str(name), revision, EXPORTED)
        if not is_exported(folder):
            raise ValueError(f"{folder}: not an exported model; `python -m protlig_dd.export` writes one from a run")
        resolved = resolve_device(device)
        return cls(folder, resolved, resolve_precision(precision, resolved))

    @property
    def max_len(self) -> int:
        """`data.max_len` of the training: longer proteins were cropped to this number of residues."""
        return int(self.description["max_len"])

    def forward(self, batch: PackedBatch, sigma: Tensor) -> Float[Tensor, "total 20"]:
        """Return the logits of a pack. `sigma` (n,) has the noise level of each sequence."""
        return self.score_fn.logits(batch, sigma)

    def embed(self, sequences: Sequence[str], *, layer: int = -1, long: str = "error") -> Float[Tensor, "n hidden"]:
        """Return the mean hidden state of each protein, on the CPU, as computed by `protlig_dd.embed`.

        Args:
            sequences: letters in either case.
            layer: 0 is the embedding, k is after k blocks, -1 is after the last block and the final norm.
            long: what to do with proteins of more than `max_len` residues, `error` or `window` (windows of `max_len`
                residues that overlap by at least half; a residue's state is the mean over the windows that contain it).

        Raises:
            ValueError: `sequences` is not a list of strings; a sequence has an illegal letter or is too long (the
                message names the sequence); or the network does not have this layer.
        """
        return mean_embeddings(self.network, self.score_fn, sequences, layer=layer, max_len=self.max_len, long=long)

    def attention(
        self,
        sequences: Sequence[str],
        *,
        blocks: Sequence[int] | None = None,
        heads: Sequence[int] | None = None,
        t: float | None = None,
    ) -> list[Float32[Tensor, "blocks heads tokens tokens"]]:
        """Return the attention weights of each protein on the CPU; see `protlig_dd.inference.inspect.attention`."""
        return attention(self.score_fn, sequences, blocks=blocks, heads=heads, t=t, max_len=self.max_len)

    def hooks(self, functions: Mapping[str, Hook]) -> AbstractContextManager[None]:
        """Read or replace outputs of the network's modules by name; see `protlig_dd.inference.hooks.hooks`.

        with model.hooks({"blocks.0": f}):
            model.embed(sequences)
        """
        return hooks(self.network, functions)

    def analysis(self) -> AbstractContextManager[None]:
        """Run a `with` body in evaluation mode and without gradients; see `protlig_dd.inference.inspect.analysis`."""
        return analysis(self)

    def sample_steps(
        self,
        designs: Sequence[int | str],
        options: SamplerOptions,
        *,
        seed: int = 0,
        log_bias: Tensor | Sequence[Tensor] | None = None,
    ) -> SamplingSteps:
        """Sample step by step; see `protlig_dd.inference.steps.SamplingSteps`.

        Args:
            designs: the number of residues of each design, or its sequence with `_` at free positions. A design has at
                most `max_len` residues.
        """
        return SamplingSteps(self.score_fn, designs, options, seed=seed, log_bias=log_bias, max_len=self.max_len)

    def save_pretrained(self, folder: str | Path) -> None:
        """Write the model with its current weights to a new folder.

        Raises:
            ValueError: the folder exists.
        """
        with creating(Path(folder)) as temporary:
            write_exported(temporary, self.network.state_dict(), self.description, self.card)

    def push_to_hub(self, name: str, *, private: bool = True, message: str = "A protlig_dd model") -> str:
        """Upload the files of `save_pretrained`, and no others, to owner/name on the hub; return the commit's URL.

        Args:
            private: whether a new repository is private; an existing repository keeps its setting.
        """
        api = hugging_face().HfApi()
        api.create_repo(name, private=private, exist_ok=True)
        with tempfile.TemporaryDirectory() as parent:
            folder = Path(parent) / "model"
            self.save_pretrained(folder)
            return str(api.upload_folder(repo_id=name, folder_path=folder, commit_message=message))
