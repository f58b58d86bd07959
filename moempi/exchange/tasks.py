"""What a coroutine can wait for in the engine's loop: something to happen, or its next turn."""

from __future__ import annotations

import time
from collections.abc import Callable, Coroutine, Generator
from typing import Any

Task = Coroutine[Any, None, None]


class Future:
    """Becomes done when it has been notified `left` times; one task may wait for it.

    Once it is done, `by` is the rank that was last to do its share (-1: no particular one), `at` is when (ns).

    Args:
        then: called when it is done.
    """

    __slots__ = ("at", "by", "left", "task", "then")

    def __init__(self, left: int = 1, then: Callable[[], None] | None = None):
        self.left, self.then = left, then
        self.by, self.at = -1, 0
        self.task: Task | None = None

    def __await__(self) -> Generator[Future, None, None]:
        if self.left:
            yield self


class Pause:
    """Gives way: the engine looks at the network, serves an expert, and comes back."""

    __slots__ = ()

    def __await__(self) -> Generator[Pause, None, None]:
        yield self


PAUSE = Pause()


class Slicer:
    """How much of a long computation fits between two looks at the network, learnt from what slices took.

    Progress of messages stops while a rank computes, so work is cut into slices of about `seconds`. The size
    of a kind of slice doubles when a full one took less than half of that, and halves when it took more.

    Args:
        seconds: length of a slice.
    """

    # Rows, or tiles of attention. With fewer rows a product is bound by reading its weights.
    LEAST = 64
    FIRST = 256

    def __init__(self, seconds: float):
        self._wanted = int(seconds * 1e9)
        self._sizes: dict[int, int] = {}

    def size(self, kind: int) -> int:
        """Items of a kind of work that the next slice may hold."""
        return self._sizes.get(kind, self.FIRST)

    def learn(self, kind: int, size: int, begin: int) -> int:
        """Note that a slice of `size` items began at `begin` and ended now; returns now (ns)."""
        end = time.perf_counter_ns()
        limit = self.size(kind)
        if size >= limit and 2 * (end - begin) < self._wanted:
            self._sizes[kind] = 2 * limit
        elif end - begin > self._wanted and size > self.LEAST:
            self._sizes[kind] = max(self.LEAST, size // 2)
        return end


class Whole(Slicer):
    """No slices: a GPU computes while the host looks at the network."""

    def __init__(self) -> None:
        super().__init__(1.0)

    def size(self, kind: int) -> int:
        """Everything at once."""
        return 2**62
