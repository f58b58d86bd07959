"""Dealing the slots of one MoE layer to ranks: arrays in, arrays out.

A layer is `holds`, bool [N, E]: which rank holds which expert; E experts, N ranks, S slots, all of them whole experts.
Slots per rank always differ by at most one. Equal arguments give equal layers on every rank and machine: ties go
to the lowest index, and random numbers come from the raw stream of a counter-based generator.
"""

from __future__ import annotations

import heapq
import math

import numpy as np

# Local search over a packed layer ends this close to its lower bound, or after this many swaps.
_CLOSE = 1.01
_MOST_SWAPS = 200


def extra_copies(load: np.ndarray, extra: int, n_ranks: int) -> np.ndarray:
    """The experts that the extra slots of a layer copy, int64 [extra], in the order in which they are chosen.

    Each time it is the expert with the highest load (rows [E]) per copy that is not on every rank yet;
    `extra` is at most E x (N - 1).
    """
    # Among equal loads (zeros too) the fewest copies come first, so that copies go round.
    heap = [(-value, 1, expert) for expert, value in enumerate(load.tolist()) if n_ranks > 1]
    heapq.heapify(heap)
    chosen: list[int] = []
    while len(chosen) < extra:
        _, copies, expert = heapq.heappop(heap)
        chosen.append(expert)
        if copies + 1 < n_ranks:
            heapq.heappush(heap, (-float(load[expert]) / (copies + 1), copies + 1, expert))
    return np.array(chosen, dtype=np.int64)


def held_load(holds: np.ndarray, weight: np.ndarray) -> np.ndarray:
    """Load of every rank, float64 [N], of a layer [N, E] whose copies weigh `weight` [E]."""
    # Not a matrix product: its rounding differs from processor to processor, and ranks may plan on unlike ones.
    rank, expert = np.nonzero(holds)
    return np.bincount(rank, weights=weight[expert], minlength=len(holds))


class _Bins:
    """The ranks of one layer while slots are dealt to them; none ever holds two copies of an expert."""

    def __init__(self, n_ranks: int, weight: np.ndarray) -> None:
        self.weight = weight  # [E], the load of one copy
        self.holds = np.zeros((n_ranks, len(weight)), dtype=bool)  # [N, E]
        self.count = np.zeros(n_ranks, dtype=np.int64)
        self.load = np.zeros(n_ranks)

    def add(self, rank: int, expert: int) -> None:
        self.holds[rank, expert] = True
        self.count[rank] += 1
        self.load[rank] += self.weight[expert]

    def drop(self, rank: int, expert: int) -> None:
        self.holds[rank, expert] = False
        self.count[rank] -= 1
        self.load[rank] -= self.weight[expert]

    def fewest(self) -> np.ndarray:
        """Ranks [N] that may take a slot when slots go round."""
        return np.asarray(self.count == self.count.min())

    def within(self, slots: int) -> np.ndarray:
        """Ranks [N] that may take a slot where `slots` in all must end with counts that differ by at most one."""
        floor, odd = divmod(slots, len(self.count))
        odd_left = np.count_nonzero(self.count > floor) < odd
        return self.count < floor + odd_left

    def deal(self, expert: int, takers: np.ndarray) -> None:
        """Give a copy of `expert` to the least loaded of `takers` (bool [N]), then fewest slots, then lowest rank."""
        free = np.flatnonzero(takers & ~self.holds[:, expert])
        if len(free) == 0:
            self._swap_in(expert, takers)
            return
        lightest = free[self.load[free] == self.load[free].min()]
        self.add(int(lightest[np.argmin(self.count[lightest])]), expert)

    def _swap_in(self, expert: int, takers: np.ndarray) -> None:
        # All takers hold the expert already. Some rank doesn't, and holds more slots than a taker: so it has one
        # that the taker lacks. That one moves to the taker, and the copy takes its place.
        taker = int(np.flatnonzero(takers)[np.argmin(self.load[takers])])
        givers, movable = np.nonzero(self.holds & ~self.holds[taker] & ~self.holds[:, [expert]])
        weight = self.weight[movable]
        after = np.maximum(self.load[taker] + weight, self.load[givers] - weight + self.weight[expert])
        best = int(np.argmin(after))
        giver, moved = int(givers[best]), int(movable[best])
        self.drop(giver, moved)
        self.add(taker, moved)
        self.add(giver, expert)


