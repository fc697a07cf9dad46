"""Lay out designs for infilling: decide from positions or a contig which residues are fixed and which are free."""

import itertools
import string
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from protlig_dd.config.verbs import InfillConfig
from protlig_dd.data.case import lower_case_of
from protlig_dd.data.fasta import FastaRecord, read_fasta
from protlig_dd.inference.lengths import parse_range
from protlig_dd.inference.model import TrainedModel
from protlig_dd.inference.sequences import encode_with_free
from protlig_dd.system.random import random_key
from protlig_dd.system.tables import as_csv
from protlig_dd.system.terminal import announce
from protlig_dd.tokenizer import MASK

MAX_DESIGNS = 1_000_000  # maximum number of designs of one protein


Protein = tuple[FastaRecord, np.ndarray]
"""A record and the token ids (length,) of its residues, with MASK where the sequence has `_`."""


class Segment(NamedTuple):
    """A stretch of a design: residues `start` to `end` of the input (1-based, inclusive), or new residues."""

    length: int
    start: int | None = None
    """None for new residues."""
    letter: str | None = None
    """The letter by which the contig names the input protein; None for new residues, or without a contig."""

    @property
    def end(self) -> int | None:
        return None if self.start is None else self.start + self.length - 1


class Design(NamedTuple):
    """A design to sample: one record of the output files."""

    name: str
    protein: int
    """Index of its input record; 0 if the contig names several inputs."""
    layout: list[Segment]
    template: np.ndarray
    """(length,) ids, MASK at free positions."""
    number: int
    """This number and the seed determine all random draws of the design."""


def designs_of_positions(config: InfillConfig, records: Sequence[Protein]) -> list[Design]:
    """Return `config.n` designs of each record. `mask_free_positions` chooses their free positions."""
    designs = []
    for k, (record, ids) in enumerate(records):
        template = mask_free_positions(record, ids, fixed=config.fixed, free=config.free, context=config.context)
        if MASK not in template:
            if config.context is not None:
                raise ValueError(
                    f"{record.name} has no free position: all its letters are {config.context}-case, and "
                    f"context={config.context} keeps {config.context}-case letters; write the residues to redesign in "
                    "the other letter case"
                )
            raise ValueError(
                f"{record.name} has no free position: mark positions with `_`, or give free=, fixed=, context= or "
                "contig="
            )
        designs += designs_of_template(record.id, k, template, config.n)
    return designs


def designs_of_template(name: str, protein: int, template: np.ndarray, n: int) -> list[Design]:
    """Return n designs with the same template.

    Args:
        name: the first part of the designs' names.
        protein: index of the input protein.
    """
    layout = [Segment(len(template), 1)]
    return [Design(f"{name}_{i + 1}", protein, layout, template, protein * MAX_DESIGNS + i) for i in range(n)]


def check_number_of_designs(n: int) -> None:
    """Raise a ValueError if one protein has too many designs."""
    if n > MAX_DESIGNS:
        raise ValueError(f"n must be at most {MAX_DESIGNS}, got {n}")


def designs_of_contig(config: InfillConfig, records: Sequence[Protein]) -> list[Design]:
    """Return `config.n` designs of each record or, if the contig has several letters, `config.n` designs in total.

    In the second case each design combines records: A is the first record, B is the second record, and so on.
    """
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
                    f"{len(records)} records"
                )
        groups = [{letter: records[number] for letter, number in numbers.items()}]
    designs = []
    for k, group in enumerate(groups):
        used = [record for record, _ in group.values()] if len(letters) > 1 else [records[k][0]]
        name = "+".join(record.id for record in used)
        for i in range(config.n):
            number = k * MAX_DESIGNS + i
            generator = np.random.default_rng(random_key(config.seed, "contig", number))
            layout = draw_layout(config.contig, config.lengths, generator)
            template = build_template(group, layout)
            if MASK not in template:
                raise ValueError(f"{used[0].name} has no free position: the contig has no new residue")
            designs.append(Design(f"{name}_{i + 1}", k, layout, template, number))
    return designs


