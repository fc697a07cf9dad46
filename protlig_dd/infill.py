"""Redesign a part of proteins, or build new ones around their motifs.

python -m protlig_dd.infill from=runs/demo input=partial.fasta output=designs.fasta n=10     # free where it has `_`
python -m protlig_dd.infill from=runs/demo input=wt.fasta output=designs.fasta free=[12-40,77]
python -m protlig_dd.infill from=runs/demo input=wt.fasta output=designs.fasta fixed=[45-60]
python -m protlig_dd.infill from=runs/demo input=wt.fasta output=designs.fasta contig=10-40/A45-60/5-20/A80-92/10
python -m protlig_dd.infill from=runs/demo input=two.fasta output=designs.fasta contig=A1-30/10-20/B5-40
"""

import csv
import io
import itertools
import string
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from omegaconf import DictConfig

from protlig_dd.data.encode import is_nucleotide, nucleotide_warning
from protlig_dd.data.fasta import FastaRecord, read_fasta
from protlig_dd.diffusion.graph import Absorbing
from protlig_dd.diffusion.sampling import check_sampler
from protlig_dd.evaluation.fitness import Work
from protlig_dd.evaluation.redesigns import FreeNLL, Redesign, designs_csv, free_draws, free_nll, mutations
from protlig_dd.runtime.cli import run_verb
from protlig_dd.runtime.config import InfillConfig, read_config
from protlig_dd.runtime.files import write_new
from protlig_dd.runtime.generate import describe_designs, parse_range, sample_designs
from protlig_dd.runtime.metrics import announce
from protlig_dd.runtime.random import random_key
from protlig_dd.runtime.steering import read_log_bias
from protlig_dd.runtime.trained import Trained, check_free, check_least, load_trained
from protlig_dd.tokenizer import MASK, N_STATES, ProteinTokenizer

FREE = "_"
MOST = 1_000_000  # designs of one protein


Protein = tuple[FastaRecord, np.ndarray]
"""A record and its residues' ids (length,), MASK where it has `_`."""


class Segment(NamedTuple):
    """A stretch of a design: residues of the input from `start` to `end` (1-based, inclusive), or so many new ones."""

    length: int
    start: int | None = None
    letter: str | None = None
    """Which input, in a contig."""

    @property
    def end(self) -> int | None:
        return None if self.start is None else self.start + self.length - 1


class Design(NamedTuple):
    """What is asked for: one row of the outputs."""

    name: str
    protein: int
    """The number of its input; of the first, where a contig has several."""
    layout: list[Segment]
    template: np.ndarray
    """(length,) ids, MASK where it is free."""
    number: int
    """What it draws depends on this and the seed."""


def infill(cfg: DictConfig) -> None:
    """Sample what is free in each protein of the input, n times, with the rest held fixed."""
    config = read_config(cfg, InfillConfig)
    output = check_free(config.output)
    table = check_free(config.map or str(output.with_suffix(".map.csv")))
    scores = check_free(str(output.with_suffix(".csv")))
    for one, other in itertools.combinations((output, table, scores), 2):
        if one.resolve() == other.resolve():
            raise ValueError(f"map={config.map}, output={config.output}: {one} would be written twice")
    check_least((("n", config.n, 1), ("steps", config.steps, 1), ("seed", config.seed, 0),
                 ("tokens_per_pack", config.tokens_per_pack, 1), ("nll_draws", config.nll_draws, 0),
                 ("free_draws", config.free_draws, 0)))  # fmt: skip
    if config.n > MOST:
        raise ValueError(f"n must be at most {MOST}, got {config.n}")
    if config.best is not None and not 1 <= config.best <= config.n:
        raise ValueError(f"best={config.best}: of n={config.n} designs give 1 to {config.n}")
    if sum(value is not None for value in (config.fixed, config.free, config.contig)) > 1:
        raise ValueError("give one of fixed=, free= and contig=")
    if config.lengths is not None and config.contig is None:
        raise ValueError(f"lengths={config.lengths} is for contig=; elsewhere a design is as long as its input")
    records = read_records(Path(config.input))
    trained = load_trained(config.from_, device=config.device, precision=config.precision)
    if nucleotides := sum(is_nucleotide(ids.astype(np.uint8).tobytes()) for _, ids in records):
        announce(nucleotide_warning(nucleotides, len(records), config.input), trained.processes)
    check_sampler(trained.graph, config.predictor, config.temperature, config.top_p)
    ranked = isinstance(trained.graph, Absorbing) and config.free_draws > 0
    if config.best is not None and not ranked:
        why = f"free_draws={config.free_draws}" if not config.free_draws else "the model's graph is another"
        raise ValueError(f"best={config.best} ranks by nll_free, which is for the absorbing graph; {why}")

    designs = designs_of_contig(config, records) if config.contig else designs_of_positions(config, records)
    for design in designs:
        trained.check_length(len(design.template), f"{records[design.protein][0].name}: the design")
    tell_what_is_odd(config, trained)
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
    made = [Redesign(d.name, ids, d.template == MASK, d.protein) for d, ids in zip(designs, samples, strict=True)]
    both = made + inputs
    found: list[FreeNLL | None] = [None] * len(both)
    if ranked:
        work = Work(trained.device, config.tokens_per_pack, "NLL of free residues", trained.processes)
        drawn = free_draws(trained.score_fn, trained.noise, both, work, draws=config.free_draws, seed=config.seed)
        place = {one.protein: len(made) + i for i, one in enumerate(inputs)}
        found = list(free_nll(drawn, both, [place.get(one.protein) for one in both]))
    kept = best_of(made, found, config.best) if config.best is not None else range(len(made))
    rows = sorted([*range(len(made), len(both)), *kept], key=lambda i: both[i].protein)  # each input before its designs
    changes = ["" if config.contig else mutations(both[i].ids, records[both[i].protein][1]) for i in rows]
    scored = designs_csv([(both[i], changed, found[i]) for i, changed in zip(rows, changes, strict=True)])
    designs, samples = [designs[i] for i in kept], [samples[i] for i in kept]
    text = describe_designs(
        trained,
        config,
        samples,
        names=[design.name for design in designs],
        numbers=[design.number for design in designs],
        notes=[note_of(found[i]) for i in kept],
    )
    if trained.processes.first:
        write_new(table, map_csv(designs))
        write_new(scores, scored)
        write_new(output, text)
    announce(f"{output}: {len(samples)} designs; {scores}: their scores; {table}: what was free", trained.processes)


