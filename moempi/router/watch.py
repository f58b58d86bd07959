"""Who is still there: ranks send the router a sign of life, so that one that falls silent ends the job.

An unanswered dispatch shows only an expert that fell silent. A rank without experts, or one that all others
wait for in a collective operation, is missed by nobody else. Signs are sent synchronously: that one arrives
shows the router that the rank is there, that one is taken shows the rank that the router is.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

from moempi.errors import StallError
from moempi.router.messages import Alive, Left

if TYPE_CHECKING:
    from moempi.router.control import Control

SIGNS_PER_TIMEOUT = 5
# Seconds. Signs carry what the progress shows, so they come often; those of many ranks less often, to spare the router.
LONGEST_INTERVAL = 10.0
INTERVAL_PER_RANK = 0.01
SHORTEST_INTERVAL = 1.0


class Watch:
    """Sends this rank's signs of life; on rank 0 misses those of the others.

    Args:
        timeout: seconds of silence that end the job; the interval between two signs comes on top.
        now: a clock (s) that goes on by no more than a second while the process is suspended.
        waiting: what this rank waits for, in words; empty when it waits for no answer.
        tokens: how many new tokens this rank's home has made.
    """

    def __init__(
        self,
        control: Control,
        n_ranks: int,
        timeout: float,
        now: Callable[[], float],
        waiting: Callable[[], str],
        tokens: Callable[[], int] = lambda: 0,
    ):
        self._control, self._timeout, self._now, self._waiting = control, timeout, now, waiting
        self._tokens, self._told = tokens, [0] * n_ranks
        often = min(max(SHORTEST_INTERVAL, INTERVAL_PER_RANK * n_ranks), LONGEST_INTERVAL)
        self._interval = min(timeout / SIGNS_PER_TIMEOUT, often)
        router = control.rank == 0
        self._heard = dict.fromkeys(range(1, n_ranks), now()) if router else {}
        self._said: dict[int, str] = {}  # what each rank waited for at its last sign
        self._left = router  # no sign is due any more
        self._sent, self._taken = now(), True  # the last sign, and whether the router has it
        self._next_look = 0.0

    def hear(self, source: int, sign: Alive | Left) -> None:
        """Note a sign of life; after `Left` no more is expected."""
        if isinstance(sign, Left):
            self._heard.pop(source)
        else:
            self._heard[source], self._said[source] = self._now(), sign.waiting
            self._told[source] = sign.tokens

    def count_tokens(self) -> int:
        """New tokens of all ranks; on rank 0, and of the others as of their last sign."""
        return self._tokens() + sum(self._told)

    def leave(self) -> None:
        """Tell the router not to miss this rank: it has heard of the end."""
        if not self._left:
            self._left = True
            self._control.send(0, Left())

    def look(self) -> None:
        """Send a sign if one is due.

        Raises:
            StallError: names the rank that has been silent for too long, and who waits for what.
        """
        now = self._now()
        if now < self._next_look:
            return
        self._next_look = now + self._interval / 4
        for rank, heard in self._heard.items():
            if now - heard > self._timeout + self._interval:
                raise StallError(self._report(rank, now - heard))
        if self._left:
            return
        if self._taken:
            if now - self._sent >= self._interval:
                self._sent, self._taken = now, False
                self._control.send(0, Alive(self._waiting(), self._tokens()), self._note_taken)
        elif now - self._sent > self._timeout:
            raise StallError(self._report(0, now - self._sent))

    def _note_taken(self) -> None:
        self._taken = True

    def _report(self, silent: int, seconds: float) -> str:
        here = self._control.rank
        waits = {here: self._waiting(), **{r: said for r, said in self._said.items() if r != silent}}
        told = [f"rank {rank} waits for {what}" for rank, what in sorted(waits.items()) if what]
        return (
            f"rank {here}: no sign of life from rank {silent} for {seconds:.1f} s "
            f"(engine.stall_timeout = {self._timeout:g} s); " + ("; ".join(told[:4]) or "no rank waits for an answer")
        )