def contig_stretches(contig: str) -> dict[str, list[tuple[int, int]]]:
    """Return the stretches of input proteins in a contig: letter of the protein -> list of (first, last) residues."""
    stretches: dict[str, list[tuple[int, int]]] = {}
    for part in contig.split("/"):
        if part[:1].isalpha():
            stretches.setdefault(part[0], []).append(parse_range(part[1:], f"contig={contig}: {part!r}"))
    return stretches


def read_records(path: Path) -> list[Protein]:
    """Return the records of a FASTA file with their residues as ids (length,), MASK for `_`.

    Raises:
        ValueError: an illegal letter (`_` is allowed here), an empty sequence or a repeated id. The
            message names the record.
    """
    proteins, seen = [], set()
    for record in read_fasta(path):
        if record.id in seen:
            raise ValueError(f"{record.name} appears twice; designs are named after their record")
        seen.add(record.id)
        proteins.append((record, encode_with_free(record.sequence, record.name)[1:-1]))
    return proteins


def mask_free_positions(
    record: FastaRecord, ids: np.ndarray, *, fixed: Any, free: Any, context: str | None = None
) -> np.ndarray:
    """Return the ids with MASK at free positions.

    A position is free if it has `_`, if `free` contains it, if `fixed` is given and does not contain it, or if
    `context` is given and does not fix it.

    Args:
        context: the case of the letters that are fixed, `lower` or `upper`; letters of the other case are free.

    Raises:
        ValueError: an invalid range, a range that ends after the sequence, or a fixed position that has `_`.
    """
    template = ids.copy()
    if free is not None:
        template[in_ranges(record, free, "free", len(ids))] = MASK
    if fixed is not None:
        kept = in_ranges(record, fixed, "fixed", len(ids))
        if len(unknown := np.flatnonzero(kept & (ids == MASK))):
            raise ValueError(f"{record.name}: position {unknown[0] + 1} is fixed, but the sequence has `_` there")
        template[~kept] = MASK
    if context is not None:
        lower = lower_case_of(record.sequence)
        is_fixed = np.full(len(ids), context == "upper") if lower is None else lower == (context == "lower")
        template[~is_fixed] = MASK
    return template


def in_ranges(record: FastaRecord, ranges: Any, key: str, length: int) -> np.ndarray:
    """Return (length,) bool, True at the positions in ranges such as `[12-40,77]`, which are 1-based and inclusive."""
    inside = np.zeros(length, bool)
    for item in ranges if isinstance(ranges, list) else [ranges]:
        first, last = parse_range(str(item), f"{key}={item}")
        if last > length:
            raise ValueError(f"{record.name}: {key}={item} ends at {last}, but the sequence has {length} residues")
        inside[first - 1 : last] = True
    return inside


def draw_layout(contig: str, lengths: str | None, generator: np.random.Generator) -> list[Segment]:
    """Draw the segments of one design.

    `10-40/A45-60/5-20` is 10 to 40 new residues, residues 45 to 60 of input A, and 5 to 20 new residues. The length of
    each new stretch is drawn uniformly. `lengths` is a number or a range for the length of the whole design. If
    `lengths` is given, the draw is uniform among all combinations of stretches whose total length is allowed.
    Combinations without a new residue are drawn only if there are no other combinations. The notation is RFdiffusion's
    (Watson et al. 2023), without its chain breaks (`/0`); a letter names the input.

    Raises:
        ValueError: a part that is not a range, a design without residues, or lengths that the contig cannot have.
    """
    ranges: list[tuple[int, int]] = []
    starts: list[int | None] = []
    letters: list[str | None] = []
    if contig.startswith("["):
        raise ValueError(f"contig={contig}: write the contig without brackets")
    for part in contig.split("/"):
        if part.split(" ")[0] == "0":
            raise ValueError(f"contig={contig}: /0 is a break between two chains, but this model is for single chains")
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
        sizes = draw_sizes(ranges, low, high, generator)
    else:
        sizes = []
        while sum(sizes) < low:  # draw again if all new stretches are empty; the probability is at most 1/2
            sizes = [int(generator.integers(a, b, endpoint=True)) for a, b in ranges]
    return [Segment(size, start, letter) for size, start, letter in zip(sizes, starts, letters, strict=True) if size]


