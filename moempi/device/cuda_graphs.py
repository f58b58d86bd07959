"""Kernels that follow each other the same way again and again, launched as one (CUDA graphs).

A launch takes the host some ten microseconds, a graph of any number of them as much. What is recorded are addresses:
work that is run under a key must find its inputs at the same places each time, and leaves its results where the
recorded run did.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Hashable
from typing import Any, TypeVar

import torch

T = TypeVar("T")
SHAPES = 12  # whose graphs are kept; each takes memory of the driver


class Graphs:
    """Recordings of work, by shape and part; the shapes that were used last are kept."""

    def __init__(self) -> None:
        self._shapes: OrderedDict[Hashable, dict[Hashable, tuple[torch.cuda.CUDAGraph, Any] | None]] = OrderedDict()
        self._pool = torch.cuda.graph_pool_handle()

    def run(self, shape: Hashable, part: Hashable, work: Callable[[], T]) -> T:
        """What `work` returns, on the current stream: it runs the first time, is recorded the second, then replayed.

        Tensors among the results are the recording's: the next run of the same shape and part overwrites them.
        """
        parts = self._shapes.setdefault(shape, {})
        self._shapes.move_to_end(shape)
        if part not in parts:
            while len(self._shapes) > SHAPES:
                self._shapes.popitem(last=False)
            parts[part] = None
            return work()
        recorded = parts[part]
        if recorded is None:
            graph = torch.cuda.CUDAGraph()
            # Others may allocate meanwhile: MPI, the tracer's thread.
            graph.capture_begin(self._pool, capture_error_mode="relaxed")
            try:
                result = work()
            finally:
                graph.capture_end()
            recorded = parts[part] = graph, result
        recorded[0].replay()
        return recorded[1]
