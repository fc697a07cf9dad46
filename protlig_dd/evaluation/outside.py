"""Judges that other packages bring: profile HMMs (pyhmmer), ESM-2 and ESMFold (transformers)."""

import importlib
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from protlig_dd.runtime.environment import resolve_device

E_VALUE = 1e-3  # of HMMs that have no gathering cutoffs of their own, as Pfam's have


def imported(package: str, extra: str, wanted: str) -> Any:
    """An optional package.

    Raises:
        ValueError: it is not installed; says how to install it.
    """
    try:
        return importlib.import_module(package)
    except ImportError as error:
        raise ValueError(f"{wanted} needs {package}: pip install 'protlig_dd[{extra}]'") from error


def pfam_hits(sequences: Sequence[str], hmms: Path) -> list[bool]:
    """Whether each protein has a significant hit to some profile HMM of a file (HMMER's format, such as Pfam-A.hmm).

    Raises:
        ValueError: pyhmmer is not installed, or the file holds no HMMs.
    """
    pyhmmer = imported("pyhmmer", "hmm", f"hmm={hmms}")
    alphabet = pyhmmer.easel.Alphabet.amino()
    block = pyhmmer.easel.TextSequenceBlock(
        [pyhmmer.easel.TextSequence(name=str(i), sequence=text) for i, text in enumerate(sequences)]
    ).digitize(alphabet)
    try:
        with pyhmmer.plan7.HMMFile(hmms) as file:
            profiles = list(file)
    except (ValueError, EOFError) as error:
        raise ValueError(f"{hmms}: not a file of HMMs: {error}") from error
    if not profiles:
        raise ValueError(f"{hmms}: no HMMs in it")
    own = [hmm for hmm in profiles if hmm.cutoffs.gathering_available()]
    others = [hmm for hmm in profiles if not hmm.cutoffs.gathering_available()]
    found = [False] * len(sequences)
    for some, options in ((own, {"bit_cutoffs": "gathering"}), (others, {"E": E_VALUE, "incE": E_VALUE})):
        for hits in pyhmmer.hmmer.hmmsearch(some, block, **options):
            for hit in hits.included:
                found[int(hit.name)] = True
    return found


def pseudo_perplexity(logits_of: Callable[[Tensor], Tensor], tokens: Tensor, mask: int, places: range) -> float:
    """exp of the mean cross-entropy of each residue when it alone is masked (Salazar et al., arXiv 1910.14659).

    Args:
        logits_of: (1, length) tokens -> (1, length, vocabulary) logits.
        tokens: (length,) ids of one protein; places: those that are residues.
    """
    nats = 0.0
    for place in places:
        shown = tokens.clone()
        shown[place] = mask
        nats -= float(logits_of(shown[None])[0, place].float().log_softmax(-1)[tokens[place]])
    return float(torch.tensor(nats / len(places)).exp())


@torch.no_grad()
def esm2_pseudo_perplexities(sequences: Sequence[str], name: str, device: str) -> list[float]:
    """Of each protein under an ESM-2 model, such as facebook/esm2_t12_35M_UR50D (doi 10.1126/science.ade2574).

    Raises:
        ValueError: transformers is not installed, or there is no such model.
    """
    transformers = imported("transformers", "esm", f"esm2={name}")
    where = resolve_device(device)
    tokenizer, model = loaded(transformers, "EsmForMaskedLM", name)
    model = model.eval().to(where)
    found = []
    for sequence in sequences:
        tokens = tokenizer(sequence, return_tensors="pt")["input_ids"][0].to(where)  # <cls> residues <eos>
        found.append(
            pseudo_perplexity(lambda ids: model(ids).logits, tokens, tokenizer.mask_token_id, range(1, len(tokens) - 1))
        )
    return found


@torch.no_grad()
def esmfold_plddts(sequences: Sequence[str], device: str) -> list[float]:
    """Mean pLDDT of the atoms that ESMFold predicts for each protein, 0 to 100 (doi 10.1126/science.ade2574).

    Raises:
        ValueError: transformers is not installed, or the model cannot be loaded.
    """
    transformers = imported("transformers", "esm", "esmfold=true")
    where = resolve_device(device)
    tokenizer, model = loaded(transformers, "EsmForProteinFolding", "facebook/esmfold_v1")
    model = model.eval().to(where)
    found = []
    for sequence in sequences:
        folded = model(tokenizer(sequence, return_tensors="pt", add_special_tokens=False)["input_ids"].to(where))
        there = folded["atom37_atom_exists"]
        found.append(float(100 * (folded["plddt"] * there).sum() / there.sum()))
    return found


def loaded(transformers: Any, kind: str, name: str) -> tuple[Any, Any]:
    """Tokenizer and model."""
    try:
        return transformers.AutoTokenizer.from_pretrained(name), getattr(transformers, kind).from_pretrained(name)
    except (OSError, ValueError) as error:
        raise ValueError(f"{name} cannot be loaded: {error}") from error
