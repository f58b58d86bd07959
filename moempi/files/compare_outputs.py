"""Are two outputs the same, bit for bit?"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from moempi.files.outputs import Outputs


@dataclass(frozen=True)
class Difference:
    """The first new token at which a sequence of two outputs differs."""

    id: str
    position: int  # among the new tokens; where one output has fewer, its end
    what: str  # token, logprob or length


def compare(a: Outputs, b: Outputs) -> tuple[list[Difference], list[str]]:
    """Differences of the sequences that both have, one each, and the ids that only one has.

    Log-probabilities are compared by their bits.
    """
    rows = {name: row for row, name in enumerate(b.ids)}
    both = [(row, rows[name]) for row, name in enumerate(a.ids) if name in rows]
    found = [_first_difference(a, row, b, other) for row, other in both]
    return [one for one in found if one is not None], sorted(set(a.ids) ^ set(b.ids))


def _first_difference(a: Outputs, row: int, b: Outputs, other: int) -> Difference | None:
    mine, theirs = slice(*a.offsets[row : row + 2]), slice(*b.offsets[other : other + 2])
    n = min(mine.stop - mine.start, theirs.stop - theirs.start)
    for what, left, right in (
        ("token", a.tokens[mine][:n], b.tokens[theirs][:n]),
        ("logprob", a.logprobs[mine][:n].view(np.uint32), b.logprobs[theirs][:n].view(np.uint32)),
    ):
        unequal = np.flatnonzero(left != right)
        if len(unequal):
            return Difference(a.ids[row], int(unequal[0]), what)
    lengths = (mine.stop - mine.start, theirs.stop - theirs.start)
    return Difference(a.ids[row], n, "length") if lengths[0] != lengths[1] else None