def designs_of_positions(config: InfillConfig, records: Sequence[Protein]) -> list[Design]:
    """n designs of each record, by its free positions."""
    designs = []
    for k, (record, ids) in enumerate(records):
        template = free_positions(record, ids, fixed=config.fixed, free=config.free)
        if MASK not in template:
            raise ValueError(f"{record.name} has no free position: mark some with `_`, or give free=, fixed=, contig=")
        layout = [Segment(len(template), 1)]
        designs += [Design(f"{record.id}_{i + 1}", k, layout, template, k * MOST + i) for i in range(config.n)]
    return designs


def designs_of_contig(config: InfillConfig, records: Sequence[Protein]) -> list[Design]:
    """n designs of each record; or, where a contig names several inputs, of them together: A is the first record."""
    assert config.contig is not None
    letters = sorted({part[0] for part in config.contig.split("/") if part[:1].isalpha()})
    if len(letters) < 2:
        groups = [dict.fromkeys(letters, protein) for protein in records]
    else:
        numbers = {letter: string.ascii_uppercase.find(letter.upper()) for letter in letters}
        for letter, number in numbers.items():
            if not 0 <= number < len(records):
                raise ValueError(
                    f"contig={config.contig}: {letter} is record {number + 1} of {config.input}, which has "
                    f"{len(records)}"
                )
        groups = [{letter: records[number] for letter, number in numbers.items()}]
    designs = []
    for k, group in enumerate(groups):
        used = [record for record, _ in group.values()] if len(letters) > 1 else [records[k][0]]
        name = "+".join(record.id for record in used)
        for i in range(config.n):
            number = k * MOST + i
            draw = np.random.default_rng(random_key(config.seed, "contig", number))
            layout = draw_layout(config.contig, config.lengths, draw)
            template = place(group, layout)
            if MASK not in template:
                raise ValueError(f"{used[0].name} has no free position: the contig has no new residue")
            designs.append(Design(f"{name}_{i + 1}", k, layout, template, number))
    return designs


def tell_what_is_odd(config: InfillConfig, trained: Trained) -> None:
    """What a user may not have meant, or may not know."""
    if not isinstance(trained.graph, Absorbing):
        announce(
            "infilling is an approximation with this model's graph, which nll_free is not for (docs/diffusion.md): "
            "designs are not ranked",
            trained.processes,
        )
    if config.contig is None:
        return
    for letter, stretches in stretches_of(config.contig).items():
        for (first, last), (start, end) in itertools.pairwise(stretches):
            if start <= first:
                announce(f"contig: {letter}{start}-{end} comes after {letter}{first}-{last}", trained.processes)
        for (first, last), (start, end) in itertools.combinations(sorted(stretches), 2):
            if start <= last:
                both = f"{letter}{start}-{min(last, end)}"
                announce(f"contig: {both} is in it twice, in {letter}{first}-{last} and {letter}{start}-{end}",
                         trained.processes)  # fmt: skip


