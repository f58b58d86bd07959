"""Which rank holds which expert: the table of slots, its rules, and the strategies that fill it.

Letters: L MoE layers, E experts, N ranks, S slots. Everything here is a pure function of integers and loads;
nothing imports MPI or torch. Equal arguments give equal tables on every rank and machine: ties go to the
lowest index, and random numbers come from the raw stream of a counter-based generator.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from moempi.errors import DataError, FitError, JobError
from moempi.job import PlacementOptions
from moempi.model.config import ModelConfig
from moempi.planning.packing import balanced_layer, extra_copies, held_load, linear_layer, random_layer, seat

COLUMNS = ("layer", "expert", "replica", "lo", "hi", "rank")
# A slot more on every rank must lower the load of the fullest rank by this share.
_WORTHWHILE = 0.02


@dataclass(frozen=True, eq=False)
class Placement:
    """The table of slots, sorted by (layer, rank, expert, lo); columns are int32 [S] and read-only.

    A slot is the hidden range `lo:hi`, in leaves, of one replica of an expert on one rank. A replica is a set of
    slots whose ranges partition 0:leaves; each range is a whole subtree of the binary tree over the leaves.
    No rank holds two slots of one expert in one layer. Replicas of an expert are numbered from 0.
    """

    n_ranks: int
    n_experts: int
    leaves: int
    layers: tuple[int, ...]  # the MoE layers, ascending
    layer: np.ndarray
    expert: np.ndarray
    replica: np.ndarray
    lo: np.ndarray
    hi: np.ndarray
    rank: np.ndarray

    @classmethod
    def from_slots(
        cls, n_ranks: int, n_experts: int, leaves: int, layers: tuple[int, ...], slots: Mapping[str, Any]
    ) -> Placement:
        """A table from columns in any order of rows: {name of COLUMNS: integers [S]}. Sorts; checks nothing."""
        columns = {name: np.array(slots[name], dtype=np.int32) for name in COLUMNS}
        order = np.lexsort([columns[name] for name in ("replica", "lo", "expert", "rank", "layer")])
        for name in COLUMNS:
            columns[name] = columns[name][order]
            columns[name].flags.writeable = False
        return cls(n_ranks, n_experts, leaves, tuple(layers), **columns)

    def slots(self) -> dict[str, np.ndarray]:
        """The columns by name: {name of COLUMNS: int32 [S]}."""
        return {name: getattr(self, name) for name in COLUMNS}

    def shape(self) -> tuple[int, int, int, tuple[int, ...]]:
        """(n_ranks, n_experts, leaves, layers)."""
        return self.n_ranks, self.n_experts, self.leaves, self.layers

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Placement):
            return NotImplemented
        same = all(np.array_equal(getattr(self, name), getattr(other, name)) for name in COLUMNS)
        return same and self.shape() == other.shape()

    __hash__ = None  # type: ignore[assignment]


# ---------------------------------------------------------------- the rules of the table


def check_placement(placement: Placement) -> None:
    """Check every rule of the table; memory and time are those of a few sorts of S rows.

    Raises:
        DataError: naming layer and expert of the first slot that breaks a rule, and the rule.
    """
    _check_shape(placement)
    _check_values(placement)
    _check_order(placement)
    _check_cover(placement)
    _check_complete(placement)


def _check_shape(placement: Placement) -> None:
    for name in ("n_ranks", "n_experts", "leaves"):
        if getattr(placement, name) < 1:
            raise DataError(f"placement: {name} = {getattr(placement, name)}; expected at least 1")
    if placement.leaves & (placement.leaves - 1):
        raise DataError(f"placement: leaves = {placement.leaves}; expected a power of two")
    if placement.layers != tuple(sorted(set(placement.layers))):
        raise DataError(f"placement: layers {placement.layers} must rise")
    lengths = {name: column.shape for name, column in placement.slots().items()}
    if len(set(lengths.values())) != 1 or placement.layer.ndim != 1:
        raise DataError(f"placement: columns of shapes {lengths}; expected one length for all")


def _refuse(placement: Placement, bad: np.ndarray, problem: str) -> None:
    """Raise for the first True of `bad` [S]; `problem` may use the slot's columns and the table's counts."""
    if bad.any():
        row = int(np.argmax(bad))
        slot = {name: int(column[row]) for name, column in placement.slots().items()}
        text = problem.format(**slot, leaves=placement.leaves, n_ranks=placement.n_ranks, n_experts=placement.n_experts)
        raise DataError(f"placement: layer {slot['layer']}, expert {slot['expert']}: {text}")


def _check_values(placement: Placement) -> None:
    p = placement
    lo, hi = p.lo.astype(np.int64), p.hi.astype(np.int64)
    _refuse(p, ~np.isin(p.layer, p.layers), "the table names no such MoE layer")
    _refuse(p, (p.expert < 0) | (p.expert >= p.n_experts), "there are only {n_experts} experts, counted from 0")
    _refuse(p, (p.rank < 0) | (p.rank >= p.n_ranks), "rank {rank} is out of range; there are {n_ranks} ranks")
    _refuse(p, (lo < 0) | (lo >= hi) | (hi > p.leaves), "range {lo}:{hi} is not a part of 0:{leaves}")
    size = hi - lo
    _refuse(p, (size & (size - 1) != 0) | (lo % size != 0), "range {lo}:{hi} is unaligned: no whole subtree of leaves")


def _check_order(placement: Placement) -> None:
    p = placement
    order = np.lexsort([p.lo, p.expert, p.rank, p.layer])
    _refuse(p, order != np.arange(len(order)), "slots must be sorted by layer, rank, expert and lo")
    twice = np.zeros(len(order), dtype=bool)
    twice[1:] = (np.diff(p.layer) == 0) & (np.diff(p.rank) == 0) & (np.diff(p.expert) == 0)
    _refuse(p, twice, "twice on rank {rank}; a rank holds at most one slot of an expert")


def _check_cover(placement: Placement) -> None:
    order = np.lexsort([placement.lo, placement.replica, placement.expert, placement.layer])
    by_replica = Placement(*placement.shape(), *(column[order] for column in placement.slots().values()))
    layer, expert, replica, lo, hi, _ = by_replica.slots().values()
    starts_expert = np.ones(len(order), dtype=bool)
    starts_expert[1:] = (layer[1:] != layer[:-1]) | (expert[1:] != expert[:-1])
    starts = starts_expert.copy()
    starts[1:] |= replica[1:] != replica[:-1]
    # Replicas count up from 0, so that a rule may choose one by its number.
    expected = np.where(starts_expert, 0, np.roll(replica, 1) + starts)
    _refuse(by_replica, replica != expected, "replica {replica}: replicas must be numbered 0, 1, 2, … without a gap")
    before = np.where(starts, 0, np.roll(hi, 1))
    _refuse(by_replica, lo < before, "overlap: replica {replica} holds leaf {lo} twice")
    _refuse(by_replica, lo > before, "hole: replica {replica} holds nothing just before leaf {lo}")
    ends = np.roll(starts, -1)
    _refuse(by_replica, ends & (hi != placement.leaves), "hole: replica {replica} ends at leaf {hi} of {leaves}")


def _check_complete(placement: Placement) -> None:
    index = np.searchsorted(np.asarray(placement.layers, dtype=np.int64), placement.layer)
    present = np.unique(index * placement.n_experts + placement.expert)
    if len(present) < len(placement.layers) * placement.n_experts:
        gap = present != np.arange(len(present))
        missing = int(np.argmax(gap)) if gap.any() else len(present)
        layer, expert = divmod(missing, placement.n_experts)
        raise DataError(f"placement: layer {placement.layers[layer]}, expert {expert}: missing; no rank holds it")


def check_strict(placement: Placement, options: PlacementOptions) -> None:
    """Hold `placement.strict`: at most one slot per rank and layer. Without the option nothing is checked.

    Raises:
        FitError: naming layer, rank, slots and the ways out.
    """
    if not options.strict or len(placement.layer) == 0:
        return
    held = np.unique(np.stack([placement.layer, placement.rank]), axis=1, return_counts=True)
    worst = int(np.argmax(held[1]))
    (layer, rank), most = held[0][:, worst], int(held[1][worst])
    if most <= 1:
        return
    from_file = options.strategy == "file"
    extra = options.replicas if isinstance(options.replicas, int) and not from_file else 0
    way = "use another placement file" if from_file else f"use {placement.n_experts + extra} ranks"
    more = f" and {extra} extra slots" if extra else ""
    raise FitError(
        f"layer {layer}: E = {placement.n_experts} experts{more} on N = {placement.n_ranks} ranks need {most} slots "
        f"per rank and layer (rank {rank}); placement.strict allows 1; {way} or placement.strict = false"
    )


# ---------------------------------------------------------------- placing


def place(
    config: ModelConfig,
    n_ranks: int,
    options: PlacementOptions,
    leaves: int,
    load: np.ndarray | None = None,
    slot_limit: int | None = None,
) -> Placement:
    """Place the whole experts of every MoE layer by `options.strategy` (not "file": read that with its own reader).

    Slots per rank of a layer differ by at most one; under `balanced` and `random` so do a rank's slots over all layers.

    Args:
        load: rows per expert [L, E], finite and not negative; None, or a layer of zeros: all experts alike.
        slot_limit: most slots that a rank's memory takes, over all layers; None: no limit.

    Raises:
        FitError: too few ranks or too little memory, or `placement.strict` broken.
        DataError: `load` is of another shape, not finite or negative.
    """
    layers, n_experts = config.moe_layers, config.n_experts
    loads = _checked_load(load, len(layers), n_experts)
    extra, at_most = _extra_slots(options, n_experts, n_ranks, len(layers), slot_limit)
    placement = _deal(options, n_ranks, leaves, layers, loads, extra)
    # More copies than even slots need are worth their memory only where the load, and the room for them, is known.
    if options.replicas == "auto" and load is not None and slot_limit is not None and n_experts > n_ranks:
        placement = _even_out(options, placement, loads, extra, at_most)
    check_strict(placement, options)
    return placement


def _even_out(
    options: PlacementOptions, placement: Placement, loads: np.ndarray, extra: int, at_most: int
) -> Placement:
    """The placement with a slot more per rank and layer, as often as that evens the load out by `_WORTHWHILE`."""
    n_ranks = placement.n_ranks
    uneven = float(max_over_mean(rank_load(placement, loads)).mean())
    while not options.strict and extra + n_ranks <= at_most:
        extra += n_ranks
        more = _deal(options, n_ranks, placement.leaves, placement.layers, loads, extra)
        now = float(max_over_mean(rank_load(more, loads)).mean())
        if now > uneven * (1 - _WORTHWHILE):
            break
        placement, uneven = more, now
    return placement


def _deal(
    options: PlacementOptions, n_ranks: int, leaves: int, layers: tuple[int, ...], loads: np.ndarray, extra: int
) -> Placement:
    """The whole experts of every layer, with `extra` copies of the busiest in each."""
    n_experts = loads.shape[1]
    total_slots, total_load = np.zeros(n_ranks, dtype=np.int64), np.zeros(n_ranks)
    held = []
    for layer, rows in zip(layers, loads, strict=True):
        copies = extra_copies(rows, extra, n_ranks)
        holds = _deal_layer(options, layer, rows, copies, total_slots, total_load)
        total_slots += holds.sum(axis=1)
        total_load += held_load(holds, rows / (1 + np.bincount(copies, minlength=n_experts)))
        held.append(holds)
    return _whole_slots(held, n_ranks, n_experts, leaves, layers)


def _deal_layer(
    options: PlacementOptions,
    layer: int,
    rows: np.ndarray,
    copies: np.ndarray,
    total_slots: np.ndarray,
    total_load: np.ndarray,
) -> np.ndarray:
    """Which rank holds which expert of a layer, bool [N, E], after layers that gave the ranks these totals [N]."""
    n_experts, n_ranks = len(rows), len(total_slots)
    if options.strategy == "linear":
        return linear_layer(n_experts, n_ranks, copies)
    if options.strategy == "balanced":
        weight = rows / (1 + np.bincount(copies, minlength=n_experts))
        return seat(balanced_layer(n_ranks, copies, weight), weight, total_slots, total_load)
    if options.strategy == "random":
        holds = random_layer(n_experts, n_ranks, copies, options.seed, layer)
        return seat(holds, np.zeros(n_experts), total_slots, np.zeros(n_ranks))
    raise ValueError(f"place() knows no strategy {options.strategy!r}; a placement file is read, not placed")


def _checked_load(load: np.ndarray | None, n_layers: int, n_experts: int) -> np.ndarray:
    if load is None:
        return np.ones((n_layers, n_experts))
    found = np.asarray(load)
    if found.shape != (n_layers, n_experts) or found.dtype.kind not in "iuf":
        raise DataError(
            f"load: {found.dtype} of shape {found.shape}; the model has {n_layers} MoE layers of {n_experts} experts"
        )
    loads = found.astype(np.float64)
    if not np.isfinite(loads.sum()) or (loads < 0).any():
        raise DataError("load: every value must be finite and not negative")
    return loads


def _extra_slots(
    options: PlacementOptions, n_experts: int, n_ranks: int, n_layers: int, slot_limit: int | None
) -> tuple[int, int]:
    """(slots of a layer beyond one per expert, the most that there is room for); FitError where they can't be had."""
    at_most = n_experts * n_ranks
    if slot_limit is not None and n_layers:
        # Linear gives the odd slots of every layer to the same ranks; the others spread them over the ranks.
        linear = options.strategy == "linear"
        at_most = min(at_most, n_ranks * (slot_limit // n_layers) if linear else n_ranks * slot_limit // n_layers)
    wanted = 0 if options.replicas == "auto" else int(options.replicas)
    slots = n_experts + wanted
    if slots > n_experts * n_ranks:
        raise FitError(
            f"placement.replicas = {wanted}: E = {n_experts} experts on N = {n_ranks} ranks take at most "
            f"{n_experts * (n_ranks - 1)} extra slots per layer, one of an expert per rank"
        )
    if slots > at_most:
        raise FitError(_no_room(options, slots, n_ranks, n_layers, slot_limit or 0))
    room = at_most - n_experts
    return min(-n_experts % n_ranks, room) if options.replicas == "auto" else wanted, room


def _no_room(options: PlacementOptions, slots: int, n_ranks: int, n_layers: int, slot_limit: int) -> str:
    spread = -(-slots * n_layers // n_ranks)
    linear_needs = n_layers * -(-slots // n_ranks)
    is_linear = options.strategy == "linear"
    per_layer = slot_limit // n_layers if is_linear else slot_limit / n_layers
    ways = [f"use at least {math.ceil(slots / per_layer)} ranks"] if per_layer else []
    ways += ["use placement.strategy = 'balanced', which spreads odd slots evenly"] if spread <= slot_limit else []
    ways += ["ask for fewer placement.replicas"] if options.replicas not in ("auto", 0) else []
    return (
        f"{slots} slots in each of {n_layers} layers on N = {n_ranks} ranks need "
        f"{linear_needs if is_linear else spread} slots on a rank; memory.limit has room for {slot_limit}; "
        f"{', or '.join([*ways, 'raise memory.limit'])}"
    )


def _whole_slots(
    held: list[np.ndarray], n_ranks: int, n_experts: int, leaves: int, layers: tuple[int, ...]
) -> Placement:
    """The table of layers given as bool [N, E]; an expert's replicas are numbered by rank."""
    rows: list[np.ndarray] = []
    for layer, holds in zip(layers, held, strict=True):
        rank, expert = np.nonzero(holds)
        replica = np.cumsum(holds, axis=0)[rank, expert] - 1
        rows.append(np.stack([np.full_like(rank, layer), expert, replica, 0 * rank, 0 * rank + leaves, rank]))
    table = np.concatenate(rows, axis=1) if rows else np.zeros((len(COLUMNS), 0), dtype=np.int64)
    return Placement.from_slots(n_ranks, n_experts, leaves, layers, dict(zip(COLUMNS, table, strict=True)))


# ---------------------------------------------------------------- cutting and measuring


def cut_expert(placement: Placement, layer: int, expert: int, pieces: list[int], replica: int = 0) -> Placement:
    """Cut a whole slot into `len(pieces)` equal hidden ranges, in order on the ranks `pieces`; one piece moves it.

    Raises:
        JobError: the number of pieces is no power of two or more than `leaves`, or there is no such whole slot.
        DataError: a rank is out of range or holds the expert already.
    """
    n = len(pieces)
    if n < 1 or n & (n - 1) or n > placement.leaves:
        raise JobError(f"a cut into {n} pieces: expected a power of two, at most model.leaves = {placement.leaves}")
    p = placement
    cut = (p.layer == layer) & (p.expert == expert) & (p.replica == replica) & (p.hi - p.lo == p.leaves)
    if not cut.any():
        raise JobError(f"layer {layer}, expert {expert}: there is no whole slot of replica {replica} to cut")
    lo = np.arange(n) * (p.leaves // n)
    new: dict[str, Any] = {"layer": [layer] * n, "expert": [expert] * n, "replica": [replica] * n, "rank": pieces}
    new |= {"lo": lo, "hi": lo + p.leaves // n}
    slots = {name: np.concatenate([column[~cut], new[name]]) for name, column in p.slots().items()}
    result = Placement.from_slots(*p.shape(), slots)
    check_placement(result)
    return result


def replica_counts(placement: Placement) -> np.ndarray:
    """Replicas of every expert, int64 [L, E]."""
    counts = np.zeros((len(placement.layers), placement.n_experts), dtype=np.int64)
    first = placement.lo == 0
    np.add.at(counts, (np.searchsorted(placement.layers, placement.layer[first]), placement.expert[first]), 1)
    return counts


def rank_load(placement: Placement, load: np.ndarray) -> np.ndarray:
    """Rows that every rank receives, float64 [L, N], where replicas share the load [L, E] evenly.

    Each piece of a cut expert receives all rows of its replica.
    """
    layer = np.searchsorted(placement.layers, placement.layer)
    share = np.asarray(load, dtype=np.float64) / replica_counts(placement)
    rows = np.zeros((len(placement.layers), placement.n_ranks))
    np.add.at(rows, (layer, placement.rank), share[layer, placement.expert])
    return rows


def max_over_mean(rows: np.ndarray) -> np.ndarray:
    """Load of the fullest rank over the mean of all ranks, per layer: [L, N] -> [L]; 1 where there is no load."""
    mean = rows.mean(axis=1)
    return np.divide(rows.max(axis=1), mean, out=np.ones(len(rows)), where=mean > 0)
