"""Judges that other packages bring: profile HMMs (pyhmmer), ESM-2 and ESMFold (transformers)."""

import importlib
import math
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from protlig_dd.config.verbs import JudgeConfig
from protlig_dd.evaluation.samples.statistics import Figure, figures, perplexity, share
from protlig_dd.system.device import resolve_device

E_VALUE = 1e-3  # of HMMs that have no gathering cutoffs of their own, as Pfam's have
MASKED_AT_ONCE = 32  # copies of a protein in one pass, each with another residue masked


def imported(package: str, extra: str, wanted: str) -> Any:
    """An optional package.

    Raises:
        ValueError: it is not installed; says how to install it.
    """
    try:
        return importlib.import_module(package)
    except ImportError as error:
        raise ValueError(f"{wanted} needs {package}: pip install 'protlig_dd[{extra}]'") from error


Judge = Callable[[Sequence[str], Callable[[], None]], list[float]]
"""Proteins, and what to call after each, to a figure of each."""


def pfam_hits(hmms: Path) -> Judge:
    """Whether (1 or 0) a protein has a significant hit to some profile HMM of a file (HMMER's, such as Pfam-A.hmm).

    Raises:
        ValueError: pyhmmer is not installed, or the file holds no HMMs.
    """
    pyhmmer = imported("pyhmmer", "hmm", f"hmm={hmms}")
    if not hmms.is_file():
        raise ValueError(f"hmm={hmms}: no such file")
    alphabet = pyhmmer.easel.Alphabet.amino()
    try:
        with pyhmmer.plan7.HMMFile(hmms) as file:
            profiles = list(file)
    except (ValueError, EOFError) as error:
        raise ValueError(f"{hmms}: not a file of HMMs: {error}") from error
    if not profiles:
        raise ValueError(f"{hmms}: no HMMs in it")
    own = [hmm for hmm in profiles if hmm.cutoffs.gathering_available()]
    others = [hmm for hmm in profiles if not hmm.cutoffs.gathering_available()]

    def judge(sequences: Sequence[str], advance: Callable[[], None]) -> list[float]:
        block = pyhmmer.easel.TextSequenceBlock(
            [pyhmmer.easel.TextSequence(name=str(i), sequence=text) for i, text in enumerate(sequences)]
        ).digitize(alphabet)
        found = [0.0] * len(sequences)
        for some, options in ((own, {"bit_cutoffs": "gathering"}), (others, {"E": E_VALUE, "incE": E_VALUE})):
            for hits in pyhmmer.hmmer.hmmsearch(some, block, **options):
                for hit in hits.included:
                    found[int(hit.name)] = 1.0
        for _ in sequences:
            advance()
        return found

    return judge


def pseudo_perplexity(logits_of: Callable[[Tensor], Tensor], tokens: Tensor, mask: int, places: range) -> float:
    """exp of the mean cross-entropy of each residue when it alone is masked (Salazar et al., arXiv 1910.14659).

    Args:
        logits_of: (copies, length) tokens -> (copies, length, vocabulary) logits.
        tokens: (length,) ids of one protein; places: those that are residues.
    """
    nats = 0.0
    for hidden in torch.tensor(places, device=tokens.device).split(MASKED_AT_ONCE):
        copies = torch.arange(len(hidden), device=tokens.device)
        shown = tokens.repeat(len(hidden), 1)
        shown[copies, hidden] = mask
        log_p = logits_of(shown)[copies, hidden].float().log_softmax(-1)
        nats -= float(log_p[copies, tokens[hidden]].sum())
    return math.exp(nats / len(places))


def esm2_pseudo_perplexities(name: str, device: str) -> Judge:
    """Of an ESM-2 model, such as facebook/esm2_t12_35M_UR50D (doi 10.1126/science.ade2574).

    Raises:
        ValueError: transformers is not installed, or there is no such model.
    """
    where, tokenizer, model = loaded("EsmForMaskedLM", name, device, wanted=f"esm2={name}")

    @torch.no_grad()
    def judge(sequences: Sequence[str], advance: Callable[[], None]) -> list[float]:
        found = []
        for sequence in sequences:
            tokens = tokenizer(sequence, return_tensors="pt")["input_ids"][0].to(where)  # <cls> residues <eos>
            residues = range(1, len(tokens) - 1)
            found.append(pseudo_perplexity(lambda ids: model(ids).logits, tokens, tokenizer.mask_token_id, residues))
            advance()
        return found

    return judge


def esmfold_plddts(name: str, device: str) -> Judge:
    """Mean pLDDT of the atoms that ESMFold (facebook/esmfold_v1) predicts, 0 to 100 (doi 10.1126/science.ade2574).

    Raises:
        ValueError: transformers is not installed, or the model cannot be loaded.
    """
    where, tokenizer, model = loaded("EsmForProteinFolding", name, device, wanted=f"esmfold={name}")

    @torch.no_grad()
    def judge(sequences: Sequence[str], advance: Callable[[], None]) -> list[float]:
        found = []
        for sequence in sequences:
            tokens = tokenizer(sequence, return_tensors="pt", add_special_tokens=False)["input_ids"]
            folded = model(tokens.to(where))
            there = folded["atom37_atom_exists"]
            found.append(float(100 * (folded["plddt"] * there).sum() / there.sum()))
            advance()
        return found

    return judge


def loaded(kind: str, name: str, device: str, wanted: str) -> tuple[torch.device, Any, Any]:
    """Device, tokenizer and model of transformers."""
    transformers = imported("transformers", "esm", wanted)
    where = resolve_device(device)
    try:
        tokenizer = transformers.AutoTokenizer.from_pretrained(name)
        return where, tokenizer, getattr(transformers, kind).from_pretrained(name).eval().to(where)
    except (OSError, ValueError) as error:
        raise ValueError(f"{name} cannot be loaded: {error}") from error


Summary = Callable[[Sequence[float], Sequence[str]], Figure]
"""What a judge said of each of a set's proteins, and the proteins, to a figure of the set."""


def outside_judges(config: JudgeConfig) -> Iterator[tuple[str, tuple[Judge, Summary]]]:
    """Row, judge and summary of those that other packages bring, loaded before time is spent on anything else."""
    if config.hmm is not None:
        yield "with a hit to the HMMs", (pfam_hits(Path(config.hmm)), lambda values, _: share(values))
    if config.esm2 is not None:
        asked = esm2_pseudo_perplexities(config.esm2, config.device)
        yield f"pseudo-perplexity, {config.esm2}", (asked, lambda values, some: perplexity(values, [*map(len, some)]))
    if config.esmfold is not None:
        yield f"pLDDT, {config.esmfold}", (esmfold_plddts(config.esmfold, config.device), lambda v, _: figures(v))
