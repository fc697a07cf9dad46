"""Measure a trained model on held-out proteins: its bound on the negative log-likelihood, beside simple baselines.

python -m protlig_dd.evaluate from=runs/demo input=data/my.h5 split=test output=evaluation
python -m protlig_dd.evaluate from=runs/demo input=held.fasta train=data/my.h5 output=evaluation
python -m protlig_dd.evaluate from=runs/tuned compare=runs/demo input=held.fasta output=before_and_after
"""

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import torch
from omegaconf import DictConfig

from protlig_dd.batch import PackedBatch, split_lengths
from protlig_dd.data.homology import find_mmseqs
from protlig_dd.data.store import SequenceStore, StoreGroup
from protlig_dd.diffusion.graph import Absorbing
from protlig_dd.diffusion.likelihood import ProteinDraws, masked_cross_entropy, nll_bound, per_residue, pick_estimator
from protlig_dd.evaluation.baselines import Baselines, fit_baselines, training_sequences
from protlig_dd.evaluation.inputs import csv_text, read_sequences
from protlig_dd.evaluation.leaks import FEWEST, Leaks, find_leaks
from protlig_dd.evaluation.trained_on import NO_STORE, Source, own_data, sources_before
from protlig_dd.runtime.cli import run_verb
from protlig_dd.runtime.config import EvaluateConfig, read_config
from protlig_dd.runtime.distributed import gather_objects
from protlig_dd.runtime.files import write_folder
from protlig_dd.runtime.metrics import ProgressBar, announce, console, with_nan, without_nan
from protlig_dd.runtime.random import places_of_set, protein_draws, protein_keys
from protlig_dd.runtime.trained import Trained, check_free, check_least, load_trained, run_folder
from protlig_dd.tokenizer import AMINO_ACIDS, N_STATES

LENGTH_BINS = (0, 50, 100, 200, 300, 400, 500, 750, 1000)  # residues; a bin ends with the number that the next follows
MASKED_SHARE = 0.15
COLUMNS = ("bound", "compared", "unigram", "bigram", "oadm", "evodiff", "masked")


@dataclass
class Scored:
    """Nats of one protein, and those of each of its amino acids."""

    residues: int
    nats: dict[str, float]
    """By column; those that were measured."""
    bound_se: float
    masked: dict[str, float | int]
    """Tokens that were masked, for the columns that are means over those and not over residues: in all draws, or a draw
    on average."""
    counts: np.ndarray
    """(20,) how often each amino acid is there."""
    by_letter: dict[str, np.ndarray]
    """(20,) nats of each amino acid, for bound, unigram and bigram."""


def evaluate(cfg: DictConfig) -> None:
    """Bound every sequence once, on all ranks, and write the folder of figures."""
    config = read_config(cfg, EvaluateConfig)
    output = check_free(config.output)
    check_least((("draws", config.draws, 1), ("seed", config.seed, 0), ("max_sequences", config.max_sequences or 1, 1),
                 ("tokens_per_pack", config.tokens_per_pack, 1)))  # fmt: skip
    find_mmseqs(config.near, "near")
    store, ids, sequences = read_sequences(Path(config.input), config.split, config.max_sequences, config.seed)
    trained = load_trained(config.from_, device=config.device, precision=config.precision)
    other = None
    if config.compare is not None:
        other = load_trained(config.compare, device=config.device, precision=config.precision)
    max_len = min(model.max_len for model in (trained, other) if model is not None)
    told_by = find_baselines(config.train, store, trained)
    baselines = None if told_by is None else fit_baselines(training_sequences(told_by.stores))
    whole = sequences
    cut = sum(len(tokens) - 2 > max_len for tokens in sequences)
    sequences = [cropped(tokens, max_len) for tokens in sequences]
    if cut:
        these = "this model was" if other is None else "these models were both"
        told = f"{cut} proteins are longer than the {max_len} residues {these} trained on"
        announce(f"{told}: their first {max_len} are scored", trained.processes)
    scored = score(trained, sequences, config, baselines)
    if other is not None:
        for one, same in zip(scored, score(other, sequences, config, None, alone=True), strict=True):
            one.nats["compared"] = same.nats["bound"]
    if not trained.processes.first:
        return
    sources = all_sources(config.train, store, trained)  # the other ranks need not wait for a search
    if other is not None:
        sources += all_sources(config.train, store, other, called="the model compared with")
    leaks = find_leaks(whole, sources, config.near)
    console.print("\n".join(leaks.lines()))
    report = {
        **description_of(trained),
        "input": config.input,
        "split": config.split if store else None,
        "sequences": len(scored),
        "cut_to_max_len": cut,
        "max_len": max_len,
        "residues": sum(one.residues for one in scored),
        "draws": config.draws,
        "seed": config.seed,
        "precision": trained.precision,
        "baseline_store": None if told_by is None else told_by.name,
        "baseline_sequences": None if baselines is None else baselines.sequences,
        "compared_with": None if other is None else description_of(other),
        **summary(scored),
        "in_training": in_training(leaks, scored),
    }
    table = report_table(report)
    files = {
        "report.json": json.dumps(without_nan(report), indent=1) + "\n",
        "report.md": table,
        "per_sequence.csv": sequence_csv(ids, scored, leaks.cells(len(ids))),
        "by_length.csv": length_csv(scored),
        "by_amino_acid.csv": letter_csv(scored),
    }
    write_folder(output, files)
    console.print(table)
    console.print(f"{output}: {', '.join(files)}")


