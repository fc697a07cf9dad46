"""Redesign parts of proteins, or design new proteins around motifs of given proteins.

python -m protlig_dd.infill from=runs/demo input=partial.fasta output=designs.fasta n=10     # `_` marks free positions
python -m protlig_dd.infill from=runs/demo input=wt.fasta output=designs.fasta free=[12-40,77]
python -m protlig_dd.infill from=runs/demo input=wt.fasta output=designs.fasta fixed=[45-60]
python -m protlig_dd.infill from=runs/demo input=marked.fasta output=designs.fasta context=lower  # upper case is free
python -m protlig_dd.infill from=runs/demo input=wt.fasta output=designs.fasta contig=10-40/A45-60/5-20/A80-92/10
python -m protlig_dd.infill from=runs/demo input=two.fasta output=designs.fasta contig=A1-30/10-20/B5-40
"""

import itertools
from pathlib import Path

import numpy as np
from omegaconf import DictConfig

from protlig_dd.config.cli import run_verb
from protlig_dd.config.read import read_config
from protlig_dd.config.verbs import InfillConfig
from protlig_dd.data.encode import is_nucleotide, nucleotide_warning
from protlig_dd.diffusion.sampling import check_sampler
from protlig_dd.evaluation.samples.redesigns import (
    FreeNLL,
    Redesign,
    best_of,
    designs_csv,
    free_draws,
    free_nll,
    inputs_of,
    mutations,
    note_of,
)
from protlig_dd.inference.generate import describe_designs, options_of, sample_designs
from protlig_dd.inference.layouts import (
    check_number_of_designs,
    designs_of_contig,
    designs_of_positions,
    map_csv,
    read_records,
    warn_about_layout,
)
from protlig_dd.inference.model import load_trained
from protlig_dd.inference.sharing import Work
from protlig_dd.inference.steering import read_log_bias
from protlig_dd.system.files import check_free, write_new
from protlig_dd.system.terminal import announce
from protlig_dd.tokenizer import MASK


def infill(cfg: DictConfig) -> None:
    """Sample the free residues of each design and keep the other residues fixed; write FASTA and two tables."""
    config = read_config(cfg, InfillConfig)
    output = check_free(config.output)
    table = check_free(config.map or str(output.with_suffix(".map.csv")))
    scores = check_free(str(output.with_suffix(".csv")))
    for path, other_path in itertools.combinations((output, table, scores), 2):
        if path.resolve() == other_path.resolve():
            raise ValueError(f"map={config.map}, output={config.output}: {path} would be written twice")
    check_number_of_designs(config.n)
    if config.best is not None and config.best > config.n:
        raise ValueError(f"best={config.best} must be at most n={config.n}")
    if sum(value is not None for value in (config.fixed, config.free, config.context, config.contig)) > 1:
        raise ValueError("give only one of fixed=, free=, context= and contig=")
    if config.lengths is not None and config.contig is None:
        raise ValueError(f"lengths={config.lengths} needs contig=; without it a design is as long as its input")
    records = read_records(Path(config.input))
    trained = load_trained(config.from_, device=config.device, precision=config.precision)
    if nucleotides := sum(is_nucleotide(ids.astype(np.uint8).tobytes()) for _, ids in records):
        announce(nucleotide_warning(nucleotides, len(records), config.input), trained.processes)
    check_sampler(trained.graph, options_of(config))
    ranked = trained.graph.masks and config.free_draws > 0
    if config.best is not None and not ranked:
        needed = "free_draws above 0" if not config.free_draws else "a model with the absorbing graph"
        raise ValueError(f"best={config.best} ranks by nll_free, which needs {needed}")

    designs = designs_of_contig(config, records) if config.contig else designs_of_positions(config, records)
    for design in designs:
        trained.check_length(len(design.template), f"{records[design.protein][0].name}: the design")
    warn_about_layout(config, trained, records, designs)
    lengths = [len(design.template) for design in designs]
    samples = sample_designs(
        trained,
        config,
        lengths=lengths,
        numbers=[design.number for design in designs],
        templates=[design.template for design in designs],
        log_bias=read_log_bias(config.log_bias, lengths),
    )
    for design, sample in zip(designs, samples, strict=True):
        changed = np.flatnonzero((design.template != MASK) & (design.template != sample))
        if len(changed):
            raise AssertionError(f"{design.name}: fixed residue {changed[0] + 1} was changed")

    inputs = [] if config.contig else inputs_of(records, designs)
    redesigns = [Redesign(d.name, ids, d.template == MASK, d.protein) for d, ids in zip(designs, samples, strict=True)]
    candidates = redesigns + inputs
    nlls: list[FreeNLL | None] = [None] * len(candidates)
    if ranked:
        work = Work(config.tokens_per_pack, "NLL of free residues", trained.processes)
        draws = free_draws(trained.score_fn, candidates, work, draws=config.free_draws, seed=config.seed)
        input_index = {protein_input.protein: len(redesigns) + i for i, protein_input in enumerate(inputs)}
        nlls = list(free_nll(draws, candidates, [input_index.get(candidate.protein) for candidate in candidates]))
    kept = best_of(redesigns, nlls, config.best) if config.best is not None else range(len(redesigns))
    # the inputs are listed first and the sort is stable, so each input comes before its designs
    rows = sorted([*range(len(redesigns), len(candidates)), *kept], key=lambda i: candidates[i].protein)
    changes = ["" if config.contig else mutations(candidates[i].ids, records[candidates[i].protein][1]) for i in rows]
    scored = designs_csv([(candidates[i], changed, nlls[i]) for i, changed in zip(rows, changes, strict=True)])
    designs, samples = [designs[i] for i in kept], [samples[i] for i in kept]
    text = describe_designs(
        trained,
        config,
        samples,
        names=[design.name for design in designs],
        numbers=[design.number for design in designs],
        notes=[note_of(nlls[i]) for i in kept],
    )
    if trained.processes.first:
        write_new(table, map_csv(designs))
        write_new(scores, scored)
        write_new(output, text)
    message = f"{output}: {len(samples)} designs; {scores}: their scores; {table}: their free and fixed positions"
    announce(message, trained.processes)


def main() -> None:
    """The command line."""
    run_verb(infill, "infill", InfillConfig)


if __name__ == "__main__":
    main()
