"""Check that every kind of network can be used on real proteins of several families."""

import argparse
from typing import Any

import torch

from protlig_dd.batch import PackedBatch
from protlig_dd.data.fasta import FastaRecord, read_fasta
from protlig_dd.data.prepare.bundled import SAMPLE_FOLDER
from protlig_dd.diffusion.samplers.base import SamplerOptions
from protlig_dd.diffusion.score import ScoreFn
from protlig_dd.inference.model import load_trained
from protlig_dd.inference.sequences import FREE
from protlig_dd.inference.steps import SamplingSteps
from protlig_dd.tokenizer import AMINO_ACIDS, MASK, ProteinTokenizer
from scripts.architecture.runs import REPORT, Job, job, measure

FAMILIES, MEMBERS = 10, 2
LONGEST = 512  # residues, as in the demo
FEW = 10  # default training steps of a network that `scripts.architecture bounds` has not trained
CHECKS = ("forward", "sampling", "infilling")


def family(record: FastaRecord) -> str | None:
    """Return the protein's name, such as EX7L in sp|A1AX20|EX7L_RUTMC; None if the record is not from Swiss-Prot (sp).

    Swiss-Prot gives orthologues the same name. Unreviewed entries (tr) have only their accession number as a name.
    """
    database, _, entry = record.id.partition("|")
    return entry.rpartition("|")[2].partition("_")[0] if database == "sp" else None


def chosen_proteins() -> list[FastaRecord]:
    """Return two held-out proteins of each of ten families of the bundled sample.

    A family qualifies if the test and validation splits together contain at least two of its proteins with at most
    LONGEST residues. The result has the first two proteins of each of the first ten families, in the files' order.
    """
    members: dict[str, list[FastaRecord]] = {}
    for split in ("test", "validation"):
        for record in read_fasta(SAMPLE_FOLDER / f"{split}.fasta.gz"):
            name = family(record)
            if name is not None and len(record.sequence) <= LONGEST:
                members.setdefault(name, []).append(record)
    complete = [records[:MEMBERS] for records in members.values() if len(records) >= MEMBERS]
    return [record for records in complete[:FAMILIES] for record in records]


def robustness(arguments: argparse.Namespace) -> bool:
    """Count for each arm the proteins on which the forward pass, sampling and infilling succeed.

    If the arm's run of `bounds` with seed 0 and the same --steps is finished, its network is used. Otherwise a network
    is trained for --steps steps, by default FEW.
    """
    proteins = chosen_proteins()
    jobs = []
    for arm in arguments.only:
        of_bounds = job(arguments, arm, 0, arguments.steps)
        finished = (of_bounds.folder(arguments.folder) / "report.json").exists()
        jobs.append(of_bounds if finished else job(arguments, arm, 0, arguments.steps or FEW, REPORT))

    def finish(job: Job, report: dict[str, Any]) -> dict[str, Any]:
        trained = load_trained(str(job.folder(arguments.folder)), device="auto", precision="auto")
        counts, problems = count_successes(trained.score_fn, proteins, arguments.sampling_steps)
        names = sorted({str(family(protein)) for protein in proteins})
        row = {"step": report["step"], "proteins": len(proteins), "families": names, "counts": counts}
        return row | ({"error": problems[0]} if problems else {})

    return measure(jobs, arguments, finish)


def count_successes(score_fn: ScoreFn, proteins: list[FastaRecord], steps: int) -> tuple[dict[str, int], list[str]]:
    """Return the number of proteins on which each of CHECKS succeeds, and a message for each failed check."""
    counts, problems = dict.fromkeys(CHECKS, 0), []
    for protein in proteins:
        sequence = protein.sequence.upper()
        third = len(sequence) // 3
        template = sequence[:third] + FREE * (len(sequence) - 2 * third) + sequence[len(sequence) - third :]
        for check in CHECKS:
            try:
                if check == "forward":
                    forward(score_fn, sequence)
                else:
                    sample(score_fn, FREE * len(sequence) if check == "sampling" else template, steps)
                counts[check] += 1
            except (ValueError, RuntimeError) as error:
                problems.append(f"{check} of {protein.id}: {error}")
    return counts, problems


@torch.no_grad()
def forward(score_fn: ScoreFn, sequence: str) -> None:
    """Evaluate the network on a protein: without masks, with every other residue masked, and with all residues masked.

    Raises:
        ValueError: an output is not finite.
    """
    whole = torch.from_numpy(ProteinTokenizer().encode(sequence)).long()
    half, empty = whole.clone(), whole.clone()
    half[1:-1:2] = MASK
    empty[1:-1] = MASK
    batch = PackedBatch.pack([whole, half, empty]).to(score_fn.device)
    check_finite(score_fn.logits(batch, torch.ones(3, device=score_fn.device)))


def sample(score_fn: ScoreFn, template: str, steps: int) -> None:
    """Sample the free positions of a template.

    Raises:
        ValueError: an output of the network is not finite, or the template does not allow a sampled residue.
    """
    sampling = SamplingSteps(score_fn, [template], SamplerOptions(steps), seed=0, max_len=LONGEST)
    for step in sampling:
        check_finite(step.step.logits)
    (found,) = sampling.sequences
    for i, (letter, fixed) in enumerate(zip(found, template, strict=True), 1):
        if letter not in (AMINO_ACIDS if fixed == FREE else fixed):
            raise ValueError(f"residue {i} is {letter}; the template has {fixed}")


def check_finite(logits: torch.Tensor) -> None:
    if wrong := int((~torch.isfinite(logits)).sum()):
        raise ValueError(f"{wrong} of the network's {logits.numel()} outputs are not finite")