def estimator_of(trained: Trained) -> str:
    """The estimator of a model's own bound."""
    return pick_estimator(trained.graph, trained.score_fn.parametrisation, trained.score_fn.time_conditioning)


def description_of(trained: Trained) -> dict[str, Any]:
    """Which model, and how its bound is estimated."""
    return {
        "run": trained.run,
        "step": trained.step,
        "checkpoint": str(trained.checkpoint),
        "estimator": estimator_of(trained),
    }


def cropped(tokens: np.ndarray, max_len: int) -> np.ndarray:
    """The first max_len residues; a crop lacks <eos>, as in training."""
    return tokens if len(tokens) - 2 <= max_len else tokens[: max_len + 1]


def find_baselines(wanted: str | None, store: SequenceStore | None, trained: Trained) -> StoreGroup | None:
    """Whose training split unigram and bigram models are made of: `train=`, else what the model was trained on."""
    given = [] if store is None else [store]
    found = (
        StoreGroup([SequenceStore(wanted)]) if wanted else own_data(given, trained.checkpoint, trained.data_fingerprint)
    )
    if found is None:
        announce("the model's training set was not found: give train=store.h5 for unigram and bigram models",
                 trained.processes)  # fmt: skip
        return None
    announce(f"unigram and bigram models are those of the training split of {found.name}", trained.processes)
    return found


def all_sources(
    wanted: str | None, store: SequenceStore | None, trained: Trained, called: str = "this model"
) -> list[Source]:
    """What trained the model and those that it began from; of a training set that is not found, `train=` tells.

    Args:
        called: what messages call the model; `train=` may be another one's where it is not "this model".
    """
    named = [] if wanted is None else [SequenceStore(wanted)]
    given = named + ([] if store is None else [store])
    own = own_data(given, trained.checkpoint, trained.data_fingerprint)
    if own is None and named and called == "this model":
        first = Source(f"{called}, as train= says", StoreGroup(named))
    else:
        hint = " (train=store.h5 names it)" if called == "this model" else ""
        first = Source(called, own, "" if own else NO_STORE + hint)
    return [first, *sources_before(trained.config, run_folder(trained.checkpoint), given)]


def score(
    trained: Trained,
    sequences: Sequence[np.ndarray],
    config: EvaluateConfig,
    baselines: Baselines | None,
    *,
    alone: bool = False,
) -> list[Scored]:
    """Every sequence once, packs shared out over the ranks; what it draws follows from the seed and the set of
    sequences, not from their packs."""
    keys = protein_keys(sequences)
    places = places_of_set(keys, config.draws, config.seed)
    packs = split_lengths([len(tokens) - 2 for tokens in sequences], config.tokens_per_pack)
    firsts = np.cumsum([0, *map(len, packs)]).tolist()
    processes, mine = trained.processes, range(trained.processes.rank, len(packs), trained.processes.world_size)
    found: dict[int, Scored] = {}
    with ProgressBar("evaluating", len(mine), shown=processes.first) as bar:
        for pack in mine:
            indices = range(firsts[pack], firsts[pack + 1])
            some = [sequences[i] for i in indices]
            drawn = protein_draws(keys[indices], places[:, indices], config.seed)
            found.update(zip(indices, score_pack(trained, some, drawn, config, baselines, alone=alone), strict=True))
            bar.advance()
    found = {i: one for part in gather_objects(found) for i, one in part.items()}
    return [found[i] for i in range(len(sequences))]


