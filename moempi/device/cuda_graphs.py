"""Kernels that follow each other the same way again and again, launched as one (CUDA graphs).

A launch takes the host some ten microseconds, a graph of any number of them as much. What is recorded are addresses:
work that is run under a key must find its inputs at the same places each time, and leaves its results where the
recorded run did.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Hashable
from contextlib import suppress
from typing import Any, NamedTuple, TypeVar

import torch

from moempi.planning.gpu_memory import GRAPH_SHAPES

T = TypeVar("T")


class Graphs:
    """Recordings of work, by shape and part; the shapes that were used last are kept.

    Args:
        shapes: so many.
    """

    def __init__(self, shapes: int = GRAPH_SHAPES) -> None:
        self._kept = shapes
        self._shapes: OrderedDict[Hashable, dict[Hashable, _Recording | None]] = OrderedDict()
        self._pool: Any = None

    def run(self, shape: Hashable, part: Hashable, work: Callable[[], T]) -> T:
        """What `work` returns, on the current stream: it runs the first time, is recorded the second, then replayed.

        Tensors among the results are the recording's: the next run of the same shape and part overwrites them.
        """
        parts = self._shapes.setdefault(shape, {})
        self._shapes.move_to_end(shape)
        while len(self._shapes) > self._kept:
            self._shapes.popitem(last=False)
        if part not in parts:
            parts[part] = None
            return work()
        recorded = parts[part] or self._record(work)
        parts[part] = recorded
        if recorded.graph is None:
            return work()
        recorded.graph.replay()
        result: T = recorded.result
        return result

    def _record(self, work: Callable[[], Any]) -> _Recording:
        if not any(one and one.graph for parts in self._shapes.values() for one in parts.values()):
            # A pool of memory ends with its last recording.
            self._pool = torch.cuda.graph_pool_handle()
        graph = torch.cuda.CUDAGraph()
        # Others may allocate meanwhile: MPI, the tracer's thread.
        graph.capture_begin(self._pool, capture_error_mode="relaxed")
        try:
            result = work()
        except torch.OutOfMemoryError:
            # While it records, torch gives nothing back of what it keeps in store: this work is done without.
            with suppress(RuntimeError):
                graph.capture_end()
            return _Recording(None, None)
        except BaseException:
            with suppress(RuntimeError):
                graph.capture_end()
            raise
        graph.capture_end()
        return _Recording(graph, result)


class _Recording(NamedTuple):
    """A graph and what the recorded work returned; no graph where there was no memory for it."""

    graph: torch.cuda.CUDAGraph | None
    result: Any
