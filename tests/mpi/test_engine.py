"""The engine, watched and hindered through subclasses: nothing waits for what it does not need, and all ends alike.

Each test runs on the first ranks of the launch (2 to 8, its parameter says how many); the others sleep in a barrier.
What comes out is compared bit for bit with the same job on one rank.
"""

from __future__ import annotations

import json
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from mpi4py import MPI

from moempi import mpi
from moempi.exchange.arrivals import Arrival
from moempi.exchange.engine import Engine
from moempi.files.init_weights import init_weights
from moempi.files.inputs import Prompts, write_inputs
from moempi.files.outputs import read_outputs
from moempi.job import Job, job_from_table
from moempi.report import Outcome
from moempi.run import run

pytestmark = pytest.mark.mpi

CONFIG = {
    "model_type": "qwen3_moe",
    "num_hidden_layers": 5,
    "mlp_only_layers": [0],
    "hidden_size": 16,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 8,
    "vocab_size": 37,
    "intermediate_size": 24,
    "moe_intermediate_size": 10,
    "num_experts": 2,
    "num_experts_per_tok": 2,
    "max_position_embeddings": 256,
}
FIRST, SECOND, _THIRD, FOURTH = 1, 2, 3, 4  # the MoE layers
SEED = 20240607


@pytest.fixture
def group(request: pytest.FixtureRequest) -> Iterator[MPI.Intracomm | None]:
    """A communicator of the first ranks; None on the ranks that have no part in the test."""
    world = MPI.COMM_WORLD
    assert world.size >= request.param, f"start this with {request.param} ranks or more"
    comm = world.Split(0 if world.rank < request.param else MPI.UNDEFINED, world.rank)
    mine = comm != MPI.COMM_NULL
    yield comm if mine else None
    if mine:
        comm.Free()
    mpi.meet(world)


def on(n: int) -> pytest.MarkDecorator:
    return pytest.mark.parametrize("group", [n], indirect=True, ids=[f"{n} ranks"])


@pytest.fixture
def folder(group: MPI.Intracomm | None) -> Iterator[Path | None]:
    """A folder that the ranks of the group share."""
    if group is None:
        yield None
        return
    path = group.bcast(tempfile.mkdtemp(prefix="moempi-engine-") if group.rank == 0 else None)
    yield Path(path)
    mpi.meet(group)
    if group.rank == 0:
        shutil.rmtree(path)


def write_model(folder: Path, lengths: list[int], *, gate_scale: float = 20.0, **config: Any) -> None:
    """Random weights and prompts of these lengths; for one rank."""
    print(f"seed {SEED}")
    (folder / "config.json").write_text(json.dumps(CONFIG | config))
    init_weights(folder / "config.json", folder / "weights.h5", SEED, "float32", gate_scale, 0.2)
    random = np.random.default_rng(SEED)
    tokens = [random.integers(0, CONFIG["vocab_size"], n, dtype=np.int32) for n in lengths]
    ids = [str(i) for i in range(len(tokens))]
    write_inputs(folder / "prompts.h5", Prompts(ids, tokens, None, np.zeros(len(tokens), np.int32)), {})


def make_job(folder: Path, output: str, **sections: dict[str, Any]) -> Job:
    """A job that generates 6 tokens per sequence; a test that hangs becomes a StallError."""
    table: dict[str, dict[str, Any]] = {
        "model": {"weights": "weights.h5"},
        "input": {"file": "prompts.h5"},
        "output": {"file": output},
        "generate": {"max_new_tokens": 6},
        "engine": {"stall_timeout": 60.0},
        "run": {"capacity": 4, "threads": 1},
        "placement": {"replicas": 0},
    }
    for name, options in sections.items():
        table[name] = table.get(name, {}) | options
    return job_from_table(table, folder / "job.toml")


def bits(folder: Path, name: str) -> tuple[bytes, bytes, bytes]:
    out = read_outputs(folder / name)
    return out.offsets.tobytes(), out.tokens.tobytes(), out.logprobs.tobytes()


