"""Packs of members of clusters: each epoch draws a new member of each cluster, as ESM-2 was trained (Lin et al. 2023).

An epoch reads one member of each training cluster, chosen with equal probabilities, or the representative of a cluster
that has no members. The choice depends only on (seed, epoch) and on the cluster's number among the training clusters.
The shuffled order of the clusters is the order that an epoch without members has.

The number of tokens differs from epoch to epoch, but every epoch must have the same number of packs (see packing.py).
This number is floor(E / budget), where E is the sum, over the training clusters, of the mean number of tokens of the
cluster's members, rounded down. If the drawn members fill fewer packs, further members of the clusters are drawn, in
the order of the epoch, until they fill these packs. So every epoch can be planned without the epochs before it.
"""

import itertools
from collections.abc import Iterable
from typing import Any

import numpy as np

from protlig_dd.data.lengths import Lengths
from protlig_dd.data.loader import PackDataset
from protlig_dd.data.members import ClusterGroup
from protlig_dd.data.packing import Plan, epoch_rows, make_plan
from protlig_dd.data.rows import SplitRows

_MEMBER = 6  # second integer of the random keys; packing.py, loader.py and blocks.py use 1 to 5


class MemberDataset(PackDataset):
    """Training packs of random members of clusters. The row numbers in its packs are those of `ClusterGroup.joint`.

    Args:
        group: the clusters and their members.
        rows: (n,) row numbers of the training clusters, ascending.
        settings: as for PackDataset, with a seed and without weights.
    """

    def __init__(self, group: ClusterGroup, rows: np.ndarray | SplitRows, **settings: Any) -> None:
        self.members, self.joint = group.members, group.joint
        super().__init__(group, rows, **settings)
        self.group = self.joint

    def draw(self, clusters: np.ndarray, epoch: int, number: int = 0) -> np.ndarray:
        """Return (n,) row numbers of a random member of each of these clusters.

        Args:
            number: number of the draw in the epoch. An epoch has a second draw only if the first fills too few packs.
        """
        assert self.seed is not None
        return self.members.draw(clusters, [self.seed, _MEMBER, epoch, number], self.version)

    def _count_packs(self) -> int:
        expected = self.members.expected_tokens(np.asarray(self.rows), self.group.lengths, self.max_len)
        self._totals = self._quotas = [expected]  # in place of the representatives' tokens
        return expected // self.tokens_per_pack

    def _method(self) -> list[object]:
        return [self.members.fingerprint]

    def _mean_tokens(self) -> float:
        return self._totals[0] / len(self.rows)

    def _make_plan(self, epoch: int) -> Plan:
        clusters = np.asarray(self.rows)
        draws = (self._shuffled(self.draw(clusters, epoch, number), epoch) for number in itertools.count())
        limits = {"max_len": self.max_len, "tokens_per_pack": self.tokens_per_pack}
        return plan_of_draws(draws, self.joint.lengths, self.packs_per_epoch, **limits)

    def _shuffled(self, rows: np.ndarray, epoch: int) -> np.ndarray:
        """Return the drawn rows in the order of the epoch, which is the same for all draws of an epoch."""
        assert self.seed is not None
        limits = {"max_len": self.max_len, "seed": self.seed, "epoch": epoch, "version": self.version}
        return epoch_rows([rows], self.joint.lengths, self._totals, self._quotas, **limits)


def plan_of_draws(
    draws: Iterable[np.ndarray], lengths: np.ndarray | Lengths, packs: int, *, max_len: int, tokens_per_pack: int
) -> Plan:
    """Fill packs with the sequences of the first draw, and return the plan.

    If these sequences fill fewer than `packs` packs, those of the next draws follow them. Such a plan ends with the
    last of these packs.

    Args:
        draws: row numbers of the sequences of each draw, in the order of the packs.
        lengths: number of residues of every row.
    """
    rows = np.empty(0, np.uint32)
    for number, drawn in enumerate(draws):
        rows = np.concatenate([rows, drawn]) if number else drawn
        plan = make_plan(rows, lengths, max_len=max_len, tokens_per_pack=tokens_per_pack)
        if len(plan.starts) > packs:
            return plan if not number else Plan(rows[: plan.starts[packs]], plan.starts[: packs + 1])
    raise ValueError(f"the draws fill fewer than {packs} packs")
