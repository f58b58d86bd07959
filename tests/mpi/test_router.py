"""Continuous batching: places are filled again as sequences end, and nothing is computed for a finished sequence."""

from __future__ import annotations

import random
from pathlib import Path

import numpy as np
import pytest
from layouts import Layout, run_all
from models import Model, random_config, write_model
from mpi4py import MPI

from moempi.batch import Step
from moempi.files.outputs import read_outputs
from moempi.home import Home
from moempi.mpi import meet

pytestmark = pytest.mark.mpi

CAPACITY = 8
NEW = [5] * 31 + [200] + [5] * 32  # one long completion among 63 short ones


def watch(patch: pytest.MonkeyPatch) -> list[str]:
    """Note every sequence that is stepped after its last token, on this rank."""
    faults: list[str] = []
    next_step = Home.next_step

    def watching(home: Home, microbatch: int) -> Step | None:
        step = next_step(home, microbatch)
        for sequence in step.sequences if step else ():
            if sequence.remaining <= 0 or sequence.cached >= len(sequence.tokens):
                faults.append(f"sequence {sequence.index} is stepped with {sequence.remaining} tokens to go")
        return step

    patch.setattr(Home, "next_step", watching)
    return faults


@pytest.mark.parametrize("ranks", [1, 2])
def test_steps_of_one_long_and_many_short_completions(
    world: MPI.Intracomm, folder: Path, monkeypatch: pytest.MonkeyPatch, ranks: int
) -> None:
    fixed = {"num_hidden_layers": 1, "mlp_only_layers": [], "num_experts_per_tok": 1, "eos_token_id": None}
    config = random_config(random.Random(0), 2, **fixed)
    if world.rank == 0:
        write_model(folder, config, 0, [2] * len(NEW), NEW)
    meet(world)
    model = Model(folder / "weights.h5", folder / "inputs.h5", {"run.capacity": CAPACITY}, "")
    faults = watch(monkeypatch)
    (ran,) = run_all(world, model, [Layout(ranks)], folder)
    assert not faults
    if world.rank == 0:
        outputs = read_outputs(ran.job.output.file)
        assert np.diff(outputs.offsets).tolist() == NEW
        # The long one takes 200 steps, one after the other; the short ones fit beside it.
        ideal = max(200, -(-sum(NEW) // (CAPACITY * ranks)))
        assert max(ran.outcome.steps) <= 1.05 * ideal
    meet(world)


def test_short_completions_keep_every_place_busy(world: MPI.Intracomm, folder: Path) -> None:
    fixed = {"num_hidden_layers": 1, "mlp_only_layers": [], "num_experts_per_tok": 1, "eos_token_id": None}
    config = random_config(random.Random(1), 3, **fixed)
    new = [6] * 64
    if world.rank == 0:
        write_model(folder, config, 1, [2] * len(new), new)
    meet(world)
    model = Model(folder / "weights.h5", folder / "inputs.h5", {"run.capacity": CAPACITY}, "")
    (ran,) = run_all(world, model, [Layout(1)], folder)
    if world.rank == 0:
        assert ran.outcome.steps == (6 * 64 // CAPACITY,)
    meet(world)
