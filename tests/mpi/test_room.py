"""With a limit that leaves a KV cache for few sequences the others wait, and nothing else changes: 1 and 3 ranks."""

from __future__ import annotations

import logging
import random
from pathlib import Path

import pytest
from layouts import Layout, job_of, run_all
from models import Model, difference, random_config, write_model
from mpi4py import MPI

from moempi.files.outputs import read_outputs
from moempi.model.config import PAGE
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


@pytest.mark.parametrize("ranks", [1, 3])
def test_long_and_short_sequences_wait_in_two_microbatches(
    world: MPI.Intracomm, folder: Path, seed: int, ranks: int
) -> None:
    ranks = min(ranks, world.size)
    # Every home gets one of 6 pages, two of 5 and one of 4 for its 10 pages. While the first is at work one microbatch
    # has nothing to do, and the router has nothing more to say: only the other one, which ends it, can wake it.
    pages = [6] * ranks + [5] * 2 * ranks + [4] * ranks
    if world.rank == 0:
        config = random_config(random.Random(seed), 5, max_position_embeddings=6 * PAGE)
        write_model(folder, config, seed, [PAGE * n - 4 for n in pages], 4)
    meet(world)
    options = {"run.capacity": 4, "run.microbatches": 2}
    model = Model(folder / "weights.h5", folder / "inputs.h5", options, f"seed {seed}")
    layouts = [Layout(ranks), Layout(ranks, {"memory.kv_tokens": 10 * PAGE})]
    free, held = run_all(world, model, layouts, folder)
    if world.rank == 0:
        expected = read_outputs(free.job.output.file)
        assert len(expected) == 4 * ranks and not difference(expected, held.job.output.file)
    meet(world)