def score_pack(
    trained: Trained,
    sequences: Sequence[np.ndarray],
    drawn: ProteinDraws,
    config: EvaluateConfig,
    baselines: Baselines | None,
    *,
    alone: bool,
) -> list[Scored]:
    """Those of one pack; of the bound alone, or of what else is measured too."""
    score_fn, graph, noise = trained.score_fn, trained.graph, trained.noise
    batch = PackedBatch.pack([torch.from_numpy(tokens.astype(np.int64)) for tokens in sequences]).to(trained.device)
    estimator = estimator_of(trained)
    bound = nll_bound(score_fn, batch, graph, noise, generator=drawn, draws=config.draws, estimator=estimator)
    per_token, whole, masked = {"bound": bound.token_nats}, {}, {}
    if isinstance(graph, Absorbing) and not alone:
        oadm = bound
        if estimator != "exact_count":
            oadm = nll_bound(score_fn, batch, graph, noise, generator=drawn, draws=config.draws,
                             estimator="exact_count")  # fmt: skip
        per_token["oadm"] = oadm.token_nats
        whole["evodiff"], masked["evodiff"] = oadm.pooled_nats, oadm.pooled
        if config.masked:
            per_token["masked"], masked["masked"] = masked_cross_entropy(
                score_fn, batch, graph, share=MASKED_SHARE, draws=config.draws, generator=drawn.generators
            )
    parts = {name: [part.numpy() for part in batch.unpack(nats)] for name, nats in per_token.items()}
    scored = []
    for i, tokens in enumerate(sequences):
        nats = {name: part[i] for name, part in parts.items()}
        if baselines is not None:
            nats["unigram"], nats["bigram"] = baselines.nats(tokens)
        inside = tokens < N_STATES
        letters = tokens[inside]
        scored.append(
            Scored(
                residues=int(inside.sum()),
                nats={name: float(values.sum()) for name, values in nats.items()}
                | {name: float(values[i]) for name, values in whole.items()},
                bound_se=float(bound.standard_error[i]),
                masked={name: counts[i].item() for name, counts in masked.items()},
                counts=np.bincount(letters, minlength=N_STATES),
                by_letter={
                    name: np.bincount(letters, nats[name][inside], minlength=N_STATES)
                    for name in ("bound", "unigram", "bigram")
                    if name in nats
                },
            )
        )
    return scored


def column(scored: Sequence[Scored], name: str) -> np.ndarray:
    return np.array([one.nats[name] for one in scored])


def summary(scored: Sequence[Scored]) -> dict[str, Any]:
    """Nats a residue (or a masked token: see Scored) with standard errors over proteins, and paired differences to the
    unigram model and to the model compared with.
    """
    residues = np.array([one.residues for one in scored])
    found: dict[str, Any] = {}
    for name in COLUMNS:
        if name not in scored[0].nats:
            continue
        count = np.array([one.masked.get(name, one.residues) for one in scored])
        found[name], found[f"{name}_se"] = per_residue(column(scored, name), count)
        if len(scored) == 1 and name == "bound":  # there is no spread between proteins; the draws' own is known
            found["bound_se"] = scored[0].bound_se / scored[0].residues
        found[f"{name}_perplexity"] = float(np.exp(found[name]))
    for name, other in (("bound", "unigram"), ("compared", "unigram"), ("bigram", "unigram"), ("bound", "compared")):
        if name in found and other in found:
            difference = column(scored, name) - column(scored, other)
            found[f"{name}_to_{other}"], found[f"{name}_to_{other}_se"] = per_residue(difference, residues)
    return found


def in_training(leaks: Leaks, scored: Sequence[Scored]) -> dict[str, Any]:
    """What is known of proteins that trained the model and, where some have, the figures of the others."""
    others = [one for one, leaked in zip(scored, leaks.leaked, strict=True) if not leaked] if leaks.leaked.any() else []
    enough = len(others) >= FEWEST and sum(one.residues for one in others) > 0
    figures = {"sequences": len(others), **without_nan(summary(others))} if enough else None
    return {**leaks.report(), "others": figures}


NAMES = {
    "bound": "model, NLL bound",
    "compared": "model compared with, NLL bound",
    "unigram": "unigram model, NLL",
    "bigram": "bigram model, NLL",
    "oadm": "order-agnostic (OADM) NLL",
    "evodiff": "EvoDiff's test convention, all masked pooled",
    "masked": f"cross-entropy of {MASKED_SHARE:.0%} masked",
}


