"""Routes through relays: the same bits as direct, each token once to a node, and no way to wait in a circle."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from layouts import Cut, Layout, Ran, fitting, run_all
from models import Model, difference, random_config, write_model
from mpi4py import MPI

from moempi.analysis import load
from moempi.analysis.check import disagreements
from moempi.exchange.account import Account
from moempi.exchange.predict import RowSizes, messages_from_routes
from moempi.exchange.predict_relays import relayed_from_routes, rows_between_nodes
from moempi.exchange.relay_plan import RELAYED, Ways
from moempi.exchange.slots import layer_tables
from moempi.files.completions import Outputs
from moempi.files.outputs import read_outputs
from moempi.files.schema import open_file, text_attribute
from moempi.mpi import meet
from moempi.planning import memory
from moempi.prepare import look
from moempi.stages import KINDS

pytestmark = pytest.mark.mpi

ROUTES = {"trace.level": "routes"}
# Ranks and their nodes: even, uneven, one rank a node, nodes without an expert or without a sequence.
NODES: list[tuple[int, int | list[int]]] = [
    (2, 1), (3, [2, 1]), (4, 2), (4, [3, 1]), (8, 2), (8, [3, 1, 4]), (16, 4), (16, [5, 3, 8]),
]  # fmt: skip
# Name -> experts, options, (layer, expert, pieces) of cuts.
PLACEMENTS: dict[str, tuple[int, dict[str, Any], tuple[Cut, ...]]] = {
    "packed": (20, {"placement.replicas": 0, "run.microbatches": 2}, ()),
    "replicated": (5, {"placement.strategy": "balanced", "placement.replicas": 3, "run.microbatches": 3}, ()),
    "few": (3, {"placement.replicas": 0, "run.microbatches": 1}, ()),
    "cut": (6, {"placement.replicas": 0, "run.microbatches": 2}, ((0, 2, 2), (1, 0, 2), (0, 5, 2))),
}


@pytest.mark.parametrize("route", ["direct", *RELAYED])
@pytest.mark.parametrize("name", PLACEMENTS)
def test_same_bits_and_predicted_traffic(world: MPI.Intracomm, folder: Path, name: str, route: str) -> None:
    experts, options, cuts = PLACEMENTS[name]
    model = a_model(world, folder, experts)
    layouts = [relayed(n, nodes, route, options, cuts) for n, nodes in NODES]
    reference, *others = run_all(world, model, [Layout(1), *fitting(world, layouts)], folder)
    if world.rank == 0:
        expected = read_outputs(reference.job.output.file)
        for ran in others:
            problem = difference(expected, ran.job.output.file)
            assert not problem, f"{ran.layout}\n{problem}"
            check_traffic(ran)
    meet(world)


def check_traffic(ran: Ran) -> None:
    """Rows and bytes of every hop are what a pure function finds in the routes; in the direct one messages too."""
    shape = look(ran.job, ran.layout.ranks).shape
    layout = shape.layout
    trace, tables = load(ran.job.trace_file), layer_tables(layout.placement)
    sizes = RowSizes(shape.config.d_model, shape.dtype.itemsize, layout.piece_rows)
    assert trace.run["route"] == layout.route.name == ran.job.exchange.route
    if layout.route.name == "direct":
        predicted = messages_from_routes(trace.routes, tables, sizes)
    else:
        ways = Ways(layout.route.name, layout.nodes)
        predicted = relayed_from_routes(trace.routes, tables, sizes, ways, fast=layout.mode == "fast")
        assert crossings(ran) == rows_between_nodes(trace.routes, tables, layout.nodes)
    measured = {key: np.asarray(trace.traffic[key], dtype=np.int64) for key in predicted}
    order = np.lexsort([measured[key] for key in ("destination", "layer", "kind", "source")])
    for key, column in predicted.items():
        assert measured[key][order].tolist() == column.tolist(), (str(ran.layout), key)
    assert not disagreements(trace, read_outputs(ran.job.output.file)), str(ran.layout)


def crossings(ran: Ran) -> dict[tuple[int, int, int], int]:
    """Measured rows from relay to relay, by (layer, node, node); between nodes there is nothing else but returns."""
    trace, nodes = load(ran.job.trace_file), [one["node"] for one in load(ran.job.trace_file).ranks]
    names = ("kind", "layer", "source", "destination", "rows")
    found: dict[tuple[int, int, int], int] = {}
    for kind, layer, source, destination, rows in zip(*(trace.traffic[n].tolist() for n in names), strict=True):
        crosses = nodes[source] != nodes[destination]
        assert crosses == (KINDS[kind] in ("relay", "return")), (KINDS[kind], source, destination)
        if KINDS[kind] == "relay":
            key = (layer, nodes[source], nodes[destination])
            found[key] = found.get(key, 0) + rows
    return found


def test_options_that_must_not_matter(world: MPI.Intracomm, folder: Path) -> None:
    model = a_model(world, folder, 7)
    changes: list[dict[str, Any]] = [
        {"exchange.lockstep": True},
        {"exchange.piece_bytes": 300, "exchange.arrival_budget": 0},
        {"admission.policy": "rank0"},
        {"engine.slice": 1e-6, "run.microbatches": 4},
        {"run.capacity": 1, "run.prefill_tokens": 2},
    ]
    layouts = [
        relayed(4, nodes, route, {"placement.replicas": 0} | each)
        for each in changes
        for route, nodes in (("leader", [3, 1]), ("rail", [1, 3]))
    ]
    reference, *others = run_all(world, model, [Layout(1), *fitting(world, layouts)], folder)
    if world.rank == 0:
        expected = read_outputs(reference.job.output.file)
        for ran in others:
            problem = difference(expected, ran.job.output.file)
            assert not problem, f"{ran.layout}\n{problem}"
            check_traffic(ran)
    meet(world)


def test_inputs_of_one_and_of_no_sequence(world: MPI.Intracomm, folder: Path) -> None:
    for n in (0, 1):
        into = folder / str(n)
        make(world, into)
        model = a_model(world, into, 5, prompts=n)
        layouts = [relayed(4, 2, route, {"placement.replicas": 0}) for route in RELAYED]
        reference, *others = run_all(world, model, [Layout(1), *fitting(world, layouts)], into)
        if world.rank == 0:
            expected = read_outputs(reference.job.output.file)
            assert len(expected) == n
            for ran in others:
                assert not difference(expected, ran.job.output.file), str(ran.layout)
        meet(world)


# ---------------------------------------------------------------- the smallest budgets


@pytest.mark.parametrize("route", RELAYED)
def test_crossing_traffic_with_room_for_one_message(
    world: MPI.Intracomm, folder: Path, monkeypatch: pytest.MonkeyPatch, route: str
) -> None:
    """Every kind of hop has room for a single message, and every home sends to every node at once."""
    model = a_model(world, folder, 12, prompts=40)
    refused: list[int] = []
    with monkeypatch.context() as patch:
        patch.setattr(memory, "relay_budget", lambda *_: 1)
        patch.setattr(memory, "arrival_budget", lambda *_: 1)
        take = Account.take

        def counting(account: Account, nbytes: int) -> bool:
            taken = take(account, nbytes)
            refused.extend([1] * (not taken))
            return taken

        patch.setattr(Account, "take", counting)
        layouts = [
            relayed(n, nodes, route, {"run.microbatches": 4, "run.capacity": 8, "placement.replicas": 0})
            for n, nodes in ((4, 2), (8, 4), (8, [1, 5, 2]))
        ]
        ran = run_all(world, model, fitting(world, layouts), folder)
    make(world, folder / "alone")
    (reference,) = run_all(world, model, [Layout(1)], folder / "alone")
    waits = world.allreduce(len(refused))
    if world.rank == 0:
        assert waits > 100, "the budgets were never full"
        expected = read_outputs(reference.job.output.file)
        for one in ran:
            assert not difference(expected, one.job.output.file), str(one.layout)
    meet(world)


# ---------------------------------------------------------------- fast mode

# Largest change of a log-probability against exact mode, until the tokens part.
TOLERANCE = {"float32": 1e-5, "bfloat16": 0.1}


@pytest.mark.parametrize("dtype", TOLERANCE)
def test_fast_mode_sends_sums_back_and_changes_little(world: MPI.Intracomm, folder: Path, dtype: str) -> None:
    model = a_model(world, folder, 8, **{"model.dtype": dtype, "model.leaves": 2})
    fast = {"model.mode": "fast", "run.microbatches": 2, "placement.replicas": 0}
    cuts: tuple[Cut, ...] = ((0, 3, 2), (1, 1, 2))
    layouts = [
        relayed(n, nodes, route, fast, each)
        for n, nodes in ((2, 1), (4, 2), (4, [1, 3]), (8, 4))
        for route in RELAYED
        for each in ((), cuts)
    ]
    reference, *others = run_all(world, model, [Layout(1), *fitting(world, layouts)], folder)
    if world.rank == 0:
        expected, changes = read_outputs(reference.job.output.file), []
        for ran in others:
            found = read_outputs(ran.job.output.file)
            with open_file(ran.job.output.file, "outputs") as file:
                assert text_attribute(file, "mode") == "fast"
            assert load(ran.job.trace_file).mode == ran.outcome.mode == "fast"
            changes.append(largest_change(expected, found))
            check_traffic(ran)
            check_sums(ran)
        print(f"{dtype}: largest change of a log-probability in fast mode {max(changes):.2g}")
        assert 0 < max(changes) < TOLERANCE[dtype], changes
    meet(world)


def check_sums(ran: Ran) -> None:
    """As many rows come back between nodes as went: one for each token."""
    traffic = load(ran.job.trace_file).traffic
    rows = [int(traffic["rows"][traffic["kind"] == KINDS.index(kind)].sum()) for kind in ("relay", "return")]
    assert rows[0] == rows[1] > 0


def largest_change(expected: Outputs, found: Outputs) -> float:
    """Of the log-probabilities of tokens that follow the same tokens."""
    changes = [0.0]
    for row in range(len(expected)):
        mine, theirs = (slice(*one.offsets[row : row + 2].tolist()) for one in (expected, found))
        pairs = zip(expected.tokens[mine], found.tokens[theirs], strict=True)
        logprobs = zip(expected.logprobs[mine], found.logprobs[theirs], strict=True)
        for (wanted, got), (a, b) in zip(pairs, logprobs, strict=True):
            changes.append(abs(float(a) - float(b)))
            if wanted != got:
                break
    return max(changes)


# ---------------------------------------------------------------- what they are made of


def make(world: MPI.Intracomm, folder: Path) -> None:
    """A folder that all ranks see. Collective."""
    if world.rank == 0:
        folder.mkdir()
    meet(world)


def relayed(
    ranks: int, nodes: int | list[int], route: str, options: dict[str, Any], cuts: tuple[Cut, ...] = ()
) -> Layout:
    """A layout on pretended nodes."""
    return Layout(ranks, ROUTES | options | {"exchange.route": route, "exchange.ranks_per_node": nodes}, cuts)


def a_model(world: MPI.Intracomm, folder: Path, experts: int, prompts: int = 12, **options: Any) -> Model:
    """Two MoE layers. Collective."""
    fixed: dict[str, Any] = {"num_hidden_layers": 2, "mlp_only_layers": [], "num_experts_per_tok": min(3, experts)}
    fixed |= {"moe_intermediate_size": 12, "eos_token_id": None}
    config = random_config(random.Random(experts), experts, **fixed)
    options = {"model.leaves": 4, "run.capacity": 3, "run.prefill_tokens": 9} | options
    if world.rank == 0:
        write_model(folder, config, experts, [3 + 2 * (i % 12) for i in range(prompts)], 4, options)
    meet(world)
    return Model(folder / "weights.h5", folder / "inputs.h5", options, f"E={experts}")
