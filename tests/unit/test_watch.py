"""Signs of life: when they are sent, whose silence ends the job, what the report says. By hand, on a false clock."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from moempi.errors import StallError
from moempi.router.messages import Alive, Left
from moempi.router.watch import Watch


class Side:
    """One rank's watch (time-out 5 s, so that a sign is due every second), its clock, and what it has sent."""

    def __init__(self, rank: int, waiting: str = ""):
        self.rank, self.now, self.waiting = rank, 0.0, waiting
        self.sent: list[tuple[Any, Callable[[], None]]] = []
        self.watch = Watch(self, 3, 5.0, lambda: self.now, lambda: self.waiting)  # type: ignore[arg-type]

    def send(self, destination: int, message: Any, taken: Callable[[], None] = lambda: None) -> None:
        assert destination == 0
        self.sent.append((message, taken))

    def look(self, now: float) -> None:
        self.now = now
        self.watch.look()


def test_a_sign_is_sent_when_due_and_the_one_before_has_been_taken() -> None:
    side = Side(1, "rank 2: layer 4")
    side.look(0.9)
    assert not side.sent
    side.look(1.2)
    side.look(2.4)
    assert [message for message, _ in side.sent] == [Alive("rank 2: layer 4")]
    side.sent[0][1]()
    side.look(2.9)
    assert len(side.sent) == 2


def test_a_sign_that_is_not_taken_means_that_the_router_is_silent() -> None:
    side = Side(1, "rank 2: layer 4, microbatch 0, 7 rows, 5.1 s")
    side.look(1.0)
    side.look(6.0)
    with pytest.raises(StallError, match=r"no sign of life from rank 0 for 5\.3 s .*; rank 1 waits for rank 2: layer"):
        side.look(6.3)


def test_the_router_misses_the_rank_that_is_silent_and_says_who_waits() -> None:
    side = Side(0)
    for now in range(1, 8):
        side.now = float(now)
        side.watch.hear(1, Alive("all ranks to meet after layer 2, 3.0 s"))
        if now < 2:
            side.watch.hear(2, Alive(""))
        side.look(float(now))
    side.now = 7.5
    side.watch.hear(1, Alive("all ranks to meet after layer 2, 6.0 s"))
    with pytest.raises(StallError, match=r"rank 0: no sign of life from rank 2 .*; rank 1 waits for all ranks to meet"):
        side.look(7.5)
    assert not side.sent


def test_nobody_is_missed_who_has_left() -> None:
    side = Side(0)
    side.watch.hear(1, Left())
    side.watch.hear(2, Left())
    side.look(1000.0)
    leaving = Side(1)
    leaving.watch.leave()
    leaving.watch.leave()
    leaving.look(1000.0)
    assert [message for message, _ in leaving.sent] == [Left()]


def test_signs_carry_the_tokens_that_ranks_have_made() -> None:
    router, other = Side(0), Side(1)
    router.watch.hear(1, Alive("", 5))
    router.watch.hear(2, Alive("", 7))
    router.watch.hear(1, Alive("", 9))
    router.watch.hear(2, Left())
    assert router.watch.count_tokens() == 9 + 7
    made = [0]
    other.watch = Watch(other, 3, 5.0, lambda: other.now, lambda: "", lambda: made[0])  # type: ignore[arg-type]
    made[0] = 12
    other.look(1.2)
    assert [message for message, _ in other.sent] == [Alive("", 12)]


@pytest.mark.parametrize(
    ("ranks", "timeout", "interval"), [(3, 300.0, 1.0), (400, 300.0, 4.0), (5000, 300.0, 10.0), (3, 2.0, 0.4)]
)
def test_signs_come_every_second_and_less_often_in_large_worlds(ranks: int, timeout: float, interval: float) -> None:
    side = Side(1)
    side.watch = Watch(side, ranks, timeout, lambda: side.now, lambda: "")  # type: ignore[arg-type]
    side.look(0.98 * interval)
    assert not side.sent
    side.look(1.3 * interval)
    assert len(side.sent) == 1
