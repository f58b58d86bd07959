"""Which experts prefer one kind of prompt?"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from moempi.analysis.trace import Trace


@dataclass(frozen=True)
class Specialist:
    """The expert of a layer that one group of sequences uses most, compared with all other groups."""

    layer: int
    group: str
    expert: int
    share: float  # of the group's tokens x K in this layer
    share_of_others: float  # of all other groups' tokens x K


def load_by_group(trace: Trace, groups: Sequence[str]) -> tuple[list[str], np.ndarray]:
    """Tokens per group, layer and expert: names in order of appearance, int64 [G, L, E]. Needs level routes.

    Args:
        groups: of every sequence, by row of the input.
    """
    names = list(dict.fromkeys(groups))
    number = np.array([names.index(group) for group in groups], dtype=np.int64)
    routes = trace.routes
    experts = routes["experts"].astype(np.int64)  # [rows, K]
    group = number[routes["sequence"]][:, None]
    layer = routes["layer"].astype(np.int64)[:, None]
    place = ((group * trace.n_layers + layer) * trace.n_experts + experts).ravel()
    load = np.bincount(place, minlength=len(names) * trace.n_layers * trace.n_experts)
    return names, load.reshape(len(names), trace.n_layers, trace.n_experts)


def specialists(names: Sequence[str], load: np.ndarray) -> list[Specialist]:
    """For every layer that was used, and each group, the expert whose share differs most from that of the others.

    Args:
        load: tokens per group, layer and expert [G, L, E].
    """
    found = []
    for layer in np.flatnonzero(load.sum(axis=(0, 2))):
        for row, name in enumerate(names):
            own, others = load[row, layer], np.delete(load[:, layer], row, axis=0).sum(axis=0)
            share, rest = own / max(1, own.sum()), others / max(1, others.sum())
            expert = int(np.argmax(share - rest))
            found.append(Specialist(int(layer), name, expert, float(share[expert]), float(rest[expert])))
    return found
