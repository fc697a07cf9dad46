"""Bound a trained model's negative log-likelihood of held-out proteins, and compare the bound with simple baselines.

python -m protlig_dd.evaluate from=runs/demo input=data/my.h5 split=test output=evaluation
python -m protlig_dd.evaluate from=runs/demo input=held.fasta train=data/my.h5 output=evaluation
python -m protlig_dd.evaluate from=runs/tuned compare=runs/demo input=held.fasta output=before_and_after
"""

from pathlib import Path
from typing import Any

from omegaconf import DictConfig

from protlig_dd.config.cli import run_verb
from protlig_dd.config.read import read_config
from protlig_dd.config.verbs import EvaluateConfig
from protlig_dd.data.mmseqs import find_mmseqs
from protlig_dd.evaluation.inputs import read_proteins
from protlig_dd.evaluation.likelihood.baselines import baselines_of, find_baseline_stores
from protlig_dd.evaluation.likelihood.given import given_proteins, message_of_crops, resolve_context
from protlig_dd.evaluation.likelihood.leaks import find_leaks
from protlig_dd.evaluation.likelihood.scoring import in_training, score, summary
from protlig_dd.evaluation.likelihood.tables import length_csv, letter_csv, report_table, sequence_csv
from protlig_dd.evaluation.likelihood.trained_on import all_training_data
from protlig_dd.inference.model import TrainedModel, load_trained
from protlig_dd.runs.metrics import without_nan
from protlig_dd.system.files import check_free, write_folder
from protlig_dd.system.tables import as_json
from protlig_dd.system.terminal import announce, console


def evaluate(cfg: DictConfig) -> None:
    """Bound the negative log-likelihood of every sequence, and write a folder of tables.

    The sequences are divided among the ranks, and rank 0 writes the folder.
    """
    config = read_config(cfg, EvaluateConfig)
    output = check_free(config.output)
    find_mmseqs(config.near, "near")
    proteins = read_proteins(Path(config.input), config.split, config.max_sequences, config.seed)
    store, ids, sequences = proteins[:3]
    trained = load_trained(config.from_, device=config.device, precision=config.precision)
    compared = None
    if config.compare is not None:
        compared = load_trained(config.compare, device=config.device, precision=config.precision)
    max_len = min(model.max_len for model in (trained, compared) if model is not None)
    context = resolve_context(config.context, trained, proteins, config.input)
    if compared is not None and compared.context != trained.context:
        announce(
            f"warning: the models were trained with data.context={trained.context} and {compared.context}; both are "
            f"scored with context={context}",
            trained.processes,
        )
    given = given_proteins(proteins, context, max_len)
    baseline_group = find_baseline_stores(config.train, store, trained, context)
    baselines = None if baseline_group is None else baselines_of(baseline_group)
    n_cropped = sum(len(tokens) - 2 > max_len for tokens in sequences)
    if n_cropped:
        models = "this model was" if compared is None else "both models were"
        announce(message_of_crops(n_cropped, max_len, context, models), trained.processes)
    scored = score(trained, given, config, baselines)
    if compared is not None:
        other_scored = score(compared, given, config, None, bound_only=True)
        for protein, other_protein in zip(scored, other_scored, strict=True):
            protein.nats["compared"] = other_protein.nats["bound"]
    if not trained.processes.first:
        return  # rank 0 alone searches and writes; the other ranks need not wait for rank 0
    sources = all_training_data(config.train, store, trained)
    if compared is not None:
        sources += all_training_data(config.train, store, compared, label="the compared model")
    leaks = find_leaks(sequences, sources, config.near)
    console.print("\n".join(leaks.lines()))
    report = {
        **description_of(trained),
        "input": config.input,
        "split": config.split if store else None,
        "context": context,
        "sequences": len(scored),
        "cut_to_max_len": n_cropped,
        "max_len": max_len,
        "residues": sum(protein.residues for protein in scored),
        "draws": config.draws,
        "seed": config.seed,
        "precision": trained.precision,
        "baseline_store": None if baseline_group is None else baseline_group.name,
        "baseline_context": None if baseline_group is None else baseline_group.context,
        "baseline_sequences": None if baselines is None else baselines.sequences,
        "compared_with": None if compared is None else description_of(compared),
        **summary(scored),
        "in_training": in_training(leaks, scored),
    }
    table = report_table(report)
    files = {
        "report.json": as_json(without_nan(report)),
        "report.md": table,
        "per_sequence.csv": sequence_csv(ids, scored, leaks.cells(len(ids))),
        "by_length.csv": length_csv(scored),
        "by_amino_acid.csv": letter_csv(scored),
    }
    write_folder(output, files)
    console.print(table)
    console.print(f"{output}: {', '.join(files)}")


def description_of(trained: TrainedModel) -> dict[str, Any]:
    """Return the report's fields about a model: run, step, checkpoint, estimator of its bound, and `data.context`."""
    return {
        "run": trained.run,
        "step": trained.step,
        "checkpoint": str(trained.saved.path),
        "estimator": trained.score_fn.estimator,
        "trained_context": trained.context,
    }


def main() -> None:
    """The command line."""
    run_verb(evaluate, "evaluate", EvaluateConfig)


if __name__ == "__main__":
    main()
