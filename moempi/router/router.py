"""The router, on rank 0: hands out sequences, takes in results, decides when the job has ended.

`handle` is given one message at a time and returns what is to be sent; it neither sends nor waits.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Mapping, Sequence

from moempi.files.completions import Completion
from moempi.router.admission import first_deal, largest_first
from moempi.router.messages import Assignment, Done, Drain, Drained, DrainWanted, End, ToHome, ToRouter, Want, Work

Outgoing = list[tuple[int, ToHome]]  # (rank, message)


class Router:
    """Admission on demand, and the end of the job.

    `expected` is the number of new tokens that this run comes to, if no further sequence ends early.

    Args:
        assignments: every sequence that is not finished yet, by row of the input.
        n_ranks: of the job; all of them hear its end.
        homes: ranks that take sequences.
        capacity: sequences that a home works on at the same time.
        keep: called with every completion, finished or partial.
        commit: called once before the end is announced; returns when all that was kept is safe.
    """

    def __init__(
        self,
        assignments: Mapping[int, Assignment],
        n_ranks: int,
        homes: Sequence[int],
        capacity: int,
        keep: Callable[[Completion], None],
        commit: Callable[[], None],
    ):
        self.n_ranks, self.homes, self.capacity = n_ranks, tuple(homes), capacity
        self.finished = 0
        self.new_tokens = 0
        self.draining = self.ended = False
        self.total = len(assignments)
        self.expected = sum(a.max_new_tokens - len(a.logprobs) for a in assignments.values())
        self._most = {row: a.max_new_tokens for row, a in assignments.items()}
        self._assignments = dict(assignments)
        self._work = {row: a.n_prompt + a.max_new_tokens for row, a in assignments.items()}
        self._known = {row: len(a.logprobs) for row, a in assignments.items()}  # tokens that were counted already
        self._queue: deque[int] = deque()
        self._drained: set[int] = set()
        self._keep, self._commit = keep, commit

    def start(self) -> Outgoing:
        """The first messages of the job."""
        order = largest_first(self._work)
        if not order:
            return self._end()
        deal = first_deal(order, self._work, self.homes, self.capacity)
        self._queue.extend(order[len(deal) :])
        hands: dict[int, list[int]] = {}
        for home, row in deal:
            hands.setdefault(home, []).append(row)
        return [(home, self._hand_out(held)) for home, held in hands.items()]

    def handle(self, source: int, message: ToRouter) -> Outgoing:
        """What a message from rank `source` leads to."""
        match message:
            case Want(n):
                return self._grant(source, n)
            case Done(completions):
                return self._take_in(completions)
            case DrainWanted():
                return self._drain()
            case Drained():
                self._drained.add(source)
                return self._end() if self._drained == set(self.homes) else []

    def _grant(self, home: int, n: int) -> Outgoing:
        if self.draining:
            return []
        rows = [self._queue.popleft() for _ in range(min(n, len(self._queue)))]
        return [(home, self._hand_out(rows))] if rows else []

    def _hand_out(self, rows: list[int]) -> Work:
        return Work([self._assignments.pop(row) for row in rows])

    def _take_in(self, completions: list[Completion]) -> Outgoing:
        for completion in completions:
            self._keep(completion)
            if completion.finish_reason != "partial":
                self.finished += 1
                self.expected -= self._most[completion.index] - len(completion.tokens)  # it ended early
            self.new_tokens += len(completion.tokens) - self._known[completion.index]
            self._known[completion.index] = len(completion.tokens)
        return self._end() if self.finished == self.total and not self.draining else []

    def _drain(self) -> Outgoing:
        if self.draining or self.finished == self.total:
            return []
        self.draining = True
        return [(home, Drain()) for home in self.homes]

    def _end(self) -> Outgoing:
        if self.ended:
            return []
        self.ended = True
        self._commit()
        return [(rank, End()) for rank in range(self.n_ranks)]
