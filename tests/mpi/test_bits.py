"""A result does not depend on the layout: tokens and log-probabilities are the same to the last bit.

Twenty random models with E = 1 to 20, new ones in every launch, and tinymoe, on 1, 2, 3, 4, 8 and 16 ranks, with every
option drawn that must not matter (`cases.FREE`). The reference is one rank, one thread, one microbatch, prompts
whole. MOEMPI_TEST_SEED=<the seed that was printed> makes the same models and layouts again.
"""

from __future__ import annotations

import signal
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from cases import REFERENCE, draw_cases
from layouts import Cut, Layout, Ran, fitting, run_all
from models import Model, difference, lengths_of, write_begun
from mpi4py import MPI

from moempi.device import cpu_rows
from moempi.errors import EXIT_COMMITTED, EXIT_DONE
from moempi.files.make_inputs import make_inputs
from moempi.files.outputs import read_outputs
from moempi.home import Home
from moempi.model import config
from moempi.mpi import Drain, meet
from moempi.run import run

pytestmark = pytest.mark.mpi

N_MODELS = 20
INPUTS = Path(__file__).parents[2] / "inputs"


@pytest.mark.parametrize("number", range(N_MODELS))
def test_random_models(
    world: MPI.Intracomm,
    seed: int,
    folder: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    number: int,
) -> None:
    if number % 2:
        # As in models whose weights no cache holds: other kernels, threads that share them, rows that wait.
        monkeypatch.setattr(config, "SMALL", 0)
        monkeypatch.setattr(cpu_rows, "SHARED", 0)
    case = draw_cases(seed, N_MODELS)[number]
    if world.rank == 0:
        with capsys.disabled():
            print(f"\n  MOEMPI_TEST_SEED={seed} model {number}: {case} ", end="", flush=True)
        case.write(folder)
    meet(world)
    model = case.model(folder)
    reference, *others = run_all(world, model, [REFERENCE, *fitting(world, case.layouts)], folder)
    compare(world, f"MOEMPI_TEST_SEED={seed} model {number}: {case}", reference, others)
    for layout in fitting(world, [case.continued]):
        go_on_halfway(world, model, reference, layout, folder)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_tinymoe(world: MPI.Intracomm, folder: Path, dtype: str) -> None:
    model = tinymoe(world, folder, dtype, prompts=10, new_tokens=8)
    layouts = [
        Layout(1, {"run.threads": 2, "run.prefill_tokens": 50}),
        Layout(2, {"run.threads": 2, "placement.strategy": "balanced", "run.microbatches": 3}),
        Layout(3, {"run.prefill_tokens": 16, "placement.replicas": 5, "exchange.arrival_budget": 0}),
        Layout(4, {"placement.strategy": "random", "run.microbatches": 4, "exchange.piece_bytes": 2000}),
        Layout(8, {"exchange.lockstep": True, "placement.replicas": 8}),
        Layout(16, {"placement.strategy": "linear", "run.microbatches": 2}),
    ]
    reference, *others = run_all(world, model, [REFERENCE, *fitting(world, layouts)], folder)
    compare(world, f"tinymoe {dtype}", reference, others)
    go_on_halfway(world, model, reference, Layout(2, {"run.prefill_tokens": 3, "run.capacity": 3}), folder)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_cuts_of_experts_with_the_same_leaves(world: MPI.Intracomm, seed: int, folder: Path, dtype: str) -> None:
    # Three experts of every layer in 2 or 4 pieces.
    case = draw_cases(seed, N_MODELS)[6]
    if world.rank == 0:
        case.write(folder)
    meet(world)
    moe = sorted(set(range(case.config["num_hidden_layers"])) - set(case.config["mlp_only_layers"]))
    for leaves in (2, 4, 8):
        options = {"model.dtype": dtype, "model.leaves": leaves}
        model = Model(folder / "weights.h5", folder / "inputs.h5", options, f"seed {seed}: {case}")
        four = min(leaves, 4)
        layouts = [
            cut_layout(n, [(layer, e, pieces) for layer in moe for e in range(3)])
            for n, pieces in ((2, 2), (3, 2), (4, four), (8, four), (16, 2))
        ]
        into = folder / f"leaves-{leaves}"
        make(world, into)
        reference, *others = run_all(world, model, [REFERENCE, *fitting(world, layouts)], into)
        compare(world, f"{model.about} leaves {leaves}", reference, others)


