"""Times of messages in two numbers: latency + bytes / bandwidth. No MPI."""

from __future__ import annotations

import numpy as np


def ladder(largest: int) -> list[int]:
    """Sizes of messages in bytes: 1, 4, 16, ... and `largest` (at least 1) itself."""
    sizes = [4**power for power in range(largest.bit_length()) if 4**power < largest]
    return [*sizes, largest]


def fit_line(size: np.ndarray, time: np.ndarray) -> tuple[float, float]:
    """Latency in s and bandwidth in bytes/s, so that latency + size / bandwidth is nearest to `time`.

    Nearest in relative terms (least squares of the relative errors), so that 1 byte counts as much as 64 MiB. Where
    the line would have no meaning (a falling one, a negative start) the measurements at the ends stand in.

    Args:
        size: bytes [S], two different ones at least.
        time: s [S], each above 0.
    """
    ones, sizes = 1 / time, size / time  # a row of the equations divided by its time: the right side is 1
    moments = np.array([[ones @ ones, ones @ sizes], [ones @ sizes, sizes @ sizes]])
    latency, per_byte = np.linalg.solve(moments, [ones.sum(), sizes.sum()])
    least, most = int(size.argmin()), int(size.argmax())
    if latency <= 0:
        latency = time[least]
    bandwidth = 1 / per_byte if per_byte > 0 else size[most] / time[most]
    return float(latency), float(bandwidth)
