"""Load a trained model in one line of Python, from an exported folder or the Hugging Face Hub.

    from protlig_dd.hub import ProteinDiffusion

    model = ProteinDiffusion.from_pretrained("models/demo")          # written by python -m protlig_dd.export
    vectors = model.embed(["MKTAYIAKQR", "MSHHWGYG"])                # (2, hidden)
    scores = model.nll(["MKTAYIAKQR", "MSHHWGYG"])                   # bounds and standard errors, nats/residue

docs/python.md and docs/inspect.md show all methods.

Loading from the hub and `push_to_hub` need huggingface_hub: pip install 'protlig_dd[hub]'. The weights are safetensors
and the config is JSON, so loading a model never runs code from its files. An exported folder also contains code for
Hugging Face transformers. protlig_dd writes and uploads this code, but neither downloads nor runs it.

Methods that share code with commands import this code when they are called, because loading a model must not need Hydra
or HDF5.
"""

import tempfile
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float, Float32, Float64
from torch import Tensor, nn

from protlig_dd.batch import TOKENS_PER_PACK, PackedBatch
from protlig_dd.config.components import build_score_fn
from protlig_dd.diffusion.likelihood import BoundsPerResidue
from protlig_dd.diffusion.samplers.base import SamplerOptions
from protlig_dd.evaluation.variants.mutants import MutantScores
from protlig_dd.inference.download import check_name, download, hugging_face
from protlig_dd.inference.embedding import mean_embeddings
from protlig_dd.inference.exported import (
    CARD,
    DESCRIPTION,
    READ,
    WEIGHTS,
    context_in,
    is_exported,
    read_description,
    write_exported,
)
from protlig_dd.inference.hooks import Hook, hooks
from protlig_dd.inference.inspect import analysis, attention
from protlig_dd.inference.lengths import lengths_of
from protlig_dd.inference.profiles import check_masks, log_probs, profile
from protlig_dd.inference.sequences import LogBias
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
            folder = download(str(name), revision, READ)
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

    def logits(self, sequence: str, *, t: float | None = None) -> Float32[Tensor, "residues 20"]:
        """Return log-probabilities of the amino acids (ACDEFGHIKLMNPQRSTVWY) at each position, given the sequence.

        The network reads the sequence once; `_` is a masked position. See `protlig_dd.inference.profiles.log_probs`.
        """
        with self.analysis():
            return log_probs(self.score_fn, sequence, t=t, max_len=self.max_len)

    def pssm(self, sequence: str) -> Float64[Tensor, "residues 20"]:
        """Return log-probabilities of the amino acids (ACDEFGHIKLMNPQRSTVWY) at each position, masked alone.

        The network reads all other residues; see `protlig_dd.inference.profiles.profile`.
        """
        with self.analysis():
            return profile(self.score_fn, sequence, max_len=self.max_len, tokens_per_pack=TOKENS_PER_PACK)

    def nll(self, sequences: Sequence[str], *, draws: int = 8, seed: int = 0) -> BoundsPerResidue:
        """Return each protein's bound on the NLL in nats per residue, as computed by `protlig_dd.score`.

        See `protlig_dd.evaluation.likelihood.single.protein_bounds`; `read_whole` there checks the sequences.
        """
        from protlig_dd.evaluation.likelihood import single

        single.check_draws(draws, seed)
        proteins = single.read_whole(sequences, "nll", self.max_len)
        with self.analysis():
            return single.protein_bounds(self.score_fn, proteins, draws=draws, seed=seed)

    def pseudo_nll(self, sequences: Sequence[str]) -> Float64[Tensor, " n"]:
        """Return minus each protein's pseudo-log-likelihood, in nats per residue (absorbing graph only).

        See `protlig_dd.evaluation.likelihood.single.pseudo_nlls`.
        """
        from protlig_dd.evaluation.likelihood import single

        check_masks(self.score_fn, "pseudo_nll")
        proteins = single.read_whole(sequences, "pseudo_nll", self.max_len)
        with self.analysis():
            return single.pseudo_nlls(self.score_fn, [protein.tokens for protein in proteins])

    def sample(
        self,
        n: int,
        *,
        lengths: int | str | Sequence[int] = "empirical",
        steps: int = 128,
        predictor: str = "analytic",
        temperature: float = 1.0,
        top_p: float = 1.0,
        log_bias: LogBias = None,
        seed: int = 0,
    ) -> list[str]:
        """Return the n proteins that `protlig_dd.sample` samples with these values; configs/sample.yaml explains them.

        See `lengths_to_sample` in `protlig_dd.inference.designs`, and `LogBias` in `protlig_dd.inference.sequences`.
        """
        from protlig_dd.inference import designs

        recorded = lengths_of(
            self.description["length_counts"], self.description.get("cropped_sequences"), self.max_len
        )
        chosen = designs.lengths_to_sample(lengths, n, seed, recorded, self.max_len)
        options = SamplerOptions(steps, predictor, temperature, top_p)
        with self.analysis():
            return designs.sample_sequences(self.score_fn, chosen, options, seed=seed, log_bias=log_bias)

    def infill(
        self,
        sequences: Sequence[str],
        n: int = 1,
        *,
        steps: int = 128,
        predictor: str = "analytic",
        temperature: float = 1.0,
        top_p: float = 1.0,
        log_bias: LogBias = None,
        seed: int = 0,
    ) -> list[list[str]]:
        """Return the n designs of each sequence that `protlig_dd.infill` samples for a FASTA file of these sequences.

        `_` marks the free positions. See `protlig_dd.inference.designs.infill_sequences`.
        """
        from protlig_dd.inference import designs

        options = SamplerOptions(steps, predictor, temperature, top_p)
        settings: dict[str, Any] = {"n": n, "seed": seed, "log_bias": log_bias, "max_len": self.max_len}
        with self.analysis():
            return designs.infill_sequences(self.score_fn, sequences, options, **settings)

    def variants(
        self,
        target: str,
        mutations: Sequence[str] | None = None,
        *,
        strategy: str = "auto",
        offset: int = 0,
        draws: int = 32,
        seed: int = 0,
    ) -> MutantScores:
        """Return the scores of mutants of `target` that `protlig_dd.variants` computes; None: all substitutions.

        See `protlig_dd.evaluation.variants.fitness.score_mutants`.
        """
        from protlig_dd.evaluation.variants.fitness import score_mutants

        settings: dict[str, Any] = {"strategy": strategy, "offset": offset, "draws": draws, "seed": seed}
        with self.analysis():
            return score_mutants(self.score_fn, target, mutations, max_len=self.max_len, **settings)

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

    def push_to_hub(
        self, name: str, *, private: bool = True, message: str = "A protlig_dd model", dry_run: bool = False
    ) -> str:
        """Upload the files of `save_pretrained`, and no others, to owner/name on the hub; return the commit's URL.

        Args:
            private: whether a new repository is private; an existing repository keeps its setting.
            dry_run: write the files to a temporary folder and return a list of them with their sizes, instead of the
                URL. Nothing is uploaded, and no network is needed.

        Raises:
            ValueError: huggingface_hub is not installed, or `name` is not a valid name.
        """
        hub = hugging_face()
        check_name(hub, name)
        with tempfile.TemporaryDirectory() as parent:
            folder = Path(parent) / "model"
            self.save_pretrained(folder)
            if dry_run:
                sizes = {path.name: path.stat().st_size for path in sorted(folder.iterdir())}
                visibility = "private" if private else "public"
                heading = f"{name} ({visibility} if it is new): {len(sizes)} files, {sum(sizes.values()):,} bytes"
                return "\n".join([heading, *(f"  {file}: {size:,} bytes" for file, size in sizes.items())])
            api = hub.HfApi()
            api.create_repo(name, private=private, exist_ok=True)
            return str(api.upload_folder(repo_id=name, folder_path=folder, commit_message=message))
