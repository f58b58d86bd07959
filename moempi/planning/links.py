"""Measured links between ranks: what a message takes, by whether it stays on its node."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from moempi.exchange.nodes import Nodes


@dataclass(frozen=True)
class Links:
    """One row for every pair of ranks that was measured."""

    source: np.ndarray  # int [P]
    destination: np.ndarray  # int [P]
    latency: np.ndarray  # float [P] s, one way, of the smallest message
    bandwidth: np.ndarray  # float [P] bytes/s, of large messages
    oversubscription: float = 1.0  # seconds that a second of a rank's computing takes while all ranks compute


@dataclass(frozen=True)
class Link:
    """A kind of link: medians over its pairs of ranks."""

    latency: float  # s
    bandwidth: float  # bytes/s


def within_and_between(links: Links, nodes: Nodes) -> tuple[Link | None, Link | None]:
    """The usual link inside a node, and between two; None where none of the kind was measured."""
    of = np.array(nodes.of)
    known = (links.source < nodes.n_ranks) & (links.destination < nodes.n_ranks)
    source, destination = links.source[known], links.destination[known]
    latency, bandwidth = links.latency[known], links.bandwidth[known]
    same = of[source] == of[destination]

    def usual(chosen: np.ndarray) -> Link | None:
        chosen = chosen & (source != destination)
        return Link(float(np.median(latency[chosen])), float(np.median(bandwidth[chosen]))) if chosen.any() else None

    return usual(same), usual(~same)
