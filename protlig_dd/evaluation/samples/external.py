"""Judges that need optional packages: profile HMMs (pyhmmer), ESM-2 and ESMFold (transformers)."""

import importlib
import math
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from protlig_dd.config.verbs import JudgeConfig
from protlig_dd.evaluation.samples.statistics import Figure, mean_figure, perplexity, share
from protlig_dd.system.device import resolve_device

E_VALUE = 1e-3  # threshold for HMMs without gathering cutoffs; Pfam's HMMs have cutoffs
MASKED_AT_ONCE = 32  # copies of a protein in one forward pass, each with a different residue masked


def import_optional(package: str, extra: str, wanted: str) -> Any:
    """Import an optional package.

    Args:
        extra: extra of protlig_dd that installs the package.
        wanted: setting that needs the package, for the error message.

    Raises:
        ValueError: the package is not installed.
    """
    try:
        return importlib.import_module(package)
    except ImportError as error:
        raise ValueError(f"{wanted} needs {package}: pip install 'protlig_dd[{extra}]'") from error


Judge = Callable[[Sequence[str], Callable[[], None]], list[float]]
"""(proteins, callback to call once per protein, for progress) -> one value for each protein."""


def pfam_hits(hmms: Path) -> Judge:
    """Return a judge that gives 1 to a protein with a significant hit to any profile HMM of the file, else 0.

    Args:
        hmms: file of profile HMMs in HMMER's format, such as Pfam-A.hmm.

    Raises:
        ValueError: pyhmmer is not installed, or the file contains no HMMs.
    """
    pyhmmer = import_optional("pyhmmer", "hmm", f"hmm={hmms}")
    if not hmms.is_file():
        raise ValueError(f"hmm={hmms}: no such file")
    alphabet = pyhmmer.easel.Alphabet.amino()
    try:
        with pyhmmer.plan7.HMMFile(hmms) as file:
            profiles = list(file)
    except (ValueError, EOFError) as error:
        raise ValueError(f"{hmms}: not a file of HMMs: {error}") from error
    if not profiles:
        raise ValueError(f"{hmms}: contains no HMMs")
    with_cutoffs = [hmm for hmm in profiles if hmm.cutoffs.gathering_available()]
    without_cutoffs = [hmm for hmm in profiles if not hmm.cutoffs.gathering_available()]

    def judge(sequences: Sequence[str], advance: Callable[[], None]) -> list[float]:
        block = pyhmmer.easel.TextSequenceBlock(
            [pyhmmer.easel.TextSequence(name=str(i), sequence=text) for i, text in enumerate(sequences)]
        ).digitize(alphabet)
        has_hit = [0.0] * len(sequences)
        for queries, options in (
            (with_cutoffs, {"bit_cutoffs": "gathering"}),
            (without_cutoffs, {"E": E_VALUE, "incE": E_VALUE}),
        ):
            for hits in pyhmmer.hmmer.hmmsearch(queries, block, **options):
                for hit in hits.included:
                    has_hit[int(hit.name)] = 1.0
        for _ in sequences:
            advance()
        return has_hit

    return judge


def pseudo_perplexity(logits_of: Callable[[Tensor], Tensor], tokens: Tensor, mask: int, places: range) -> float:
    """Return exp of the mean cross-entropy of the residues, masked one at a time (Salazar et al., arXiv 1910.14659).

    Args:
        logits_of: (copies, length) tokens -> (copies, length, vocabulary) logits.
        tokens: (length,) ids of one protein.
        mask: id of the mask token.
        places: positions in `tokens` that are residues.
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
    """Return a judge that computes the pseudo-perplexity of a protein with ESM-2 (doi 10.1126/science.ade2574).

    Args:
        name: the model, such as facebook/esm2_t12_35M_UR50D.

    Raises:
        ValueError: transformers is not installed, or the model cannot be loaded.
    """
    on_device, tokenizer, model = load_transformers("EsmForMaskedLM", name, device, wanted=f"esm2={name}")

    @torch.no_grad()
    def judge(sequences: Sequence[str], advance: Callable[[], None]) -> list[float]:
        values = []
        for sequence in sequences:
            tokens = tokenizer(sequence, return_tensors="pt")["input_ids"][0].to(on_device)  # <cls> residues <eos>
            residues = range(1, len(tokens) - 1)
            values.append(pseudo_perplexity(lambda ids: model(ids).logits, tokens, tokenizer.mask_token_id, residues))
            advance()
        return values

    return judge


def esmfold_plddts(name: str, device: str) -> Judge:
    """Return a judge that computes the pLDDT (0 to 100) of a protein with ESMFold (doi 10.1126/science.ade2574).

    The pLDDT is the mean over the atoms of the protein.

    Args:
        name: the model, such as facebook/esmfold_v1.

    Raises:
        ValueError: transformers is not installed, or the model cannot be loaded.
    """
    on_device, tokenizer, model = load_transformers("EsmForProteinFolding", name, device, wanted=f"esmfold={name}")

    @torch.no_grad()
    def judge(sequences: Sequence[str], advance: Callable[[], None]) -> list[float]:
        values = []
        for sequence in sequences:
            tokens = tokenizer(sequence, return_tensors="pt", add_special_tokens=False)["input_ids"]
            folded = model(tokens.to(on_device))
            exists = folded["atom37_atom_exists"]
            values.append(float(100 * (folded["plddt"] * exists).sum() / exists.sum()))
            advance()
        return values

    return judge


def load_transformers(kind: str, name: str, device: str, wanted: str) -> tuple[torch.device, Any, Any]:
    """Load a model of the class `kind` of transformers; return the device, the tokenizer and the model."""
    transformers = import_optional("transformers", "esm", wanted)
    on_device = resolve_device(device)
    try:
        tokenizer = transformers.AutoTokenizer.from_pretrained(name)
        return on_device, tokenizer, getattr(transformers, kind).from_pretrained(name).eval().to(on_device)
    except (OSError, ValueError) as error:
        raise ValueError(f"{name} cannot be loaded: {error}") from error


Summary = Callable[[Sequence[float], Sequence[str]], Figure]
"""(value of a judge for each protein of a set, the proteins) -> Figure of the set."""


def outside_judges(config: JudgeConfig) -> Iterator[tuple[str, tuple[Judge, Summary]]]:
    """Load the judges that the config requests. Yield (row name, (judge, summary)) for each judge."""
    if config.hmm is not None:
        yield "with a hit to the HMMs", (pfam_hits(Path(config.hmm)), lambda values, _: share(values))
    if config.esm2 is not None:
        esm2 = esm2_pseudo_perplexities(config.esm2, config.device)
        yield f"pseudo-perplexity, {config.esm2}", (esm2, lambda values, texts: perplexity(values, [*map(len, texts)]))
    if config.esmfold is not None:
        yield f"pLDDT, {config.esmfold}", (esmfold_plddts(config.esmfold, config.device), lambda v, _: mean_figure(v))
