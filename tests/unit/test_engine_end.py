"""The end of an engine's loop: how long a rank whose tasks have ended waits for the others."""

from __future__ import annotations

import time
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from mpi4py import MPI

from moempi.errors import StallError
from moempi.exchange.arrivals import Experts
from moempi.exchange.engine import EMPTY_POLLS, LONGEST_RUNG_SLEEP, LONGEST_SLEEP, Channels, Engine, Limits
from moempi.exchange.plan import Tags
from moempi.exchange.requests import Requests
from moempi.exchange.waiting import CallCost, Waiting
from moempi.recorder import Recorder
from moempi.stages import IDLE


@pytest.mark.timeout(30)
def test_a_request_that_is_never_completed_ends_a_rank_that_has_nothing_else_to_do() -> None:
    comm = MPI.COMM_SELF.Dup()
    recorder = Recorder("off", 0, 1, 1, 1, 1)
    limits = Limits(arrival_budget=0, stall_timeout=0.2, slice=0.01)
    channels = Channels(dispatch=comm, answers=comm, barrier=comm)
    engine = Engine(channels, {}, Experts({}), torch.float32, 1, Tags(1, 1), limits, recorder)
    nobody = MPI.COMM_SELF.Irecv(np.empty(1, dtype=np.uint8), 0, 0)  # as a message that the other rank does not take
    engine.requests.add(nobody, lambda: None)
    with pytest.raises(StallError, match=r"rank 0: has come to its end, not all ranks have in \d\.\d s"):
        engine.run([])
    nobody.Cancel()
    nobody.Wait()
    comm.Free()


def test_a_rank_with_rows_that_wait_sleeps_no_longer_than_they_do() -> None:
    requests, waiting = Requests(), Waiting({0: CallCost(call=300_000, slot=0, few=9)})
    requests.bell = SimpleNamespace(hears_all=True)  # type: ignore[assignment]
    rank: Any = SimpleNamespace(_sleeps=9, requests=requests, experts=SimpleNamespace(loaded=False, waiting=waiting))
    assert Engine._nap(rank) == LONGEST_RUNG_SLEEP
    rank.experts.loaded = True
    assert Engine._nap(rank) == LONGEST_SLEEP
    waiting.add(0, home=1, rows=1, slots=1, now=time.perf_counter_ns())
    assert 0 <= Engine._nap(rank) <= 300e-6


def test_a_rank_that_was_rung_for_looks_more_than_once_before_it_sleeps_again() -> None:
    """The look that takes a message out of the network is not the one that finds it: a lone one cost 20 ms a layer."""
    slept: list[float] = []
    bell = SimpleNamespace(sleep=lambda seconds: slept.append(seconds) or True)
    rank = SimpleNamespace(
        _empty_polls=EMPTY_POLLS, _sleeps=3, _looked=1.0, _empty_since=0.0, _services_due=9.0, _unanswered={},
        _meeting=None, _limits=SimpleNamespace(spin=0.0), _nap=lambda: 0.02, _waited_for=lambda: (IDLE, -1),
        requests=SimpleNamespace(bell=bell), recorder=SimpleNamespace(rest=lambda *_: None),
    )  # fmt: skip
    for _ in range(1 + EMPTY_POLLS):
        Engine._rest(rank)  # type: ignore[arg-type]
    assert slept == [0.02] and rank._services_due == 0.0
    Engine._rest(rank)  # type: ignore[arg-type]
    assert len(slept) == 2