def run_and_compare(
    group: MPI.Intracomm, folder: Path, engine_type: type[Engine] = Engine, **sections: dict[str, Any]
) -> Outcome:
    """Run the job on the group, and on one rank with the plain engine; the bits must be the same."""
    outcome = run(group, make_job(folder, "many.h5", **sections), engine_type=engine_type)
    assert outcome.exit_code == 0
    if group.rank == 0:
        run(MPI.COMM_SELF, make_job(folder, "alone.h5"))
        assert bits(folder, "many.h5") == bits(folder, "alone.h5")
    return outcome


# ---------------------------------------------------------------- no barrier between layers


@on(2)
def test_a_microbatch_overtakes_one_whose_answer_is_withheld(group: MPI.Intracomm | None, folder: Path) -> None:
    if group is None:
        return
    if group.rank == 0:
        write_model(folder, [3, 5, 2, 7, 4, 6, 1, 8])
    sent: list[tuple[int, int]] = []  # (microbatch, layer) of what rank 1 dispatches to rank 0
    held: list[Arrival] = []

    class Withholding(Engine):
        """Rank 0 keeps its first answer to rank 1's microbatch 0 until microbatch 1 is three layers further."""

        def answer(self, arrival: Arrival) -> None:
            where = (arrival.source, arrival.microbatch, arrival.layer)
            if self.rank == 0 and where == (1, 0, FIRST) and not held:
                held.append(arrival)
                return
            super().answer(arrival)
            if self.rank == 0 and where == (1, 1, FOURTH) and len(held) == 1:
                held.append(arrival)
                super().answer(held[0])

        def send(self, message: Any, layer: int, microbatch: int, *rest: Any) -> None:
            if self.rank == 1 and message.destination == 0:
                sent.append((microbatch, layer))
            super().send(message, layer, microbatch, *rest)

    run_and_compare(group, folder, Withholding, run={"microbatches": 2})
    if group.rank == 0:
        assert len(held) == 2, "the answer was never withheld, or never given"
    else:
        overtaken = sent[: sent.index((0, SECOND))]
        # A had dispatched in its first MoE layer, and B went through all four, before A came to its second.
        assert [layer for m, layer in overtaken if m == 0] == [FIRST]
        assert [layer for m, layer in overtaken if m == 1][:4] == [1, 2, 3, 4]


@on(3)
def test_an_expert_computes_rows_while_others_of_its_layer_are_under_way(
    group: MPI.Intracomm | None, folder: Path
) -> None:
    if group is None:
        return
    if group.rank == 0:
        write_model(folder, [3, 5, 2, 7, 4, 6], num_experts=3, num_experts_per_tok=3)
    notes = group.Dup()
    told: list[MPI.Request] = []
    kept: list[tuple[Any, ...]] = []
    computed: list[int] = []  # homes whose rows of the first MoE layer rank 0 has computed

    class Late(Engine):
        """Rank 2 keeps its first rows for rank 0 until rank 0 has computed rank 1's rows of that layer."""

        def send(self, message: Any, layer: int, *rest: Any) -> None:
            if self.rank == 2 and message.destination == 0 and not kept:
                kept.append((message, layer, *rest))
                return
            super().send(message, layer, *rest)

        def poll(self) -> bool:
            if len(kept) == 1 and notes.Iprobe(source=0):
                notes.recv(source=0)
                super().send(*kept[0])
                kept.append(())
            return super().poll()

        def answer(self, arrival: Arrival) -> None:
            if self.rank == 0 and arrival.layer == FIRST:
                computed.append(arrival.source)
                if arrival.source == 1 and not told:
                    told.append(notes.isend("computed", 2))
            super().answer(arrival)

    run_and_compare(group, folder, Late)
    if group.rank == 2:
        assert len(kept) == 2, "the rows were never kept back, or never sent"
    if group.rank == 0:
        assert computed.index(1) < computed.index(2)
        assert told[0].Test()
    notes.Free()


# ---------------------------------------------------------------- back-pressure


