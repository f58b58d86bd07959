"""Rows at the experts of a CPU: when they are computed, and together with which."""

from __future__ import annotations

import pytest
import torch

from moempi.device.cpu import Cpu
from moempi.exchange import arrivals
from moempi.exchange.arrivals import Arrival, Experts
from moempi.model import config
from moempi.model.expert import Expert

D, HIDDEN, SLOTS = 8, 6, 3


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The time in ns, which stands still."""
    now = [0]
    monkeypatch.setattr(arrivals.time, "perf_counter_ns", lambda: now[0])
    return now


def experts(monkeypatch: pytest.MonkeyPatch, *, large: bool, leaves: int = 1) -> Experts:
    device, random = Cpu(1), torch.Generator().manual_seed(3)
    if large:
        monkeypatch.setattr(config, "SMALL", 0)
    return Experts(
        {
            (layer, number): Expert(
                device,
                torch.randn(2 * HIDDEN, D, generator=random),
                torch.randn(D, HIDDEN, generator=random),
                0,
                leaves,
                leaves,
                HIDDEN,
            )
            for layer in range(2)
            for number in range(SLOTS)
        }
    )


def arrival(source: int, rows_per_slot: tuple[int, ...], layer: int = 0, microbatch: int = 0) -> Arrival:
    n = sum(rows_per_slot)
    return Arrival(source, 0, layer, microbatch, torch.randn(n, D), torch.full((n, D), torch.nan), rows_per_slot, n)


def drain(found: Experts) -> list[Arrival]:
    ended = []
    while found:
        ended += found.serve(2**62)[2]
    return ended


@pytest.mark.parametrize("leaves", [1, 2])
def test_small_experts_never_wait(monkeypatch: pytest.MonkeyPatch, clock: list[int], leaves: int) -> None:
    found = experts(monkeypatch, large=False, leaves=leaves)
    for home in (0, 1):
        found.add(arrival(home, (1, 0, 2)))
        assert len(drain(found)) == 1 and not found.loaded


def test_few_rows_for_large_experts_wait_for_a_home_that_sent_few_of_late(
    monkeypatch: pytest.MonkeyPatch, clock: list[int]
) -> None:
    found = experts(monkeypatch, large=True)
    for home in (0, 1):
        found.add(arrival(home, (1, 0, 2)))
    assert len(drain(found)) == 2 and found.calls == 2, "both homes' rows go together"
    first = arrival(0, (1, 1, 1), layer=1)
    found.add(first)
    assert not found and found.loaded, "home 1 is expected"
    found.add(arrival(1, (0, 1, 1), layer=1))
    assert len(drain(found)) == 2 and found.calls == 5 and not found.loaded
    assert torch.isfinite(first.answer).all()


def test_nobody_is_waited_for_longer_than_a_call_takes(monkeypatch: pytest.MonkeyPatch, clock: list[int]) -> None:
    found = experts(monkeypatch, large=True)
    for home in (0, 1):
        found.add(arrival(home, (1, 0, 0)))
    drain(found)
    found.add(arrival(0, (1, 0, 1), layer=1))
    assert not found
    clock[0] = 2 * int(1e9 * 3 * HIDDEN * D * 4 / arrivals.READ_RATE)  # two slots are read
    assert len(drain(found)) == 1
    found.add(arrival(0, (1, 0, 0)))
    assert len(drain(found)) == 1, "who did not come is not expected"


def test_rows_that_come_while_their_layer_is_computed_join_it(
    monkeypatch: pytest.MonkeyPatch, clock: list[int]
) -> None:
    found = experts(monkeypatch, large=True)
    found.add(arrival(0, (2, 1, 0)))
    found.serve(2**62)
    found.add(arrival(1, (1, 1, 0)))
    assert len(drain(found)) == 2 and found.calls == 3, "slot 1 has both homes' rows in one call, slot 0 in two"
    found.add(arrival(0, (1, 0, 0), layer=1))
    assert not found, "home 1 has been there with few rows, and is expected"


def test_many_rows_do_not_wait(monkeypatch: pytest.MonkeyPatch, clock: list[int]) -> None:
    found = experts(monkeypatch, large=True)
    for home in (0, 1):
        found.add(arrival(home, (1, 0, 0)))
    drain(found)
    found.add(arrival(0, (arrivals.FEW_ROWS * SLOTS, 0, 0), layer=1))
    assert len(drain(found)) == 1


def test_the_microbatch_that_came_first_is_served_first_and_of_its_experts_the_fullest(
    monkeypatch: pytest.MonkeyPatch, clock: list[int]
) -> None:
    found = experts(monkeypatch, large=True)
    many = arrivals.FEW_ROWS * SLOTS
    first = arrival(0, (many, 2 * many, 0))
    later = arrival(0, (0, 0, 9 * many), layer=1, microbatch=1)
    of_another_home = arrival(1, (many, many, 0))
    for one in (first, later, of_another_home):
        found.add(one)
    served = []
    while found:
        served.append(found.serve(2**62)[:2])
    assert served == [(0, 3 * many), (0, 2 * many), (1, 9 * many)]
    again = arrival(0, (0, 0, many))
    for one in (arrival(0, (1, 0, many), layer=1), again):
        found.add(one)
    while found:
        layer, _, ended = found.serve(2**62)
    assert layer == 0 and ended == [again], "a microbatch that comes again is the last to have come"
