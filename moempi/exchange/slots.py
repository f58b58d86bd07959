"""The routing table: which slots a row goes to. Built once from the placement, the same on every rank.

A *cover* is one replica of an expert as dispatch sees it: the slots that together hold all its leaves.
A row goes to every slot of one cover; a whole expert is a cover of one slot.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import numpy as np

from moempi.planning.placement import Placement


@dataclass(frozen=True)
class LayerTable:
    """The S slots of one MoE layer, sorted by rank and then by their number on it.

    Slots are addressed by their place in this order; `number` is what the holding rank calls them.
    """

    layer: int
    n_ranks: int
    rank: np.ndarray  # [S]
    expert: np.ndarray  # [S]
    lo: np.ndarray  # [S] leaves
    hi: np.ndarray  # [S]
    number: np.ndarray  # [S] 0.. on its rank
    rank_begin: np.ndarray  # [N + 1] the slots of rank r are rank_begin[r]:rank_begin[r + 1]
    covers: tuple[tuple[int, ...], ...]  # slots of each cover, by ascending leaves
    cover_of: np.ndarray  # [E, most replicas] cover of (expert, replica)
    n_replicas: np.ndarray  # [E]
    cut: bool  # some cover has several slots; all answers of the layer are then float32

    @cached_property
    def rank_begins(self) -> list[int]:
        """`rank_begin` as a list, of which a loop reads elements several times as fast."""
        return self.rank_begin.tolist()

    def slots_on(self, rank: int) -> int:
        """How many slots a rank holds."""
        return self.rank_begins[rank + 1] - self.rank_begins[rank]

    def choose_covers(self, experts: np.ndarray, sequences: np.ndarray, positions: np.ndarray) -> np.ndarray:
        """Covers [T, K] of routes [T, K]: replicas take turns by (sequence + position + layer).

        The rule sees nothing of queues or layout, so the same token takes the same replica in every run
        with the same placement.
        """
        turn = (sequences + positions + self.layer)[:, None]
        return self.cover_of[experts, turn % self.n_replicas[experts]]

    def load(self, counts: np.ndarray) -> np.ndarray:
        """Pairs of every expert [E], int64, from those of every cover."""
        of_replica = counts[self.cover_of]  # [E, most replicas]
        most = of_replica.shape[1]
        if most == 1:
            return of_replica[:, 0]
        # Behind its last replica an expert has cover 0, which is another's.
        return of_replica.sum(1, where=np.arange(most) < self.n_replicas[:, None])


def answer_itemsize(cut: bool, itemsize: int) -> int:
    """Bytes of a number on its way back: partial sums of cut experts are float32, and with them the whole layer.

    Args:
        cut: of the layer's table.
        itemsize: bytes of a number in the model's dtype.
    """
    return 4 if cut else itemsize


def layer_tables(placement: Placement) -> dict[int, LayerTable]:
    """The table of every MoE layer of a placement that `check_placement` has passed."""
    return {layer: _layer_table(placement, layer) for layer in placement.layers}


def _layer_table(placement: Placement, layer: int) -> LayerTable:
    mine = np.flatnonzero(placement.layer == layer)
    keys = (placement.lo[mine], placement.expert[mine], placement.rank[mine])
    mine = mine[np.lexsort(keys)]
    rank, expert, lo = placement.rank[mine], placement.expert[mine], placement.lo[mine]
    replica = placement.replica[mine]
    begin = np.searchsorted(rank, np.arange(placement.n_ranks + 1))
    groups: dict[tuple[int, int], list[int]] = {}
    for slot in range(len(mine)):
        groups.setdefault((int(expert[slot]), int(replica[slot])), []).append(slot)
    # Numbered by their first slot: where no expert is cut, cover c is slot c.
    ordered = sorted(groups, key=lambda key: min(groups[key]))
    replicas = [sorted(r for e, r in groups if e == wanted) for wanted in range(placement.n_experts)]
    cover_of = np.zeros((placement.n_experts, max(map(len, replicas))), dtype=np.int64)
    for e, known in enumerate(replicas):
        for turn, r in enumerate(known):
            cover_of[e, turn] = ordered.index((e, r))
    return LayerTable(
        layer=layer,
        n_ranks=placement.n_ranks,
        rank=rank,
        expert=expert,
        lo=lo,
        hi=placement.hi[mine],
        number=np.arange(len(mine)) - begin[rank],
        rank_begin=begin,
        covers=tuple(tuple(sorted(groups[key], key=lambda slot: int(lo[slot]))) for key in ordered),
        cover_of=cover_of,
        n_replicas=np.array([len(known) for known in replicas], dtype=np.int64),
        cut=any(len(slots) > 1 for slots in groups.values()),
    )
