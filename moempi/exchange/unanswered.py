"""What a rank waits for, for those who ask why nothing goes on."""

from __future__ import annotations

from typing import NamedTuple


class Unanswered(NamedTuple):
    """A dispatch that has not come back: enough to say who waits for what from whom."""

    since: float  # on the engine's own clock
    layer: int
    microbatch: int
    peer: int
    rows: int
    posted: int  # ns of the recorder's clock
    way: str = ""  # beyond the peer, where that is a relay

    def describe(self, now: float) -> str:
        """Who owes what, and since when; `now` is on the engine's own clock."""
        waits_for = f"layer {self.layer}, microbatch {self.microbatch}, {self.rows} rows"
        return f"rank {self.peer}{self.way}: {waits_for}, {now - self.since:.1f} s"