@pytest.mark.parametrize("number", [3, 11])
def test_a_drained_run_goes_on_in_another_layout(
    world: MPI.Intracomm, seed: int, folder: Path, monkeypatch: pytest.MonkeyPatch, number: int
) -> None:
    # Long completions, none of which ends at an end token before its time: the drain must find them half generated.
    case = replace(draw_cases(seed, N_MODELS)[number], new_tokens=[60, 59, 61, 60])
    if world.rank == 0:
        case.write(folder)
    meet(world)
    model = Model(folder / "weights.h5", folder / "inputs.h5", case.options | {"generate.stop_at_eos": False}, "")
    reference, uncut = run_all(world, model, [REFERENCE, Layout(min(4, world.size))], folder)
    compare(world, str(case), reference, [uncut])
    job = model.job(folder / "drained.h5", {"run.capacity": 2, "run.prefill_tokens": 64})
    drain = Drain()
    with monkeypatch.context() as patch:
        drain_after(patch, drain, tokens=5)
        outcome = run(world, job, drain=drain)
    assert outcome.exit_code == EXIT_COMMITTED
    partial = read_outputs(job.output.file) if world.rank == 0 else None
    meet(world)
    if partial is not None:
        assert 0 < len(partial.tokens) < sum(case.new_tokens)
    part = world.Split(0 if world.rank < 3 else 1, world.rank)
    if world.rank < 3:
        again = job.model_copy(update={"run": job.run.model_copy(update={"prefill_tokens": 7, "microbatches": 2})})
        assert run(part, again, resume=True).exit_code == EXIT_DONE
    part.Free()
    meet(world)
    if world.rank == 0:
        problem = difference(read_outputs(reference.job.output.file), job.output.file)
        assert not problem, f"seed {seed}: {case}: {problem}"
    meet(world)


# ---------------------------------------------------------------- what they are made of


def tinymoe(world: MPI.Intracomm, folder: Path, dtype: str, prompts: int, new_tokens: int) -> Model:
    """tinymoe with the first prompts of the demo. Collective."""
    if world.rank == 0:
        lines = (INPUTS / "prompts.jsonl").read_text(encoding="utf-8").splitlines(keepends=True)
        (folder / "prompts.jsonl").write_text("".join(lines[:prompts]), encoding="utf-8")
        make_inputs(folder / "prompts.jsonl", INPUTS / "tinymoe.h5", folder / "inputs.h5")
    meet(world)
    options = {"model.dtype": dtype, "generate.max_new_tokens": new_tokens}
    return Model(INPUTS / "tinymoe.h5", folder / "inputs.h5", options, f"tinymoe {dtype}")


def cut_layout(ranks: int, cuts: list[Cut]) -> Layout:
    """A layout with cut experts, and no replicas in the way of their pieces."""
    return Layout(ranks, {"run.microbatches": 2, "placement.replicas": 0}, tuple(cuts))


def make(world: MPI.Intracomm, folder: Path) -> None:
    """A folder that all ranks see. Collective."""
    if world.rank == 0:
        folder.mkdir()
    meet(world)


def compare(world: MPI.Intracomm, about: str, reference: Ran, others: Sequence[Ran]) -> None:
    """Fail on rank 0 where a run differs from the reference, or where the reference shows nothing. Collective."""
    if world.rank == 0:
        expected = read_outputs(reference.job.output.file)
        assert np.isfinite(expected.logprobs).all() and len(set(expected.logprobs.tolist())) > len(expected) // 2
        for ran in others:
            problem = difference(expected, ran.job.output.file)
            assert not problem, f"{about}\n{ran.layout}\n{problem}"
    meet(world)


def go_on_halfway(world: MPI.Intracomm, model: Model, reference: Ran, layout: Layout, folder: Path) -> None:
    """Prompts with the first k generated tokens behind them generate the rest with the same bits. Collective."""
    make(world, folder / "begun")
    begun, kept = folder / "begun" / "inputs.h5", None
    if world.rank == 0:
        expected = read_outputs(reference.job.output.file)
        # Of the first sequence one token is left to generate, of the second two, ...
        kept = [max(0, n - 1 - row) for row, n in enumerate(lengths_of(expected))]
        write_begun(begun, model.inputs, expected, kept)
    meet(world)
    (ran,) = run_all(world, model.with_inputs(begun), [layout], folder / "begun")
    if world.rank == 0:
        problem = difference(expected, ran.job.output.file, skip=kept)
        assert not problem, f"{model.about}, prefilled again with {kept} tokens\n{layout}\n{problem}"
    meet(world)


def drain_after(patch: pytest.MonkeyPatch, drain: Drain, tokens: int) -> None:
    """Request a drain on this rank once its home has accepted so many tokens."""
    accept, accepted = Home.accept, []

    def counting(home: Home, step, new: list[int], logprobs: list[float]) -> None:
        accept(home, step, new, logprobs)
        accepted.extend(new)
        if len(accepted) >= tokens:
            drain.signal = signal.SIGUSR1

    patch.setattr(Home, "accept", counting)
