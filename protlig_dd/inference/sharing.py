"""Share work on packs of sequences among the ranks."""

import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import numpy as np

from protlig_dd.batch import TOKENS_PER_PACK, split_lengths
from protlig_dd.system.distributed import ALONE, Processes, gather_objects
from protlig_dd.system.terminal import ProgressBar

T = TypeVar("T")

Tick = Callable[[], None]
"""Called after each part of the work, to advance the progress bar."""


def share(
    packs: Sequence[T],
    score: Callable[[T, Tick], dict[Any, Any]],
    *,
    description: str,
    processes: Processes,
    ticks: int = 1,
    shown: bool = True,
) -> dict[Any, Any]:
    """Distribute the packs over the ranks, call `score` for each pack, and return all results on every rank.

    Args:
        score: (a pack, the progress bar's tick) -> {key: result}.
        ticks: how often `score` calls the tick for each pack.
        shown: whether rank 0 shows a progress bar.
    """
    mine = packs[processes.rank :: processes.world_size]
    results: dict[Any, Any] = {}
    with ProgressBar(description, len(mine) * ticks, shown=shown and processes.first) as bar:
        for pack in mine:
            results |= score(pack, bar.advance)
    return {key: value for rank_results in gather(results, processes) for key, value in rank_results.items()}


def gather(value: T, processes: Processes) -> list[T]:
    """Return every rank's value, in rank order, on every rank.

    A process that works alone does not communicate, even if it belongs to a process group: the other processes of the
    group may not call this function.
    """
    return [value] if processes.world_size == 1 else gather_objects(value)


@dataclass(frozen=True)
class Work:
    """How work on sequences is split into packs and shared among the ranks."""

    tokens_per_pack: int
    description: str = "variants"
    processes: Processes = ALONE
    shown: bool = True
    """Whether rank 0 shows a progress bar."""

    def share(
        self, lengths: Sequence[int], score: Callable[[range, Tick], dict[Any, Any]], ticks: int = 1
    ) -> dict[Any, Any]:
        """Split the sequences into packs and call the function `share`. A pack is a range of sequence indices.

        Args:
            lengths: number of residues of each sequence.
        """
        sizes = map(len, split_lengths(lengths, self.tokens_per_pack))
        bounds = np.cumsum([0, *sizes]).tolist()
        packs = [range(first, end) for first, end in itertools.pairwise(bounds)]
        return self.share_packs(packs, score, ticks)

    def share_packs(
        self, packs: Sequence[T], score: Callable[[T, Tick], dict[Any, Any]], ticks: int = 1
    ) -> dict[Any, Any]:
        """Call the function `share` for packs that the caller has chosen."""
        return share(
            packs, score, description=self.description, processes=self.processes, ticks=ticks, shown=self.shown
        )


QUIET = Work(TOKENS_PER_PACK, shown=False)
"""The work of a Python call: one process and no progress bar."""
