"""What a run sends is what its routes say, exactly, whatever the slots; and where a placement is refused."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from layouts import Layout, Ran, fitting, run_all
from models import Model, difference, random_config, write_model
from mpi4py import MPI

from moempi import analysis
from moempi.analysis import load
from moempi.errors import FitError
from moempi.exchange.predict import RowSizes, messages_from_routes
from moempi.exchange.slots import layer_tables
from moempi.files.outputs import read_outputs
from moempi.mpi import AgreedError, meet
from moempi.prepare import look
from moempi.run import run

pytestmark = pytest.mark.mpi

ROUTES = {"trace.level": "routes"}
# (experts, layouts): as many experts as ranks, fewer, more; counts that divide and that don't.
SLOTS: dict[str, tuple[int, list[Layout]]] = {
    "one each": (16, [Layout(16, ROUTES)]),
    "replicas on spare ranks": (5, [Layout(16, ROUTES), Layout(8, ROUTES)]),
    "one expert": (1, [Layout(16, ROUTES), Layout(3, ROUTES)]),
    "packed": (7, [Layout(3, ROUTES), Layout(2, ROUTES), Layout(4, ROUTES | {"placement.strategy": "balanced"})]),
    "packed and replicated": (6, [Layout(4, ROUTES | {"placement.replicas": 5, "placement.strategy": "random"})]),
    "in pieces": (6, [Layout(4, ROUTES | {"exchange.piece_bytes": 300, "run.microbatches": 3})]),
    "an expert on two ranks": (6, [Layout(4, ROUTES | {"placement.replicas": 0}, ((0, 2, 2), (1, 0, 4)))]),
    "rank 0 the only home": (6, [Layout(4, ROUTES | {"admission.policy": "rank0"})]),
    "some homes": (6, [Layout(4, ROUTES | {"admission.homes": 2}), Layout(16, ROUTES | {"admission.homes": 5})]),
    "lockstep": (6, [Layout(4, ROUTES | {"exchange.lockstep": True})]),
}


@pytest.mark.parametrize("name", SLOTS)
def test_traffic_is_what_the_routes_say(world: MPI.Intracomm, folder: Path, name: str) -> None:
    experts, layouts = SLOTS[name]
    model = a_model(world, folder, experts)
    reference, *others = run_all(world, model, [Layout(1), *fitting(world, layouts)], folder)
    if world.rank == 0:
        expected = read_outputs(reference.job.output.file)
        for ran in others:
            assert not difference(expected, ran.job.output.file), (name, str(ran.layout))
            check_traffic(ran)
            check_load(ran)
    meet(world)


def check_traffic(ran: Ran) -> None:
    """Rows, bytes and messages of every link are those that a pure function finds in the routes."""
    shape = look(ran.job, ran.layout.ranks).shape
    trace = load(ran.job.trace_file)
    sizes = RowSizes(shape.config.d_model, shape.dtype.itemsize, shape.layout.piece_rows)
    predicted = messages_from_routes(trace.routes, layer_tables(shape.layout.placement), sizes)
    measured = {key: np.asarray(trace.traffic[key], dtype=np.int64) for key in predicted}
    order = np.lexsort([measured[key] for key in ("destination", "layer", "kind", "source")])
    for key, column in predicted.items():
        assert measured[key][order].tolist() == column.tolist(), (str(ran.layout), key)
    if ran.layout.ranks > 1:
        assert predicted["messages"].sum() > 0


def check_load(ran: Ran) -> None:
    """The load per layer and expert counts every token's experts once."""
    trace = load(ran.job.trace_file)
    counted = np.zeros_like(trace.load)
    layers = np.repeat(trace.routes["layer"], trace.routes["experts"].shape[1])
    np.add.at(counted, (layers, trace.routes["experts"].ravel()), 1)
    assert np.array_equal(counted, trace.load)
    computed = sum(ran.outcome.expert_rows)
    rows = analysis.traffic_matrix(trace, "dispatch", "rows").sum()
    assert computed == rows
    if not ran.layout.cuts:
        assert computed == trace.load.sum()


def test_every_dispatch_leaves_the_only_home(world: MPI.Intracomm, folder: Path) -> None:
    model = a_model(world, folder, 6)
    layouts = [Layout(4, ROUTES | {"admission.policy": policy}) for policy in ("rank0", "balanced")]
    central, balanced = run_all(world, model, fitting(world, layouts), folder)
    if world.rank == 0:
        rows = [analysis.traffic_matrix(load(r.job.trace_file), "dispatch", "rows") for r in (central, balanced)]
        assert rows[0][1:].sum() == 0 and rows[0][0, 1:].sum() > 0
        assert (rows[1].sum(axis=1) > 0).all()
        assert central.outcome.steps[1:] == (0, 0, 0)
        assert not difference(read_outputs(balanced.job.output.file), central.job.output.file)
    meet(world)


def test_strict_refuses_a_second_slot_with_the_numbers(world: MPI.Intracomm, folder: Path) -> None:
    model = a_model(world, folder, 7)
    job = model.job(folder / "strict.h5", {"placement.strict": True})
    part = world.Split(0 if world.rank < 3 else 1, world.rank)
    if world.rank < 3:
        with pytest.raises(AgreedError, match=r"E = 7 experts on N = 3 ranks need 3 slots") as caught:
            run(part, job)
        assert caught.value.exit_code == FitError.exit_code
    part.Free()
    meet(world)


def a_model(world: MPI.Intracomm, folder: Path, experts: int) -> Model:
    """Two MoE layers, twelve prompts. Collective."""
    fixed: dict[str, Any] = {"num_hidden_layers": 2, "mlp_only_layers": [], "num_experts_per_tok": min(2, experts)}
    fixed |= {"moe_intermediate_size": 12, "eos_token_id": None}
    config = random_config(random.Random(experts), experts, **fixed)
    options = {"model.leaves": 4, "run.capacity": 3, "run.prefill_tokens": 9}
    if world.rank == 0:
        write_model(folder, config, experts, [3 + 2 * i for i in range(12)], 4, options)
    meet(world)
    return Model(folder / "weights.h5", folder / "inputs.h5", options, f"E={experts}")