def stretches_of(contig: str) -> dict[str, list[tuple[int, int]]]:
    """First and last residue of each stretch of an input, in order, by its letter."""
    found: dict[str, list[tuple[int, int]]] = {}
    for part in contig.split("/"):
        if part[:1].isalpha():
            found.setdefault(part[0], []).append(parse_range(part[1:], f"contig={contig}: {part!r}"))
    return found


def inputs_of(records: Sequence[Protein], designs: Sequence[Design]) -> list[Redesign]:
    """The inputs that have a residue at every position that their designs have free, as rows of their own."""
    free = {design.protein: design.template == MASK for design in designs}
    return [
        Redesign(record.id, ids, free[k], k)
        for k, (record, ids) in enumerate(records)
        if (ids[free[k]] < N_STATES).all()
    ]


def best_of(designs: Sequence[Redesign], found: Sequence[FreeNLL | None], best: int) -> list[int]:
    """The numbers of the best designs of each protein, the best first."""
    of_protein: dict[int, list[int]] = {}
    for i, design in enumerate(designs):
        of_protein.setdefault(design.protein, []).append(i)

    def nll(i: int) -> float:
        one = found[i]
        assert one is not None
        return one.nll

    return [i for numbers in of_protein.values() for i in sorted(numbers, key=nll)[:best]]


def note_of(found: FreeNLL | None) -> str:
    """What the header of a design says of it."""
    return "" if found is None else f" nll_free={found.nll:.4f} nll_free_se={found.nll_error:.4f}"


def read_records(path: Path) -> list[Protein]:
    """Records of a FASTA file with their residues as ids (length,), MASK for `_`.

    Raises:
        ValueError: an illegal letter (`_` is legal here), an empty sequence, or an id that is there twice; named.
    """
    encode, found, seen = ProteinTokenizer().encode, [], set()
    for record in read_fasta(path):
        if record.id in seen:
            raise ValueError(f"{record.name} is there twice; designs are named after their record")
        seen.add(record.id)
        free = np.array([letter == FREE for letter in record.sequence.removesuffix("*")], bool)
        try:  # any letter in the free places: encode is to judge the others
            ids = encode(record.sequence.upper().replace(FREE, "A"), record.name)[1:-1]
        except ValueError as error:
            raise ValueError(f"{error}; `{FREE}` marks a free position") from error
        found.append((record, np.where(free, MASK, ids)))
    return found


def free_positions(record: FastaRecord, ids: np.ndarray, *, fixed: Any, free: Any) -> np.ndarray:
    """The ids with MASK where positions are free: those of `_`, with those that `free` lists or `fixed` does not.

    Raises:
        ValueError: a range that is none or beyond the sequence; a fixed position that has no residue.
    """
    template = ids.copy()
    if free is not None:
        template[listed(record, free, "free", len(ids))] = MASK
    if fixed is not None:
        kept = listed(record, fixed, "fixed", len(ids))
        if len(unknown := np.flatnonzero(kept & (ids == MASK))):
            raise ValueError(f"{record.name}: position {unknown[0] + 1} is fixed, but the sequence has `_` there")
        template[~kept] = MASK
    return template


def listed(record: FastaRecord, ranges: Any, key: str, length: int) -> np.ndarray:
    """(length,) bool: the positions of `[12-40,77]`, 1-based and inclusive."""
    inside = np.zeros(length, bool)
    for item in ranges if isinstance(ranges, list) else [ranges]:
        first, last = parse_range(str(item), f"{key}={item}")
        if last > length:
            raise ValueError(f"{record.name}: {key}={item} ends at {last}, but the sequence has {length} residues")
        inside[first - 1 : last] = True
    return inside


