"""A budget of bytes: what is under way may hold so many, and not more."""

from __future__ import annotations


class Account:
    """Bytes held by messages of one kind on one rank.

    An empty account takes any message: a budget below the largest one slows a run and does not stop it.

    Args:
        limit: bytes that may be held at once.
    """

    def __init__(self, limit: int):
        self.limit, self.held = limit, 0

    def take(self, nbytes: int) -> bool:
        """Hold so many more bytes if there is room; whether there was."""
        if self.held and self.held + nbytes > self.limit:
            return False
        self.held += nbytes
        return True

    def give(self, nbytes: int) -> None:
        """Let go of bytes that were taken."""
        self.held -= nbytes
