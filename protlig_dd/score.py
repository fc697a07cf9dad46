"""Score single proteins: a bound on the negative log-likelihood, perplexity and pseudo-likelihood of each protein.

python -m protlig_dd.score from=runs/demo input=proteins.fasta output=scores.csv
python -m protlig_dd.score from=runs/demo sequence=MKTAYIAKQRQISFVKSHFSRQ
torchrun --nproc-per-node=8 -m protlig_dd.score from=runs/demo input=proteins.fasta.gz output=scores.csv draws=32
"""

import math
from pathlib import Path

from omegaconf import DictConfig

from protlig_dd.config.cli import run_verb
from protlig_dd.config.read import read_config
from protlig_dd.config.verbs import ScoreConfig
from protlig_dd.data.case import Context, lower_case_of
from protlig_dd.data.encode import is_nucleotide, nucleotide_warning
from protlig_dd.evaluation.inputs import Proteins, is_store, read_proteins
from protlig_dd.evaluation.likelihood.given import given_proteins, message_of_crops, resolve_context
from protlig_dd.evaluation.likelihood.scoring import Given
from protlig_dd.evaluation.likelihood.single import check_scored, protein_bounds, pseudo_nlls
from protlig_dd.inference.model import TrainedModel, load_trained
from protlig_dd.inference.profiles import check_masks
from protlig_dd.inference.sequences import encode_whole
from protlig_dd.inference.sharing import Work
from protlig_dd.system.distributed import processes_from_environment
from protlig_dd.system.files import check_free, write_new
from protlig_dd.system.tables import csv_text
from protlig_dd.system.terminal import announce


def score_proteins(cfg: DictConfig) -> None:
    """Load a model's averaged weights, score each protein, and write CSV. The ranks share the work."""
    config = read_config(cfg, ScoreConfig)
    if (config.input is None) == (config.sequence is None):
        raise ValueError("give either input= (FASTA) or sequence= (one protein)")
    if config.output is None and config.sequence is None:
        raise ValueError("output is required with input=: give output=scores.csv")
    output = None if config.output is None else check_free(config.output)
    proteins = read_input(config)
    trained = load_trained(config.from_, device=config.device, precision=config.precision)
    if config.pseudo is True:
        check_masks(trained.score_fn, "pseudo=true")
    context = resolve_context(config.context, trained, proteins, config.input or "sequence=")
    whole, designed = to_score(trained, proteins, "none"), None
    if context != "none":
        designed = to_score(trained, proteins, context)
    columns = score_columns(trained, config, proteins, whole, designed)
    rows = list(zip(*columns.values(), strict=True))
    if trained.processes.first and output is not None:
        write_new(output, csv_text(list(columns), rows))
    if config.sequence is not None:
        cells = (f"{cell:.6f}" if isinstance(cell, float) else str(cell) for cell in rows[0])
        lines = [f"{name:22} {cell}" for name, cell in zip(columns, cells, strict=True)]
        announce("\n".join(lines), trained.processes)
    if output is not None:
        announce(f"{output}: {len(rows)} proteins", trained.processes)


def read_input(config: ScoreConfig) -> Proteins:
    """Return the proteins of `input=`, or the protein of `sequence=`."""
    if config.sequence is None:
        path = Path(str(config.input))
        if is_store(path):
            raise ValueError(
                f"input={path}: this is a store; give FASTA, or use evaluate, which scores a store's splits"
            )
        return read_proteins(path, "all", None, config.seed)
    tokens, lower = encode_whole(config.sequence, "sequence="), lower_case_of(config.sequence)
    if is_nucleotide(tokens[1:-1].tobytes()):
        announce(nucleotide_warning(1, 1, "sequence="), processes_from_environment())
    return Proteins(None, ["sequence"], [tokens], [lower], lower is not None and not lower.all())


def to_score(trained: TrainedModel, proteins: Proteins, context: Context) -> list[Given]:
    """Return the proteins with their context, cropped to the model's max_len. Print how many are cropped.

    Raises:
        ValueError: a protein has no residue to score; the message names the protein.
    """
    given = given_proteins(proteins, context, trained.max_len)
    for id_, protein in zip(proteins.ids, given, strict=True):
        check_scored(protein, f"record {id_}")
    if cropped := sum(len(tokens) - 2 > trained.max_len for tokens in proteins.sequences):
        announce(message_of_crops(cropped, trained.max_len, context), trained.processes)
    return given


def score_columns(
    trained: TrainedModel, config: ScoreConfig, proteins: Proteins, whole: list[Given], designed: list[Given] | None
) -> dict[str, list[object]]:
    """Return the columns of the table; configs/score.yaml explains them. A standard error of NaN is an empty cell.

    Args:
        whole: the proteins without context.
        designed: the proteins with context; None if no letters are context.
    """
    score_fn, processes = trained.score_fn, trained.processes

    def work(description: str) -> Work:
        return Work(config.tokens_per_pack, description, processes)

    bounds = protein_bounds(score_fn, whole, work("NLL bounds"), draws=config.draws, seed=config.seed)
    columns: dict[str, list[object]] = {
        "id": list(proteins.ids),
        "length": [len(tokens) - 2 for tokens in proteins.sequences],
        "scored_residues": bounds.residues.tolist(),
        "bound": bounds.bound.tolist(),
        "bound_se": without_nan(bounds.standard_error.tolist()),
        "perplexity": bounds.perplexity.tolist(),
        "perplexity_se": without_nan(bounds.perplexity_standard_error.tolist()),
    }
    if designed is not None:
        given = work("NLL bounds given the context")
        bounds = protein_bounds(score_fn, designed, given, draws=config.draws, seed=config.seed)
        columns["designed_residues"] = bounds.residues.tolist()
        columns["bound_given_context"] = bounds.bound.tolist()
        columns["bound_given_context_se"] = without_nan(bounds.standard_error.tolist())
    if config.pseudo == "auto" and not trained.graph.masks:
        announce(f"no pseudo-likelihoods: the graph {trained.graph.name} has no mask (pseudo=auto)", processes)
    if trained.graph.masks and config.pseudo is not False:
        pseudo = pseudo_nlls(score_fn, [protein.tokens for protein in whole], work("pseudo-likelihoods"))
        columns |= {"pseudo_nll": pseudo.tolist(), "pseudo_perplexity": pseudo.exp().tolist()}
    return columns


def without_nan(values: list[float]) -> list[object]:
    return ["" if math.isnan(value) else value for value in values]


def main() -> None:
    """The command line."""
    run_verb(score_proteins, "score", ScoreConfig)


if __name__ == "__main__":
    main()
