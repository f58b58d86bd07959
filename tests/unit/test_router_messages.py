"""What the router answers to each message: pure decisions, so no MPI and no home is needed."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pytest

from moempi.files.completions import Completion
from moempi.router.messages import Assignment, Done, Drain, Drained, DrainWanted, End, Want, Work
from moempi.router.router import Outgoing, Router


class Bench:
    """A router over sequences of the given work, and what it did to the writer, in order."""

    def __init__(self, work: list[int], n_ranks: int = 2, capacity: int = 2, homes: Sequence[int] = ()) -> None:
        self.events: list[str] = []
        assignments = {row: Assignment(row, [1], 1, new - 1, []) for row, new in enumerate(work)}
        homes = homes or range(n_ranks)
        self.router = Router(assignments, n_ranks, homes, capacity, self.keep, lambda: self.events.append("commit"))

    def keep(self, completion: Completion) -> None:
        self.events.append(f"{completion.index} {completion.finish_reason}")


def done(*rows: int, reason: str = "length", tokens: int = 3) -> Done:
    return Done([Completion(row, np.zeros(tokens, np.int32), np.zeros(tokens, np.float32), reason) for row in rows])


def handed(outgoing: Outgoing) -> dict[int, list[int]]:
    """Rows that go to each home; nothing else may be in it."""
    assert all(isinstance(message, Work) for _, message in outgoing)
    return {home: [a.index for a in message.assignments] for home, message in outgoing if isinstance(message, Work)}


def ends(n_ranks: int) -> Outgoing:
    return [(rank, End()) for rank in range(n_ranks)]


# ---------------------------------------------------------------- admission


def test_start_hands_out_the_largest_first_and_evens_the_homes_out() -> None:
    # By falling work 2 (9), 0 (5), 4 (5), 1 (3), 3 (1): home 0 takes the 9, home 1 both 5s and is full, home 0 the 3.
    bench = Bench([5, 3, 9, 1, 5])
    assert handed(bench.router.start()) == {0: [2, 1], 1: [0, 4]}


def test_only_homes_get_sequences_and_all_ranks_hear_the_end() -> None:
    bench = Bench([5, 3, 9], n_ranks=3, homes=[0])
    assert handed(bench.router.start()) == {0: [2, 0]}
    assert handed(bench.router.handle(0, Want(5))) == {0: [1]}
    assert bench.router.handle(0, done(0, 1, 2)) == ends(3)


def test_a_home_gets_what_it_wants_while_there_is_any() -> None:
    bench = Bench([9, 8, 7, 6, 5, 4, 3], capacity=1)
    assert handed(bench.router.start()) == {0: [0], 1: [1]}
    assert handed(bench.router.handle(1, Want(2))) == {1: [2, 3]}
    assert handed(bench.router.handle(0, Want(9))) == {0: [4, 5, 6]}
    assert bench.router.handle(1, Want(1)) == []


def test_no_home_hears_of_work_that_it_does_not_get() -> None:
    assert [home for home, _ in Bench([5], n_ranks=4).router.start()] == [0]


# ---------------------------------------------------------------- the end


def test_the_end_comes_once_after_the_last_completion_is_kept_and_committed() -> None:
    bench = Bench([2, 2, 2])
    bench.router.start()
    assert bench.router.handle(1, done(1)) == []
    assert bench.router.handle(0, done(0, 2)) == ends(2)
    assert bench.events == ["1 length", "0 length", "2 length", "commit"]
    assert (bench.router.finished, bench.router.new_tokens) == (3, 9)
    # A home may still ask, and a signal may still come.
    assert bench.router.handle(0, Want(2)) == []
    assert bench.router.handle(1, DrainWanted()) == []
    assert bench.router.ended and not bench.router.draining


def test_without_sequences_the_end_is_the_first_message() -> None:
    bench = Bench([])
    assert bench.router.start() == ends(2)
    assert bench.events == ["commit"]


def test_what_cannot_be_committed_is_not_announced() -> None:
    def fail() -> None:
        raise OSError("disk full")

    router = Router({0: Assignment(0, [1], 1, 1, [])}, 2, [0, 1], 1, lambda completion: None, fail)
    router.start()
    with pytest.raises(OSError, match="disk full"):
        router.handle(0, done(0))


# ---------------------------------------------------------------- drain


def test_a_drain_ends_the_job_when_every_home_has_handed_back() -> None:
    bench = Bench([4, 4, 4, 4, 4, 4])
    bench.router.start()
    assert bench.router.handle(1, done(1)) == []
    assert bench.router.handle(1, DrainWanted()) == [(0, Drain()), (1, Drain())]
    assert bench.router.handle(0, DrainWanted()) == [], "another rank was told too"
    assert bench.router.handle(0, Want(1)) == []
    assert bench.router.handle(0, done(0, reason="partial")) == []
    assert bench.router.handle(0, Drained()) == []
    assert bench.router.handle(1, done(3, reason="partial")) == []
    assert bench.router.handle(1, Drained()) == ends(2)
    # Partial completions are kept and do not count as finished.
    assert bench.events == ["1 length", "0 partial", "3 partial", "commit"]
    assert bench.router.finished == 1 and bench.router.new_tokens == 9


def test_a_drain_waits_for_the_homes_even_when_everything_finishes_meanwhile() -> None:
    bench = Bench([4, 4])
    bench.router.start()
    bench.router.handle(0, DrainWanted())
    assert bench.router.handle(0, done(0, 1)) == []
    assert bench.router.handle(0, Drained()) == []
    assert bench.router.handle(1, Drained()) == ends(2)
    assert bench.events.count("commit") == 1


def test_a_drain_of_rank0_asks_the_only_home() -> None:
    bench = Bench([4, 4], n_ranks=3, homes=[0])
    bench.router.start()
    assert bench.router.handle(2, DrainWanted()) == [(0, Drain())]
    assert bench.router.handle(0, Drained()) == ends(3)


def test_tokens_of_an_earlier_run_are_not_counted_again() -> None:
    resumed = {0: Assignment(0, [5, 6, 7], 1, 3, [-0.1, -0.2])}
    router = Router(resumed, 1, [0], 1, lambda completion: None, lambda: None)
    router.start()
    router.handle(0, done(0))
    assert (router.finished, router.new_tokens) == (1, 1)
