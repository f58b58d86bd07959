"""Frames between all ranks: received before anybody knows how long they are, in memory that is soon full."""

from __future__ import annotations

import random

import numpy as np
import pytest
from mpi4py import MPI

from moempi.device.arena import ALIGNMENT, Arena
from moempi.exchange.frames import Frame, Frames
from moempi.exchange.requests import Requests

pytestmark = pytest.mark.mpi

LARGEST, EACH = 4 * ALIGNMENT, 12  # bytes of a frame with its answer; frames from each rank to each other


def content(source: int, peer: int, i: int) -> np.ndarray:
    """What the i-th frame from one rank to another has in it; it is as long as half of the largest at most."""
    rng = np.random.default_rng([source, peer, i])
    return rng.integers(0, 256, rng.integers(1, LARGEST // 2 + 1), dtype=np.uint8)


@pytest.mark.parametrize("posted,rooms", [(1, 1), (2, 5), (4, 4)])
def test_frames_of_any_length_come_whole_and_memory_is_given_back(posted: int, rooms: int) -> None:
    """With as much room as receives that are posted, those that are here stand in the way of what comes."""
    world = MPI.COMM_WORLD
    memory, requests = np.zeros(ALIGNMENT + rooms * LARGEST, dtype=np.uint8), Requests()
    arena = Arena(ALIGNMENT, rooms * LARGEST)
    frames = Frames(world.Dup(), requests, memory.ctypes.data, arena, LARGEST, posted)
    others, rng = [rank for rank in range(world.size) if rank != world.rank], random.Random(world.rank)
    sent = []
    for i in range(EACH):
        for peer in rng.sample(others, len(others)):
            payload = content(world.rank, peer, i)
            sent.append(payload)
            frames.send(payload.ctypes.data, payload.nbytes, peer, i, lambda: None)
    came, held = set[tuple[int, int]](), list[Frame]()
    while len(came) < EACH * len(others) or requests:
        requests.test()
        frame = frames.take()
        if frame is not None:
            found = memory[frame.block : frame.block + frame.nbytes]
            assert np.array_equal(found, content(frame.source, world.rank, frame.tag))
            assert (frame.source, frame.tag) not in came
            came.add((frame.source, frame.tag))
            held.append(frame)
        elif held:
            done = held.pop(rng.randrange(len(held)))
            memory[done.block : done.block + done.nbytes] = 0
            arena.give(done.block)
    for frame in held:
        arena.give(frame.block)
    world.Barrier()
    assert frames.take() is None
    assert arena.in_use == posted * LARGEST, "what is posted, and nothing else"
    frames.free()