@on(4)
def test_a_budget_of_one_message_slows_the_run_and_does_not_stop_it(
    group: MPI.Intracomm | None, folder: Path
) -> None:
    if group is None:
        return
    if group.rank == 0:
        write_model(folder, [19, 23, 17, 21, 20, 9, 30, 22], num_experts=1, num_experts_per_tok=1)
    refused: list[int] = []
    held: list[Arrival] = []
    charged: list[int] = []

    class Counting(Engine):
        """Rank 0 keeps its first answer, and with it the budget, until another home's rows have been refused."""

        def _take_arrival(self, source: int, tag: int, nbytes: int) -> bool:
            taken = super()._take_arrival(source, tag, nbytes)
            charged.append(self.arrivals.held - self.arrivals.limit)
            if not taken:
                refused.append(source)
                if len(held) == 1:
                    held.append(held[0])
                    super().answer(held[0])
            return taken

        def answer(self, arrival: Arrival) -> None:
            if self.rank == 0 and arrival.source != 0 and not held:
                held.append(arrival)
                return
            super().answer(arrival)

    # Steps of 8 tokens: a whole chunk of a prompt is one largest message, which is what 0 bytes are raised to.
    sections = {"run": {"prefill_tokens": 8, "capacity": 4}, "exchange": {"arrival_budget": 0}}
    outcome = run_and_compare(group, folder, Counting, **sections)
    if group.rank == 0:
        assert refused and len(held) == 2
        assert max(charged) <= 0, "more was received than the budget allows"
        assert outcome.expert_rows[0] > 0 and not any(outcome.expert_rows[1:])


@on(4)
def test_pieces_and_the_smallest_budget_together(group: MPI.Intracomm | None, folder: Path) -> None:
    if group is None:
        return
    if group.rank == 0:
        write_model(folder, [19, 23, 17, 21], num_experts=3, num_experts_per_tok=2)
    exchange = {"arrival_budget": 0, "piece_bytes": 128}  # 2 rows of 16 float32
    run_and_compare(group, folder, exchange=exchange, run={"microbatches": 2})


# ---------------------------------------------------------------- uneven work


@on(4)
def test_all_rows_to_one_expert(group: MPI.Intracomm | None, folder: Path) -> None:
    if group is None:
        return
    lengths = [3, 5, 2, 7, 4, 6, 1, 8]
    if group.rank == 0:
        # A gate of zeros finds all experts alike, and the lowest number wins.
        write_model(folder, lengths, gate_scale=0.0, num_experts=4, num_experts_per_tok=1)
    outcome = run_and_compare(group, folder, run={"microbatches": 2})
    if group.rank == 0:
        n_moe_layers = 4
        tokens = sum(lengths) + len(lengths) * (6 - 1)
        assert outcome.expert_rows == (tokens * n_moe_layers, 0, 0, 0)


@on(8)
@pytest.mark.parametrize("lockstep", [False, True])
def test_ranks_without_sequences_and_without_experts(
    group: MPI.Intracomm | None, folder: Path, lockstep: bool
) -> None:
    if group is None:
        return
    if group.rank == 0:
        write_model(folder, [4, 9, 2], num_experts=5, num_experts_per_tok=2)
    outcome = run_and_compare(group, folder, exchange={"lockstep": lockstep})
    if group.rank == 0:
        assert sum(steps > 0 for steps in outcome.steps) == 3
        assert not any(outcome.expert_rows[5:])


@on(4)
def test_an_input_without_sequences(group: MPI.Intracomm | None, folder: Path) -> None:
    if group is None:
        return
    if group.rank == 0:
        write_model(folder, [])
    outcome = run_and_compare(group, folder)
    assert not any(outcome.steps) and not outcome.new_tokens


@on(4)
@pytest.mark.parametrize("lockstep", [False, True])
def test_one_long_sequence_among_short_ones(group: MPI.Intracomm | None, folder: Path, lockstep: bool) -> None:
    if group is None:
        return
    if group.rank == 0:
        write_model(folder, [150, *[1] * 12], num_experts=6, num_experts_per_tok=2)
    run = {"prefill_tokens": 16} if lockstep else {"prefill_tokens": 16, "microbatches": 3}
    outcome = run_and_compare(group, folder, exchange={"lockstep": lockstep}, run=run)
    if group.rank == 0:
        assert outcome.finished == 13 and outcome.new_tokens == 13 * 6


@on(4)
def test_homes_on_rank_0_alone(group: MPI.Intracomm | None, folder: Path) -> None:
    if group is None:
        return
    if group.rank == 0:
        write_model(folder, [4, 9, 2, 6, 3], num_experts=4, num_experts_per_tok=2)
    outcome = run_and_compare(group, folder, admission={"policy": "rank0"})
    if group.rank == 0:
        assert not any(outcome.steps[1:]) and all(outcome.expert_rows)
