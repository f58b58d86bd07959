"""With a limit that leaves a KV cache for few sequences the others wait, and nothing else changes: 1 and 3 ranks."""

from __future__ import annotations

import logging
import random
from pathlib import Path

import pytest
from layouts import Layout, job_of
from models import Model, difference, random_config, write_model
from mpi4py import MPI

from moempi.files.outputs import read_outputs
from moempi.mpi import meet
from moempi.prepare import look
from moempi.run import run

pytestmark = pytest.mark.mpi

PROMPTS, AT_ONCE = 64, 4


@pytest.mark.parametrize("ranks", [1, 3])
def test_sequences_wait_for_room(
    world: MPI.Intracomm, folder: Path, seed: int, ranks: int, caplog: pytest.LogCaptureFixture
) -> None:
    ranks = min(ranks, world.size)
    if world.rank == 0:
        rng = random.Random(seed)
        # All of two pages, so that the limit is for so many whole sequences.
        lengths = [rng.randint(65, 120) for _ in range(PROMPTS)]
        write_model(folder, random_config(rng, 5), seed, lengths, 4, {"run.capacity": PROMPTS})
    meet(world)
    model = Model(folder / "weights.h5", folder / "inputs.h5", {"run.capacity": PROMPTS}, f"seed {seed}")
    free = job_of(model, Layout(ranks), folder / "free.h5")
    some = job_of(model, Layout(ranks, {"memory.kv_tokens": AT_ONCE * 128}), folder / "some.h5")
    limit = max(plan.total for plan in look(some, ranks).shape.layout.memory)
    held = job_of(model, Layout(ranks, {"memory.limit": limit}), folder / "held.h5")
    part = world.Split(0 if world.rank < ranks else MPI.UNDEFINED, world.rank)
    if part != MPI.COMM_NULL:
        run(part, free)
        assert "is full" not in caplog.text
        with caplog.at_level(logging.INFO, "moempi"):
            run(part, held)
        if part.rank == 0:
            assert f"a KV cache of {AT_ONCE * 128} positions per home, not the {PROMPTS * 128}" in caplog.text
            full = f"rank 0: the KV cache of {AT_ONCE * 128} positions is full: {AT_ONCE} sequences at work, "
            assert full in caplog.text and caplog.text.count("is full") == 1
            expected = read_outputs(folder / "free.h5")
            assert len(expected) == PROMPTS and not difference(expected, folder / "held.h5")
        part.Free()
    meet(world)