def draw_sizes(ranges: Sequence[tuple[int, int]], low: int, high: int, generator: np.random.Generator) -> list[int]:
    """Draw a size in each range, uniformly among all combinations whose sum is in [low, high]."""
    # ways[k][s] is proportional to the number of ways in which the sizes of ranges k, k + 1, ... can have the sum s
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
        sizes.append(first + int(generator.choice(len(weight), p=np.array(weight) / sum(weight))))
    return sizes


def build_template(inputs: Mapping[str, Protein], layout: Sequence[Segment]) -> np.ndarray:
    """Return the design's token ids, with MASK in the new stretches.

    Args:
        inputs: letter in the layout's segments -> protein.
    """
    parts = []
    for segment in layout:
        if segment.start is None or segment.end is None or segment.letter is None:
            parts.append(np.full(segment.length, MASK, np.uint8))
            continue
        record, ids = inputs[segment.letter]
        if segment.end > len(ids):
            raise ValueError(
                f"{record.name}: the contig has residues {segment.start}-{segment.end}, but the sequence has {len(ids)}"
            )
        parts.append(ids[segment.start - 1 : segment.end])
    return np.concatenate(parts)


def map_csv(designs: Sequence[Design]) -> str:
    """Return CSV with a row for each free or fixed stretch: its position in the design, and its origin in the input.

    Positions are 1-based and inclusive. The columns `input` and `input_start` are empty for a contig's new residues.
    Without a contig, `input` is always empty.
    """
    table: list[list[object]] = [["design", "start", "end", "free", "input", "input_start"]]
    for name, _, layout, template, _ in designs:
        origin = np.concatenate(
            [np.arange(s.length) + (s.start or 0) if s.start else np.zeros(s.length, int) for s in layout]
        )
        source = np.repeat([s.letter or "" for s in layout], [s.length for s in layout])
        # a new row begins where free and fixed residues meet, the input changes or its residues are not consecutive
        steps = (np.diff(template == MASK) != 0) | ((np.diff(origin) != 1) & ((origin[1:] > 0) | (origin[:-1] > 0)))
        steps |= source[1:] != source[:-1]
        bounds = [0, *(np.flatnonzero(steps) + 1).tolist(), len(template)]
        for start, end in itertools.pairwise(bounds):
            free = "true" if template[start] == MASK else "false"
            table.append([name, start + 1, end, free, source[start], origin[start] or ""])
    return as_csv(table)


def warn_about_layout(
    config: InfillConfig, trained: TrainedModel, records: Sequence[Protein], designs: Sequence[Design]
) -> None:
    """Print a warning for each layout that may be a mistake, and for graphs where infilling is an approximation.

    A layout may be a mistake if `context=` fixes no residue of the record, or if the contig reorders or repeats
    residues.
    """
    whole = dict.fromkeys(design.protein for design in designs if (design.template == MASK).all())
    if config.context is not None and whole:
        names = ", ".join(records[protein][0].name for protein in whole)
        announce(
            f"warning: context={config.context} fixes no residue, so all residues are redesigned: {names}",
            trained.processes,
        )
    if not trained.graph.masks:
        announce(
            "infilling is an approximation with this model's graph (docs/diffusion.md); designs are not ranked, "
            "because the likelihood of the free residues (nll_free) needs the absorbing graph",
            trained.processes,
        )
    if config.contig is None:
        return
    for letter, stretches in contig_stretches(config.contig).items():
        for (first, last), (start, end) in itertools.pairwise(stretches):
            if start <= first:
                announce(
                    f"warning: the contig puts {letter}{start}-{end} after {letter}{first}-{last}", trained.processes
                )
        for (first, last), (start, end) in itertools.combinations(sorted(stretches), 2):
            if start <= last:
                shared = f"{letter}{start}-{min(last, end)}"
                announce(
                    f"warning: the contig has {shared} twice, in {letter}{first}-{last} and {letter}{start}-{end}",
                    trained.processes,
                )
