"""Sequences shared out over ranks in packs."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import numpy as np
import torch

from protlig_dd.batch import split_lengths
from protlig_dd.inference.generate import ALONE
from protlig_dd.system.distributed import Processes, gather_objects
from protlig_dd.system.terminal import ProgressBar

CPU = torch.device("cpu")

T = TypeVar("T")


@dataclass(frozen=True)
class Work:
    """How sequences are put before the network."""

    device: torch.device
    tokens_per_pack: int
    description: str = "variants"
    processes: Processes = ALONE

    def share(
        self,
        keys: Sequence[T],
        lengths: Sequence[int],
        score: Callable[[Sequence[T], Callable[[], None]], dict[Any, Any]],
        ticks: int = 1,
    ) -> dict[Any, Any]:
        """What `score` finds for these keys, a pack at a time and each rank its own; all of it on each rank.

        Args:
            lengths: residues of each key's sequence.
            score: (keys of a pack, the progress bar's tick) -> {anything: what was found}.
            ticks: how often `score` ticks.
        """
        packs = split_lengths(lengths, self.tokens_per_pack)
        firsts = np.cumsum([0, *map(len, packs)]).tolist()
        mine = range(self.processes.rank, len(packs), self.processes.world_size)
        found: dict[Any, Any] = {}
        with ProgressBar(self.description, len(mine) * ticks, shown=self.processes.first) as bar:
            for number in mine:
                found |= score(keys[firsts[number] : firsts[number + 1]], bar.advance)
        return {key: value for part in gather_objects(found) for key, value in part.items()}
