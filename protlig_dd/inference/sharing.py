"""Sequences shared out over ranks in packs."""

import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import numpy as np

from protlig_dd.batch import split_lengths
from protlig_dd.system.distributed import ALONE, Processes, gather_objects
from protlig_dd.system.terminal import ProgressBar

T = TypeVar("T")

Tick = Callable[[], None]
"""What is called after each part of the work: a progress bar's."""


def share(
    packs: Sequence[T],
    score: Callable[[T, Tick], dict[Any, Any]],
    *,
    description: str,
    processes: Processes,
    ticks: int = 1,
) -> dict[Any, Any]:
    """What `score` finds for these packs, each rank its own; all of it on each rank.

    Args:
        score: (a pack, the progress bar's tick) -> {anything: what was found}.
        ticks: how often `score` ticks.
    """
    mine = packs[processes.rank :: processes.world_size]
    found: dict[Any, Any] = {}
    with ProgressBar(description, len(mine) * ticks, shown=processes.first) as bar:
        for pack in mine:
            found |= score(pack, bar.advance)
    return {key: value for part in gather_objects(found) for key, value in part.items()}


@dataclass(frozen=True)
class Work:
    """How sequences are put before the network."""

    tokens_per_pack: int
    description: str = "variants"
    processes: Processes = ALONE

    def share(
        self, lengths: Sequence[int], score: Callable[[range, Tick], dict[Any, Any]], ticks: int = 1
    ) -> dict[Any, Any]:
        """`share` of sequences of so many residues: a pack is the range of their indices."""
        sizes = map(len, split_lengths(lengths, self.tokens_per_pack))
        firsts = np.cumsum([0, *sizes]).tolist()
        packs = [range(first, end) for first, end in itertools.pairwise(firsts)]
        return share(packs, score, description=self.description, processes=self.processes, ticks=ticks)