def report_table(report: dict[str, Any]) -> str:
    """Markdown of the figures of the whole set."""
    lines = [
        f"{report['sequences']:,} proteins, {report['residues']:,} residues; {report['run']}, step {report['step']}; "
        f"{report['estimator']} estimator, {report['draws']} draws",
        "",
        "| | nats/residue | perplexity | to the unigram model |",
        "| --- | --- | --- | --- |",
    ]
    for name in COLUMNS:
        if name not in report:
            continue
        nats, error = report[name], report[f"{name}_se"]
        perplexity = report[f"{name}_perplexity"]
        difference = ""
        if f"{name}_to_unigram" in report:
            difference = told(report[f"{name}_to_unigram"], report[f"{name}_to_unigram_se"], "+.4f")
        figures = told(nats, error, ".4f"), told(perplexity, perplexity * error, ".3f")
        lines.append(f"| {NAMES[name]} | {' | '.join(figures)} | {difference} |")
    if "unigram" in report:
        of_what = f"{report['baseline_sequences']:,} training proteins of {report['baseline_store']}"
        lines += ["", f"The unigram and bigram models are those of {of_what}."]
    if "compared" in report:
        other = report["compared_with"]
        difference = told(report["bound_to_compared"], report["bound_to_compared_se"], "+.4f")
        models = f"{report['run']}, step {report['step']}, minus {other['run']}, step {other['step']}"
        lines += ["", f"{models} ({other['checkpoint']}), paired: {difference} nats/residue; below zero the first is "
                  "better."]  # fmt: skip
        if report["estimator"] != other["estimator"]:
            lines += [f"Their estimators differ: {report['estimator']}, and {other['estimator']} of the second."]
    if (leaks := report["in_training"])["copies"] or leaks["near"]:
        near = f" and {leaks['near']:,} near ones" if leaks["near"] else ""
        line = f"{leaks['copies']:,} are exact copies{near} of proteins that trained a model named above"
        others = leaks["others"]
        if others is None:
            lines += ["", f"{line}, and no others, or too few, are left: these are no held-out figures."]
        else:
            others = with_nan(others)
            parts = [f"an NLL bound of {told(others['bound'], others['bound_se'], '.4f')}"]
            for key, to in (
                ("bound_to_unigram", "the unigram model"),
                ("bound_to_compared", "the model compared with"),
            ):
                if key in others:
                    parts.append(f"{told(others[key], others[f'{key}_se'], '+.4f')} to {to}")
            lines += ["", f"{line}; the {others['sequences']:,} others have {', '.join(parts)} (nats/residue)."]
    if report["sequences"] == 1:
        lines += ["", "Of a single protein: the standard error is that of the bound's own draws; others are not known."]
    return "\n".join(lines) + "\n"


def told(value: float, error: float, digits: str) -> str:
    """A figure with its standard error, where that is known."""
    return f"{value:{digits}}" + ("" if math.isnan(error) else f" ± {error:{digits.lstrip('+')}}")


def sequence_csv(ids: Sequence[str], scored: Sequence[Scored], trained_by: Sequence[str]) -> str:
    """A row for each protein: whole nats, so that two models can be compared protein by protein.

    Args:
        trained_by: of each, whether it has trained the model.
    """
    names = [name for name in COLUMNS if name in scored[0].nats]
    masked = list(scored[0].masked)
    header = ["id", "residues", *(f"{name}_nats" for name in names), "bound_nats_se"]
    return csv_text(
        [*header, *(f"{name}_tokens" for name in masked), "in_training"],
        [
            [id_, one.residues, *(one.nats[name] for name in names), one.bound_se, *one.masked.values(), cell]
            for id_, one, cell in zip(ids, scored, trained_by, strict=True)
        ],
    )


def length_csv(scored: Sequence[Scored]) -> str:
    """The figures of proteins of similar length; `to` is empty for the longest."""
    names = [name for name in ("bound", "unigram", "bigram") if name in scored[0].nats]
    rows = []
    for low, high in pairwise([*LENGTH_BINS, math.inf]):
        some = [one for one in scored if low < one.residues <= high]
        if some:
            residues = np.array([one.residues for one in some])
            figures = [value for name in names for value in per_residue(column(some, name), residues)]
            rows.append([low + 1, "" if high == math.inf else high, len(some), residues.sum(), *figures])
    return csv_text(["from", "to", "sequences", "residues", *with_errors(names)], rows)


def letter_csv(scored: Sequence[Scored]) -> str:
    """What each amino acid costs, in nats each time that it occurs, with standard errors over proteins."""
    names, rows = list(scored[0].by_letter), []
    for i, letter in enumerate(AMINO_ACIDS):
        having = [one for one in scored if one.counts[i]]  # of a letter that one protein has, no error is known
        counts = np.array([one.counts[i] for one in having])
        if having:
            totals = {name: np.array([one.by_letter[name][i] for one in having]) for name in names}
            rows.append([letter, counts.sum(), *(v for name in names for v in per_residue(totals[name], counts))])
    return csv_text(["amino_acid", "residues", *with_errors(names)], rows)


def with_errors(names: Sequence[str]) -> list[str]:
    return [column for name in names for column in (name, f"{name}_se")]


def main() -> None:
    """The command line."""
    run_verb(evaluate, "evaluate", EvaluateConfig)


if __name__ == "__main__":
    main()
