"""`moempi bench layer` and `job` on 1, 2 and 3 ranks: they do the work that they time, all of it and no other."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from mpi4py import MPI
from stacks import check_trace

from moempi.bench.jobs import measure_jobs, phases_of, write_together
from moempi.bench.layers import CpuLayers, measure_layers
from moempi.bench.run_layers import run_layers
from moempi.bench.stack import Stack
from moempi.device.cpu import Cpu
from moempi.exchange.topology import look_around
from moempi.mpi import meet

pytestmark = pytest.mark.mpi

STACK = Stack(layers=3, d_model=48, hidden=20, experts=5, top_k=2, microbatches=2, dtype="float32", skew=1.0)
TOKENS, PASSES, ROUNDS = 7, 2, 2


@pytest.mark.parametrize("ranks", [1, 2, 3])
def test_the_stack_and_its_experts_alone_compute_the_same_rows(world: MPI.Intracomm, ranks: int) -> None:
    ranks = min(ranks, world.size)
    part = world.Split(0 if world.rank < ranks else MPI.UNDEFINED, world.rank)
    if part != MPI.COMM_NULL:
        with torch.inference_mode():
            layers = CpuLayers(look_around(part), Cpu(1), STACK, TOKENS, PASSES)
            computed = []
            for work, experts in ((layers.stack, layers.experts), (layers.pure, layers.alone)):
                before = experts.rows_computed
                work()
                meet(part)
                computed.append(experts.rows_computed - before)
            assert computed[0] == computed[1]
            every = part.allreduce(computed[0], op=MPI.SUM)
            assert every == ranks * STACK.microbatches * TOKENS * STACK.top_k * STACK.layers * PASSES
            times = measure_layers(part, layers, STACK.layers, ROUNDS)
            assert {name: len(rounds) for name, rounds in times.items()} == {"stack": ROUNDS, "pure": ROUNDS}
            assert times == part.bcast(times, root=0), "the slowest rank's, on all"
            layers.free()
        part.Free()
    meet(world)


@pytest.mark.parametrize("ranks", [1, 2, 3])
def test_results_have_a_line_for_every_number_of_tokens(world: MPI.Intracomm, ranks: int) -> None:
    ranks = min(ranks, world.size)
    part = world.Split(0 if world.rank < ranks else MPI.UNDEFINED, world.rank)
    if part != MPI.COMM_NULL:
        found = run_layers(part, STACK, (1, 5), device="cpu", rounds=1, passes=1)
        assert found["ranks"] == ranks and [one["tokens"] for one in found["results"]] == [1, 5]
        for one in found["results"]:
            assert one["ms"]["stack"] > 0 and one["of_pure"] == pytest.approx(one["ms"]["pure"] / one["ms"]["stack"])
        part.Free()
    meet(world)


@pytest.mark.parametrize("ranks", [1, 2, 3])
def test_the_trace_has_one_round_of_the_last_number_of_tokens(
    world: MPI.Intracomm, folder: Path, ranks: int
) -> None:
    ranks = min(ranks, world.size)
    part = world.Split(0 if world.rank < ranks else MPI.UNDEFINED, world.rank)
    path = folder / f"{ranks}.h5"
    if part != MPI.COMM_NULL:
        run_layers(part, STACK, (1, TOKENS), device="cpu", rounds=1, passes=PASSES, trace=path)
        if part.rank == 0:
            check_trace(path, STACK, ranks, TOKENS, PASSES)
        part.Free()
    meet(world)


def test_jobs_on_every_number_of_ranks(world: MPI.Intracomm, folder: Path) -> None:
    counts = [n for n in (1, 2, 3) if n <= world.size]
    config = {
        "model_type": "qwen3_moe", "hidden_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2,
        "num_key_value_heads": 1, "head_dim": 8, "vocab_size": 30, "intermediate_size": 8, "moe_intermediate_size": 8,
        "num_experts": 5, "num_experts_per_tok": 2, "mlp_only_layers": [], "norm_topk_prob": True,
        "tie_word_embeddings": True, "rope_theta": 1e4, "rms_norm_eps": 1e-6, "max_position_embeddings": 64,
        "eos_token_id": 0,
    }  # fmt: skip
    phases = phases_of(prompts=5, prompt_tokens=40, new_tokens=3)
    write_together(world, folder, config, phases, "float32")
    found = measure_jobs(world, folder, phases, counts, ["run.microbatches=2"], rounds=1)
    if world.rank:
        assert not found
    else:
        told = [(one["ranks"], one["phase"], one["tokens"]) for one in found]
        assert told == [(n, *of) for n in reversed(counts) for of in (("prefill", 200), ("decode", 15))]
        assert all(len(one["steps"]) == one["ranks"] and min(one["steps"]) > 0 for one in found)
