"""Times of messages in two numbers: latency + bytes / bandwidth. No MPI."""

from __future__ import annotations

import numpy as np


def ladder(largest: int) -> list[int]:
    """Sizes of messages in bytes: 1, 4, 16, ... and `largest` (at least 1) itself."""
    sizes = [4**power for power in range(largest.bit_length()) if 4**power < largest]
    return [*sizes, largest]


def latency_and_bandwidth(size: np.ndarray, time: np.ndarray) -> tuple[float, float]:
    """Latency in s and bandwidth in bytes/s of a link.

    The latency is the shortest time: a message of some bytes takes no longer than one byte, and what was measured with
    the least disturbance counts. The bandwidth is what the largest message then needs. The sizes between are left out
    on purpose: there MPI changes its protocol and networks let bursts pass, and a line that is drawn towards them is
    wrong by factors at the ends.

    Args:
        size: bytes [S], two different ones at least.
        time: s [S], each above 0.
    """
    latency, most = float(time.min()), int(size.argmax())
    rest = float(time[most]) - latency
    return latency, float(size[most]) / (rest if rest > 0 else float(time[most]))
