"""Redesign a part of proteins, or build new ones around their motifs.

python -m protlig_dd.infill from=runs/demo input=partial.fasta output=designs.fasta n=10     # free where it has `_`
python -m protlig_dd.infill from=runs/demo input=wt.fasta output=designs.fasta free=[12-40,77]
python -m protlig_dd.infill from=runs/demo input=wt.fasta output=designs.fasta fixed=[45-60]
python -m protlig_dd.infill from=runs/demo input=wt.fasta output=designs.fasta contig=10-40/A45-60/5-20/A80-92/10
"""

import csv
import io
import itertools
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from omegaconf import DictConfig

from protlig_dd.data.fasta import FastaRecord, read_fasta
from protlig_dd.diffusion.sampling import check_sampler
from protlig_dd.runtime.cli import run_verb
from protlig_dd.runtime.config import InfillConfig, read_config
from protlig_dd.runtime.files import write_new
from protlig_dd.runtime.generate import describe_designs, parse_range, sample_designs
from protlig_dd.runtime.metrics import announce
from protlig_dd.runtime.random import random_key
from protlig_dd.runtime.steering import read_log_bias
from protlig_dd.runtime.trained import check_free, check_least, load_trained
from protlig_dd.tokenizer import MASK, ProteinTokenizer

FREE = "_"
MOST = 1_000_000  # designs of one protein


class Segment(NamedTuple):
    """A stretch of a design: residues of the input from `start` to `end` (1-based, inclusive), or so many new ones."""

    length: int
    start: int | None = None

    @property
    def end(self) -> int | None:
        return None if self.start is None else self.start + self.length - 1


def infill(cfg: DictConfig) -> None:
    """Sample what is free in each protein of the input, n times, with the rest held fixed."""
    config = read_config(cfg, InfillConfig)
    output = check_free(config.output)
    table = check_free(config.map or str(output.with_suffix(".map.csv")))
    if table.resolve() == output.resolve():
        raise ValueError(f"map={config.map} and output={config.output} are the same file")
    check_least((("n", config.n, 1), ("steps", config.steps, 1), ("seed", config.seed, 0),
                 ("tokens_per_pack", config.tokens_per_pack, 1), ("nll_draws", config.nll_draws, 0)))  # fmt: skip
    if config.n > MOST:
        raise ValueError(f"n must be at most {MOST}, got {config.n}")
    if sum(value is not None for value in (config.fixed, config.free, config.contig)) > 1:
        raise ValueError("give one of fixed=, free= and contig=")
    if config.lengths is not None and config.contig is None:
        raise ValueError(f"lengths={config.lengths} is for contig=; elsewhere a design is as long as its input")
    records = read_records(Path(config.input))
    trained = load_trained(config.from_, device=config.device, precision=config.precision)
    check_sampler(trained.graph, config.predictor, config.temperature, config.top_p)

    names, layouts, templates, numbers = [], [], [], []
    for k, (record, ids) in enumerate(records):
        for i in range(config.n):
            if config.contig is None:
                template = free_positions(record, ids, fixed=config.fixed, free=config.free)
                layout = [Segment(len(template), 1)]
            else:
                draw = np.random.default_rng(random_key(config.seed, "contig", k * MOST + i))
                layout = draw_layout(config.contig, config.lengths, draw)
                template = place(record, ids, layout)
            trained.check_length(len(template), f"{record.name}: the design")
            if MASK not in template:
                raise ValueError(
                    f"{record.name} has no free position: mark some with `_`, or give free=, fixed=, contig="
                )
            names.append(f"{record.id}_{i + 1}")
            layouts.append(layout)
            templates.append(template)
            numbers.append(k * MOST + i)
    lengths = [len(template) for template in templates]
    log_bias = read_log_bias(config.log_bias, lengths)
    samples = sample_designs(trained, config, lengths=lengths, numbers=numbers, templates=templates, log_bias=log_bias)
    for name, template, sample in zip(names, templates, samples, strict=True):
        changed = np.flatnonzero((template != MASK) & (template != sample))
        if len(changed):
            raise AssertionError(f"{name}: fixed residue {changed[0] + 1} was changed")
    text = describe_designs(trained, config, samples, names=names, numbers=numbers)
    if trained.processes.first:
        write_new(table, map_csv(names, layouts, templates))
        write_new(output, text)
    announce(f"{output}: {len(samples)} designs; {table}: what was free", trained.processes)


def read_records(path: Path) -> list[tuple[FastaRecord, np.ndarray]]:
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
        # any letter in the free places: encode is to judge the others
        ids = encode(record.sequence.upper().replace(FREE, "A"), record.name)[1:-1]
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
    is RFdiffusion's (Watson et al. 2023); any letter marks the input.

    Raises:
        ValueError: a part that is neither, a design of no residue, or lengths that no choice can have; names them.
    """
    ranges: list[tuple[int, int]] = []
    starts: list[int | None] = []
    for part in contig.split("/"):
        letter, bounds = (part[0], part[1:]) if part[:1].isalpha() else ("", part)
        first, last = parse_range(bounds, f"contig={contig}: {part!r}", least=1 if letter else 0)
        ranges.append((last - first + 1,) * 2 if letter else (first, last))
        starts.append(first if letter else None)
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
    return [Segment(size, start) for size, start in zip(sizes, starts, strict=True) if size]


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


def place(record: FastaRecord, ids: np.ndarray, layout: Sequence[Segment]) -> np.ndarray:
    """The design's ids, MASK in the new stretches."""
    parts = []
    for segment in layout:
        if segment.start is None or segment.end is None:
            parts.append(np.full(segment.length, MASK, ids.dtype))
            continue
        if segment.end > len(ids):
            raise ValueError(
                f"{record.name}: contig wants residues {segment.start}-{segment.end}, the sequence has {len(ids)}"
            )
        parts.append(ids[segment.start - 1 : segment.end])
    return np.concatenate(parts)


def map_csv(names: Sequence[str], layouts: Sequence[Sequence[Segment]], templates: Sequence[np.ndarray]) -> str:
    """One row for each stretch that is free or fixed: where it lies in the design, and where it came from.

    `input_start` is empty for what is new in a contig; the positions are 1-based and inclusive.
    """
    text = io.StringIO()
    table = csv.writer(text, lineterminator="\n")
    table.writerow(["design", "start", "end", "free", "input_start"])
    for name, layout, template in zip(names, layouts, templates, strict=True):
        origin = np.concatenate(
            [np.arange(s.length) + (s.start or 0) if s.start else np.zeros(s.length, int) for s in layout]
        )
        # a new row begins where free turns to fixed or back, or the input's numbering jumps
        steps = (np.diff(template == MASK) != 0) | ((np.diff(origin) != 1) & ((origin[1:] > 0) | (origin[:-1] > 0)))
        bounds = [0, *(np.flatnonzero(steps) + 1).tolist(), len(template)]
        for start, end in itertools.pairwise(bounds):
            free = "true" if template[start] == MASK else "false"
            table.writerow([name, start + 1, end, free, origin[start] or ""])
    return text.getvalue()


def main() -> None:
    """The command line."""
    run_verb(infill, "infill", InfillConfig)


if __name__ == "__main__":
    main()
