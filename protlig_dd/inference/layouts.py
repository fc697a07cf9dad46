"""What of a protein is free and what is fixed: from positions or a contig to designs to sample."""

import itertools
import string
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from protlig_dd.config.verbs import InfillConfig
from protlig_dd.data.fasta import FastaRecord, read_fasta
from protlig_dd.inference.lengths import parse_range
from protlig_dd.inference.model import TrainedModel
from protlig_dd.system.random import random_key
from protlig_dd.system.tables import as_csv
from protlig_dd.system.terminal import announce
from protlig_dd.tokenizer import MASK, ProteinTokenizer

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


def stretches_of(contig: str) -> dict[str, list[tuple[int, int]]]:
    """First and last residue of each stretch of an input, in order, by its letter."""
    found: dict[str, list[tuple[int, int]]] = {}
    for part in contig.split("/"):
        if part[:1].isalpha():
            found.setdefault(part[0], []).append(parse_range(part[1:], f"contig={contig}: {part!r}"))
    return found


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
    table: list[list[object]] = [["design", "start", "end", "free", "input", "input_start"]]
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
            table.append([name, start + 1, end, free, source[start], origin[start] or ""])
    return as_csv(table)


def tell_what_is_odd(config: InfillConfig, trained: TrainedModel) -> None:
    """What a user may not have meant, or may not know."""
    if not trained.graph.masks:
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
                announce(
                    f"contig: {both} is in it twice, in {letter}{first}-{last} and {letter}{start}-{end}",
                    trained.processes,
                )
