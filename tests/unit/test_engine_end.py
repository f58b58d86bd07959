"""The end of an engine's loop: how long a rank whose tasks have ended waits for the others."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from mpi4py import MPI

from moempi.errors import StallError
from moempi.exchange.arrivals import Experts
from moempi.exchange.engine import Channels, Engine, Limits
from moempi.exchange.plan import Tags
from moempi.recorder import Recorder


@pytest.mark.timeout(30)
def test_a_request_that_is_never_completed_ends_a_rank_that_has_nothing_else_to_do() -> None:
    comm = MPI.COMM_SELF.Dup()
    recorder = Recorder("off", 0, 1, 1, 1, 1)
    limits = Limits(arrival_budget=0, stall_timeout=0.2, slice=0.01)
    channels = Channels(dispatch=comm, answers=comm, barrier=comm)
    engine = Engine(channels, {}, Experts({}), torch.float32, 1, Tags(1, 1), limits, recorder)
    nobody = MPI.COMM_SELF.Irecv(np.empty(1, dtype=np.uint8), 0, 0)  # as a message that the other rank does not take
    engine.requests.add(nobody, lambda: None)
    with pytest.raises(StallError, match=r"rank 0: has come to its end, not all ranks have in 0\.2 s"):
        engine.run([])
    nobody.Cancel()
    nobody.Wait()
    comm.Free()
