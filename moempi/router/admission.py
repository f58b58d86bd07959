"""Admission: which sequence goes to which home. Pure decisions, tested by hand-worked tables."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Literal

from moempi.errors import JobError


def largest_first(work: Mapping[int, int]) -> list[int]:
    """Sequences (rows of the input) by falling work (tokens to prefill and to generate); ties in input order."""
    return sorted(work, key=lambda row: (-work[row], row))


def first_deal(
    queue: Sequence[int], work: Mapping[int, int], homes: Sequence[int], capacity: int
) -> list[tuple[int, int]]:
    """(home, sequence) pairs that the job starts with: each in turn to the home with least work that has room.

    Args:
        queue: sequences in the order in which they are handed out.
        work: of every sequence.
        homes: ranks that take sequences.
        capacity: sequences that a home works on at the same time.
    """
    load = dict.fromkeys(homes, 0)
    held = dict.fromkeys(homes, 0)
    deal = []
    for sequence in queue[: capacity * len(homes)]:
        home = min((h for h in homes if held[h] < capacity), key=lambda h: (load[h], h))
        load[home] += work[sequence]
        held[home] += 1
        deal.append((home, sequence))
    return deal


def home_ranks(policy: str, most: int | Literal["all"], n_ranks: int) -> list[int]:
    """Ranks that take sequences: rank 0 alone for "rank0"; for "balanced" all, or `most` of them, spread evenly.

    Raises:
        JobError: "rank0" with a number of homes.
    """
    if policy == "rank0":
        if most != "all":
            raise JobError(
                f"admission.policy = 'rank0' has one home, rank 0, and admission.homes = {most}: leave homes out, or "
                "use policy = 'balanced'"
            )
        return [0]
    n_homes = n_ranks if most == "all" else min(most, n_ranks)
    return [i * n_ranks // n_homes for i in range(n_homes)]
