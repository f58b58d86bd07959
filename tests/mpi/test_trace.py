"""The trace adds up on any number of ranks, at every level, however the ranks share their cores.

One launch of 16 ranks runs all cases, as many at a time as fit; on fewer ranks, for debugging, the smaller ones. All
that is asked are properties of the records, never how long something took.
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

import numpy as np
import pytest
from layouts import Layout, Ran, fitting, run_all
from models import Model, write_model
from mpi4py import MPI

from moempi import analysis
from moempi.files.outputs import read_outputs
from moempi.mpi import meet
from moempi.stages import BARRIER, CONTAINERS, DECODE, EXPERT, EXPOSED, IDLE, PREFILL, STAGES, STEP

pytestmark = pytest.mark.mpi

CONFIG = {
    "model_type": "qwen3_moe",
    "hidden_size": 24,
    "num_hidden_layers": 3,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 12,
    "vocab_size": 50,
    "intermediate_size": 30,
    "moe_intermediate_size": 16,
    "num_experts": 6,
    "num_experts_per_tok": 2,
    "mlp_only_layers": [0],
    "norm_topk_prob": True,
    "tie_word_embeddings": True,
    "rope_theta": 1e4,
    "rms_norm_eps": 1e-6,
    "max_position_embeddings": 300,
    "eos_token_id": 0,
}
LENGTHS = [1, 30, 7, 64, 12, 3, 90, 5, 21, 2]
NEW = 4
FREE = {"generate.stop_at_eos": False, "run.threads": 1, "run.capacity": 2, "run.prefill_tokens": 40}
FLUSHING = {"trace.flush_every": 0.01}  # a part every few turns of the engine
LAYOUTS = [
    Layout(16, {"trace.level": "routes"}),
    Layout(8, {"trace.level": "full", "run.microbatches": 2, **FLUSHING}),
    Layout(4, {"trace.level": "routes", "exchange.piece_bytes": 300, "exchange.arrival_budget": 0}),
    Layout(3, {"trace.level": "summary", **FLUSHING}),
    Layout(1, {"trace.level": "full", **FLUSHING}),
    Layout(8, {"trace.level": "routes", "exchange.lockstep": True}),
    Layout(4, {"trace.level": "routes", "model.leaves": 2}, cuts=((1, 2, 2), (2, 0, 2))),
    Layout(2, {"trace.level": "routes", "admission.policy": "rank0", **FLUSHING}),
    Layout(4, {"trace.level": "full", "exchange.route": "leader", "exchange.ranks_per_node": 2}),
    Layout(3, {"trace.level": "routes", "exchange.route": "rail", "exchange.ranks_per_node": [2, 1]}),
    Layout(1, {"trace.level": "summary"}),
]


@pytest.fixture(scope="module")
def ran(world: MPI.Intracomm, _shared: Path) -> list[tuple[Ran, analysis.Trace]]:
    """Every layout that fits, run; the traces on rank 0, nothing elsewhere."""
    folder = _shared / "traces"
    if world.rank == 0:
        folder.mkdir()
        write_model(folder, CONFIG, 11, LENGTHS, NEW)
    meet(world)
    model = Model(folder / "weights.h5", folder / "inputs.h5", FREE, "weights seed 11")
    done = run_all(world, model, fitting(world, LAYOUTS), folder)
    return [(one, analysis.load(one.job.trace_file)) for one in done] if world.rank == 0 else []


def of_level(ran: Iterable[tuple[Ran, analysis.Trace]], *levels: str) -> list[tuple[Ran, analysis.Trace]]:
    return [(one, trace) for one, trace in ran if trace.level in levels]


def test_all_counts_agree_exactly(ran: list[tuple[Ran, analysis.Trace]]) -> None:
    for one, trace in ran:
        assert analysis.disagreements(trace, read_outputs(one.job.output.file)) == [], str(one.layout)
        tokens = sum(LENGTHS) + len(LENGTHS) * (NEW - 1)
        assert trace.load.sum(axis=1).tolist() == [0, 2 * tokens, 2 * tokens], str(one.layout)


def test_leaf_stages_cover_every_rank_from_its_first_look_at_work_to_its_last(
    ran: list[tuple[Ran, analysis.Trace]],
) -> None:
    for one, trace in ran:
        assert analysis.coverage(trace).tolist() == [1.0] * one.layout.ranks, str(one.layout)
        wall = analysis.wall_time(trace)
        # Rank 0's clock around the loop and the meeting before it: the recorded time lies inside, and is most of it.
        assert wall[0] <= one.outcome.seconds, str(one.layout)
        assert (wall > 0).all(), str(one.layout)


def test_spans_are_a_partition_of_the_wall_time(ran: list[tuple[Ran, analysis.Trace]]) -> None:
    for one, trace in of_level(ran, "full", "routes"):
        spans, leaf = trace.spans, trace.spans["stage"] >= len(CONTAINERS)
        assert (spans["end"] >= spans["begin"]).all()
        for rank, begin, end in zip(*(trace.wall[name] for name in ("rank", "begin", "end")), strict=True):
            mine = leaf & (spans["rank"] == rank)
            assert spans["begin"][mine][0] == begin and spans["end"][mine][-1] == end, str(one.layout)
            assert np.array_equal(spans["begin"][mine][1:], spans["end"][mine][:-1]), str(one.layout)


def test_messages_have_their_peer_and_bytes(ran: list[tuple[Ran, analysis.Trace]]) -> None:
    stages = {"dispatch": ["dispatch", "collect"], "answer": ["answer"], "relay": ["relay", "return", "deliver"]}
    for one, trace in of_level(ran, "full", "routes"):
        for stage, kinds in stages.items():
            mine = (trace.spans["stage"] == STAGES.index(stage)) & (trace.spans["peer"] >= 0)
            sent = np.zeros((one.layout.ranks,) * 2, dtype=np.int64)
            np.add.at(sent, (trace.spans["rank"][mine], trace.spans["peer"][mine]), trace.spans["bytes"][mine])
            away = ~np.eye(one.layout.ranks, dtype=bool)
            counted = sum(analysis.traffic_matrix(trace, kind) for kind in kinds) * away
            assert np.array_equal(sent, counted), f"{stage}: {one.layout}"
        for kind in analysis.KINDS:
            messages = analysis.traffic_matrix(trace, kind, "messages").sum()
            assert messages == analysis.size_histogram(trace, kind).sum(), f"{kind}: {one.layout}"


def test_every_wait_has_a_rank_that_it_was_for(ran: list[tuple[Ran, analysis.Trace]]) -> None:
    for one, trace in ran:
        answers, waits = analysis.waits_matrix(trace, "answers"), analysis.waits_matrix(trace, "waits")
        if "exchange.route" not in one.layout.options:  # relays bring several answers in one message
            assert np.array_equal(answers, analysis.received_matrix(trace, "answer", "messages").T), str(one.layout)
        steps, moe_layers = analysis.spans_per_stage(trace)[:, STEP], 2
        assert waits.sum(axis=1).tolist() == (steps * moe_layers).tolist(), str(one.layout)
        exposed = analysis.waits_matrix(trace, "exposed_time").sum(axis=1)
        assert np.allclose(exposed / 1e9, analysis.time_per_stage(trace)[:, EXPOSED]), str(one.layout)
        computed, had_rows = analysis.expert_utilisation(trace)
        assert (computed <= had_rows + 1e-9).all() and (had_rows <= 1).all(), str(one.layout)


def test_prefill_and_decode_are_apart(ran: list[tuple[Ran, analysis.Trace]]) -> None:
    for one, trace in ran:
        phases = analysis.steps_per_phase(trace)
        tokens = sum(LENGTHS) + len(LENGTHS) * (NEW - 1)
        assert sum(count for _, count, _ in phases.values()) == tokens, str(one.layout)
        assert sum(steps for steps, _, _ in phases.values()) == sum(one.outcome.steps), str(one.layout)
        assert phases["prefill"][1] >= sum(LENGTHS) - len(LENGTHS), str(one.layout)
        apart = sum(analysis.time_per_stage(trace, phase) for phase in (PREFILL, DECODE))
        assert apart[:, EXPERT].sum() == 0 and (apart[:, [IDLE, EXPOSED, BARRIER]] == 0).all(), str(one.layout)


def test_only_lockstep_waits_for_all(ran: list[tuple[Ran, analysis.Trace]]) -> None:
    for one, trace in ran:
        barrier = analysis.spans_per_stage(trace)[:, BARRIER].sum()
        assert (barrier > 0) == bool(one.layout.options.get("exchange.lockstep", False)), str(one.layout)