def linear_layer(n_experts: int, n_ranks: int, copies: np.ndarray) -> np.ndarray:
    """Contiguous blocks, or expert e on rank e; the copies go to the ranks with the fewest slots, lowest first."""
    bins = _Bins(n_ranks, np.zeros(n_experts))
    for expert in range(n_experts):
        bins.add(expert * n_ranks // n_experts if n_experts >= n_ranks else expert, expert)
    for expert in copies.tolist():
        bins.deal(expert, bins.fewest())
    return bins.holds


def random_layer(n_experts: int, n_ranks: int, copies: np.ndarray, seed: int, layer: int) -> np.ndarray:
    """Slots in a random order, dealt round to the ranks, which are then renumbered at random."""
    stream = np.random.Philox(key=np.array([seed % 2**64, layer], dtype=np.uint64))
    bins = _Bins(n_ranks, np.zeros(n_experts))
    experts = np.concatenate([np.arange(n_experts), copies])
    for index in np.argsort(stream.random_raw(len(experts)), kind="stable"):
        bins.deal(int(experts[index]), bins.fewest())
    return bins.holds[np.argsort(stream.random_raw(n_ranks), kind="stable")]


def balanced_layer(n_ranks: int, copies: np.ndarray, weight: np.ndarray) -> np.ndarray:
    """Heaviest copy first to the least loaded rank, then swaps; linear blocks where those are better."""
    n_experts = len(weight)
    number = 1 + np.bincount(copies, minlength=n_experts)
    bins = _Bins(n_ranks, weight)
    for expert in np.argsort(-weight, kind="stable"):
        for _ in range(number[expert]):
            bins.deal(int(expert), bins.within(n_experts + len(copies)))
    packed = _improve(bins.holds, weight)
    blocks = linear_layer(n_experts, n_ranks, copies)
    return blocks if held_load(blocks, weight).max() < held_load(packed, weight).max() else packed


def _improve(holds: np.ndarray, weight: np.ndarray) -> np.ndarray:
    """Swap slots of the fullest rank against lighter ones of others while that lowers its load."""
    count = holds.sum(axis=1)
    # An empty place counts as a copy of one more, weightless expert: a swap with it is a move, and since no
    # rank takes two of them, counts go on differing by at most one.
    holds = np.concatenate([holds, (count < count.max())[:, None]], axis=1)
    weight = np.append(weight, 0.0)
    for _ in range(_MOST_SWAPS):
        load = held_load(holds, weight)
        fullest = int(np.argmax(load))
        if load[fullest] <= _CLOSE * max(math.fsum(load) / len(load), weight.max()):
            break
        swap = _best_swap(holds, weight, load, fullest)
        if swap is None:
            break
        mine, other, theirs = swap
        holds[fullest, [mine, theirs]] = False, True
        holds[other, [mine, theirs]] = True, False
    return holds[:, :-1]


def _best_swap(holds: np.ndarray, weight: np.ndarray, load: np.ndarray, fullest: int) -> tuple[int, int, int] | None:
    """(its expert, other rank, that one's expert): the swap that lowers the fullest rank's load most evenly."""
    mine = np.flatnonzero(holds[fullest])  # [C]
    other, theirs = np.nonzero(holds & ~holds[fullest])  # [P]
    if len(other) == 0:
        return None
    shift = weight[mine][:, None] - weight[theirs]  # [C, P]
    after = np.maximum(load[fullest] - shift, load[other] + shift)
    after[holds[other][:, mine].T] = np.inf
    best = np.unravel_index(int(np.argmin(after)), after.shape)
    # The margin keeps rounding from passing for progress.
    if not after[best] < load[fullest] * (1 - 1e-12):
        return None
    return int(mine[best[0]]), int(other[best[1]]), int(theirs[best[1]])


def seat(holds: np.ndarray, weight: np.ndarray, total_slots: np.ndarray, total_load: np.ndarray) -> np.ndarray:
    """Renumber a layer's ranks so that over all layers slots stay even, and load as even as that allows."""
    bins = np.lexsort([-held_load(holds, weight), -holds.sum(axis=1)])
    ranks = np.lexsort([total_load, total_slots])
    seated = np.empty_like(holds)
    seated[ranks] = holds[bins]
    return seated
