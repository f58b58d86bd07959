"""Blocks of one piece of memory that is allocated once: where they lie, and which are free. Integers only."""

from __future__ import annotations

from bisect import insort

ALIGNMENT = 512  # bytes


def aligned(nbytes: int) -> int:
    """Bytes that a block of `nbytes` takes."""
    return -(-max(1, nbytes) // ALIGNMENT) * ALIGNMENT


class Arena:
    """Hands out blocks first fit, and joins what comes back with its free neighbours.

    An arena with nothing handed out is one free block: a request of its whole size is granted once all is back.

    Args:
        begin: offset of the arena in the memory that it divides.
        nbytes: size; rounded up to whole alignments.
    """

    def __init__(self, begin: int, nbytes: int):
        self.begin, self.end = begin, begin + aligned(nbytes)
        self._free = [(self.begin, self.end)]  # ascending, never touching each other
        self._taken: dict[int, int] = {}  # {begin: end}

    @property
    def in_use(self) -> int:
        """Bytes that are handed out."""
        return sum(end - begin for begin, end in self._taken.items())

    def take(self, nbytes: int) -> int | None:
        """Offset of a block of `nbytes`, or None while there is no room.

        Raises:
            ValueError: it would not fit an empty arena either.
        """
        size = aligned(nbytes)
        if size > self.end - self.begin:
            raise ValueError(f"a block of {size} bytes in an arena of {self.end - self.begin}")
        for i, (begin, end) in enumerate(self._free):
            if end - begin >= size:
                self._free[i : i + 1] = [(begin + size, end)] if end - begin > size else []
                self._taken[begin] = begin + size
                return begin
        return None

    def give(self, begin: int) -> None:
        """Take a block back.

        Raises:
            KeyError: no block that is handed out begins there.
        """
        insort(self._free, (begin, self._taken.pop(begin)))
        joined: list[tuple[int, int]] = []
        for lo, hi in self._free:
            if joined and joined[-1][1] == lo:
                joined[-1] = (joined[-1][0], hi)
            else:
                joined.append((lo, hi))
        self._free = joined
