"""How evenly are the experts used?"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from moempi.analysis.trace import Trace


@dataclass(frozen=True)
class Busiest:
    """The expert of a layer that most tokens went to."""

    layer: int
    expert: int  # the lowest, where several are as busy
    tokens: int
    share: float  # of all tokens of the layer, each counted once per expert; 1 / E where all are used alike


def load_per_expert(trace: Trace) -> np.ndarray:
    """Tokens per layer and expert, int64 [L, E]; rows of layers without experts are 0."""
    return trace.load


def busiest_per_layer(trace: Trace) -> list[Busiest]:
    """The busiest expert of every layer that tokens went through, by rising layer."""
    load = trace.load
    expert = load.argmax(axis=1)
    return [
        Busiest(int(layer), int(expert[layer]), int(load[layer].max()), float(load[layer].max() / load[layer].sum()))
        for layer in np.flatnonzero(load.sum(axis=1))
    ]


def busiest(trace: Trace) -> Busiest | None:
    """The expert with the largest share of its layer's tokens; None where nothing was routed."""
    return max(busiest_per_layer(trace), key=lambda one: one.share, default=None)


def max_over_mean(trace: Trace) -> np.ndarray:
    """Tokens of the busiest expert / mean tokens per expert, float64 [L]; 1 is even, nan where nothing was routed."""
    load = trace.load.astype(np.float64)
    total = load.sum(axis=1)
    return load.max(axis=1, initial=0) * trace.n_experts / np.where(total > 0, total, np.nan)
