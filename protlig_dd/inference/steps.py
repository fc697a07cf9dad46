"""Sample step by step: look at every reverse step, change residues between steps, stop and continue."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property

import numpy as np
import torch
from jaxtyping import Float64
from torch import Tensor

from protlig_dd.diffusion.numerics import clamp_negative
from protlig_dd.diffusion.samplers.base import SamplerOptions
from protlig_dd.diffusion.sampling import ReverseSteps, Step
from protlig_dd.diffusion.score import ScoreFn
from protlig_dd.inference.sequences import (
    FREE,
    check_biases,
    check_list,
    check_seed,
    check_trained_length,
    check_whole,
    encode_with_free,
    fix_residues,
)
from protlig_dd.system.random import keyed_generator
from protlig_dd.tokenizer import AMINO_ACIDS, LETTERS, MASK, ProteinTokenizer

CPU = torch.device("cpu")


@dataclass(frozen=True)
class SampledStep:
    """What one reverse step did. Positions count residues from 0, as in `sequence[position]`."""

    number: int
    """Number of the step, from 1."""
    sigma: float
    """Total noise before the step."""
    sigma_next: float
    """Total noise after the step; 0 for the last step."""
    sequences: list[str]
    """The sequences after the step, with `_` at masked positions."""
    changed: list[list[int]]
    """For each sequence, the positions that the step has changed."""
    step: Step = field(repr=False)
    reverse: ReverseSteps = field(repr=False)

    @cached_property
    def log_probs(self) -> list[Float64[Tensor, "length 20"]]:
        """Return the log-probability of each amino acid as the final residue, for each sequence, on the CPU.

        This is the model's posterior of x0 at each position, given the tokens before the step. Temperature, top_p and
        log_bias are not applied. With the absorbing graph an unmasked residue is final: its letter has log-probability
        0, and all other letters have -inf. The rows of context letters are -inf. With `parametrisation=log_score` and a
        graph without a mask, the posterior undoes all the noise in one step, which amplifies the network's errors at
        high sigma. The log-probabilities are computed when they are first read.
        """
        score_fn, free_T = self.reverse.score_fn, self.reverse.sampler.free_T
        graph = score_fn.graph
        xt_R, logits_RV = self.step.before[free_T], self.step.logits[free_T]
        moving_R = xt_R < graph.n_reverse_states
        sigma = torch.full((int(moving_R.sum()),), self.sigma, dtype=torch.float64, device=logits_RV.device)
        probs = score_fn.reverse_probs(logits_RV[moving_R], xt_R[moving_R], sigma, torch.zeros_like(sigma))
        log_RV = torch.full_like(logits_RV, -torch.inf)
        log_RV[moving_R] = clamp_negative(probs)[0][:, : graph.n_states].log().to(log_RV.device)
        return list(log_RV.cpu().split([len(sequence) for sequence in self.sequences]))


class SamplingSteps:
    """An iterator that samples and yields SampledStep.

    All designs are computed in one pack. Without edits, the final sequences are those that `generate` samples in one
    pack. If `generate` needs several packs, the network's outputs may differ by rounding. A loop over the steps may
    stop at any step; `next` or another loop continues from there.

    Args:
        designs: for each protein its number of residues, or a sequence with `_` at free positions. The other residues
            of such a sequence are fixed, as in infilling.
        seed: the seed and a design's index determine its random draws, as in `generate` and `protlig_dd.sample`.
        log_bias: nats for each amino acid (see `sample`): (20,) for all positions of all proteins, or one tensor
            (length_i, 20) for each protein.
        max_len: largest number of residues that the model was trained on.

    Raises:
        ValueError: no design, an illegal letter, a design without free positions or with more than max_len residues, a
            bias whose shape does not match its design, or invalid options (see `sample`).
    """

    def __init__(
        self,
        score_fn: ScoreFn,
        designs: Sequence[int | str],
        options: SamplerOptions,
        *,
        seed: int = 0,
        log_bias: Tensor | Sequence[Tensor] | None = None,
        max_len: int,
    ) -> None:
        check_list(designs, "sample_steps takes a list of lengths and sequences")
        check_seed(seed)
        self.templates = [template_of(design, f"designs[{i}]", max_len) for i, design in enumerate(designs)]
        lengths = [len(template) for template in self.templates]
        check_biases(log_bias, lengths)
        self.reverse = ReverseSteps(
            score_fn,
            lengths,
            options,
            [keyed_generator(seed, "sample", i, CPU) for i in range(len(designs))],
            fix_residues(self.templates) if any(isinstance(design, str) for design in designs) else None,
            log_bias=log_bias if log_bias is None or isinstance(log_bias, Tensor) else torch.cat(list(log_bias)),
        )

    @property
    def sequences(self) -> list[str]:
        """The current sequences, with `_` at masked positions."""
        return [ProteinTokenizer().decode(ids) for ids in self.reverse.residues()]

    @property
    def done(self) -> int:
        """Number of steps that have run. The total number of steps is `len(self)`."""
        return self.reverse.done

    def __len__(self) -> int:
        return len(self.reverse)

    def __iter__(self) -> "SamplingSteps":
        return self

    def __next__(self) -> SampledStep:
        step = next(self.reverse)
        moved = self.reverse.batch.unpack(step.before != step.after)
        changed = [(tokens.nonzero()[:, 0] - 1).tolist() for tokens in moved]
        level = step.level
        return SampledStep(level.number, level.sigma, level.sigma_next, self.sequences, changed, step, self.reverse)

    def finish(self) -> list[str]:
        """Run the remaining steps and return the sequences."""
        for _ in self.reverse:
            pass
        return self.sequences

    def edit(self, protein: int, residues: Mapping[int, str]) -> None:
        """Change residues before the next step.

        With the absorbing graph a letter stays for the remaining steps and `_` masks the position again. The other
        graphs have no mask, and later steps may change the letter. A context letter, such as X, stays with every graph.

        Args:
            protein: index of the protein in `designs`.
            residues: maps positions, counted from 0, to letters or `_`.

        Raises:
            ValueError: all steps are done; the protein or position does not exist; the letter is not allowed, or
                forbidden by log_bias; or the design fixes the residue. In all these cases nothing is changed.
        """
        batch, graph = self.reverse.batch, self.reverse.score_fn.graph
        check_whole(protein, "edit takes the number of a protein")
        if not isinstance(residues, Mapping):
            raise ValueError(f"edit takes a mapping of positions to letters, such as {{10: 'W'}}, got {residues!r:.40}")
        if self.done == len(self):
            raise ValueError(f"all {len(self)} steps are done, so an edit has no effect; edit the sequences instead")
        if not 0 <= protein < len(self.templates):
            raise ValueError(
                f"protein {protein} does not exist: {len(self.templates)} proteins are sampled, counted from 0"
            )
        template, tokens = self.templates[protein], batch.tokens.clone()
        first = sum(batch.lengths[:protein]) + 1  # index in `tokens` of the protein's residue 0
        for position, letter in residues.items():
            check_whole(position, f"protein {protein}: a position is a whole number from 0")
            where = f"position {position} of protein {protein}"
            if not 0 <= position < len(template):
                raise ValueError(f"{where} does not exist: it has {len(template)} residues, counted from 0")
            if letter not in tuple(LETTERS):
                raise ValueError(f"{where}: {letter!r} is not an allowed letter; choose from {LETTERS}")
            if letter == FREE and not graph.masks:
                raise ValueError(f"{where}: the graph {graph.name} has no mask; give a letter instead of `{FREE}`")
            if template[position] != MASK:
                raise ValueError(f"{where} is fixed by its design, which has {LETTERS[template[position]]} there")
            if letter in AMINO_ACIDS and self.forbids(first - 1 - 2 * protein + position, AMINO_ACIDS.index(letter)):
                raise ValueError(f"{where}: log_bias forbids {letter} there, so the last step would replace it")
            tokens[first + position] = LETTERS.index(letter)
        self.reverse.continue_from(tokens)

    def forbids(self, residue: int, amino_acid: int) -> bool:
        """Whether log_bias forbids an amino acid, given by its id, at a residue, given by its index in the pack."""
        bias = self.reverse.sampler.bias
        return bias is not None and bool(bias[residue, amino_acid] == -torch.inf)


def template_of(design: int | str, name: str, max_len: int) -> np.ndarray:
    """Return the token ids (length,) of a design's residues, with MASK at free positions; see `SamplingSteps`."""
    if not isinstance(design, str):
        check_whole(design, f"{name}: give a number of residues, or a sequence with `{FREE}` at free positions")
        check_trained_length(int(design), name, max_len)
        design = FREE * int(design)
    template = encode_with_free(design, name)[1:-1]
    check_trained_length(len(template), name, max_len)
    if MASK not in template:
        raise ValueError(f"{name} has no free position, so there is nothing to sample; mark positions with `{FREE}`")
    return template