def draw_layout(contig: str, lengths: str | None, draw: np.random.Generator) -> list[Segment]:
    """Segments of one design: `10-40/A45-60/5-20` is 10 to 40 new residues, the input's 45 to 60, 5 to 20 new ones.

    The lengths of the new stretches are drawn uniformly; with `lengths` (a number or a range of the whole) uniformly
    among all choices that fit it. Choices without a new residue are left out, unless there are no others. The notation
    is RFdiffusion's (Watson et al. 2023), but for chain breaks (`/0`), which this model does not know; a letter marks
    the input.

    Raises:
        ValueError: a part that is neither, a design of no residue, or lengths that no choice can have; names them.
    """
    ranges: list[tuple[int, int]] = []
    starts: list[int | None] = []
    letters: list[str | None] = []
    if contig.startswith("["):
        raise ValueError(f"contig={contig}: give it without brackets")
    for part in contig.split("/"):
        if part.split(" ")[0] == "0":
            raise ValueError(f"contig={contig}: /0 is a break between two chains, and the model knows single chains")
        letter, bounds = (part[0], part[1:]) if part[:1].isalpha() else ("", part)
        first, last = parse_range(bounds, f"contig={contig}: {part!r}", least=1 if letter else 0)
        ranges.append((last - first + 1,) * 2 if letter else (first, last))
        starts.append(first if letter else None)
        letters.append(letter or None)
    shortest, longest = (sum(column) for column in zip(*ranges, strict=True))
    if not longest:
        raise ValueError(f"contig={contig} has no residue")
    low, high = (shortest, longest) if lengths is None else parse_range(lengths, f"lengths={lengths}")
    if high < shortest or low > longest:
        raise ValueError(f"lengths={lengths}, but contig={contig} gives {shortest} to {longest} residues")
    motifs = sum(first for (first, _), start in zip(ranges, starts, strict=True) if start)
    low = max(low, min(high, motifs + 1))
    if lengths is not None:
        sizes = draw_sizes(ranges, low, high, draw)
    else:
        sizes = []
        while sum(sizes) < low:  # at most half of the choices have no new residue
            sizes = [int(draw.integers(a, b, endpoint=True)) for a, b in ranges]
    return [Segment(*one) for one in zip(sizes, starts, letters, strict=True) if one[0]]


def draw_sizes(ranges: Sequence[tuple[int, int]], low: int, high: int, draw: np.random.Generator) -> list[int]:
    """A size in each range, uniform among all choices whose sum lies in [low, high]."""
    # ways[k][s]: choices of the sizes from k on whose sum is s; float, as only ratios matter
    ways = [np.ones(1)]
    for first, last in reversed(ranges):
        ways.insert(0, np.convolve(ways[0], np.r_[np.zeros(first), np.ones(last - first + 1)]))
        ways[0] /= ways[0].max()
    sizes: list[int] = []
    for k, (first, last) in enumerate(ranges):
        done, rest = sum(sizes), ways[k + 1]
        weight = [
            rest[max(0, low - done - size) : max(0, high - done - size + 1)].sum() for size in range(first, last + 1)
        ]
        sizes.append(first + int(draw.choice(len(weight), p=np.array(weight) / sum(weight))))
    return sizes


def place(inputs: Mapping[str, Protein], layout: Sequence[Segment]) -> np.ndarray:
    """The design's ids, MASK in the new stretches.

    Args:
        inputs: by the letters of the layout's segments.
    """
    parts = []
    for segment in layout:
        if segment.start is None or segment.end is None or segment.letter is None:
            parts.append(np.full(segment.length, MASK, np.uint8))
            continue
        record, ids = inputs[segment.letter]
        if segment.end > len(ids):
            raise ValueError(
                f"{record.name}: contig wants residues {segment.start}-{segment.end}, the sequence has {len(ids)}"
            )
        parts.append(ids[segment.start - 1 : segment.end])
    return np.concatenate(parts)


def map_csv(designs: Sequence[Design]) -> str:
    """One row for each stretch that is free or fixed: where it lies in the design, and where it came from.

    `input_start` is empty for what is new in a contig, and `input` where there is only one; the positions are 1-based
    and inclusive.
    """
    text = io.StringIO()
    table = csv.writer(text, lineterminator="\n")
    table.writerow(["design", "start", "end", "free", "input", "input_start"])
    for name, _, layout, template, _ in designs:
        origin = np.concatenate(
            [np.arange(s.length) + (s.start or 0) if s.start else np.zeros(s.length, int) for s in layout]
        )
        source = np.repeat([s.letter or "" for s in layout], [s.length for s in layout])
        # a new row begins where free turns to fixed or back, or the input or its numbering changes
        steps = (np.diff(template == MASK) != 0) | ((np.diff(origin) != 1) & ((origin[1:] > 0) | (origin[:-1] > 0)))
        steps |= source[1:] != source[:-1]
        bounds = [0, *(np.flatnonzero(steps) + 1).tolist(), len(template)]
        for start, end in itertools.pairwise(bounds):
            free = "true" if template[start] == MASK else "false"
            table.writerow([name, start + 1, end, free, source[start], origin[start] or ""])
    return text.getvalue()


def main() -> None:
    """The command line."""
    run_verb(infill, "infill", InfillConfig)


if __name__ == "__main__":
    main()
