"""A run says what `transformers` says: all logits of random models, and what tinymoe generates.

The ranks of the launch stand in groups of 8, 4, 3 and 1, or all together; every random model is run by one of
these, with prefill, decode, router and messages as in any run, and its group's first rank compares. A run gives away
only the tokens it chose, so its forward passes are watched: they keep the logits of every row.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from mpi4py import MPI
from qwen import (
    CONFIGS,
    MOST_EXCLUDED,
    TOLERANCE,
    Model,
    comparable,
    load_transformers,
    make_model,
    pass_transformers,
    relative_difference,
)

from moempi import mpi
from moempi import run as spine
from moempi.batch import Step
from moempi.build import Rank, build_rank
from moempi.files.export_weights import export_checkpoint
from moempi.files.inputs import Prompts, read_inputs, write_inputs
from moempi.files.make_inputs import make_inputs
from moempi.files.outputs import read_outputs
from moempi.files.weights import open_weights
from moempi.job import Job, job_from_table
from moempi.layer import CpuForward
from moempi.model.config import ModelConfig
from moempi.model.gate import Route
from moempi.model.network import Layer

pytestmark = pytest.mark.mpi

INPUTS = Path(__file__).parents[2] / "inputs"
# Ranks of each group; a smaller launch is for debugging.
GROUPS = (8, 4, 3, 1) if mpi.launched_size() == 16 else (mpi.launched_size() - 1, 1)
TOGETHER = (sum(GROUPS),)
NEW_TOKENS = 5

Show = Callable[[str], None]
Kept = dict[tuple[int, int], torch.Tensor]  # {(row of the input, position): logits [V]}

# What a model is run with, in turn; the packed, replicated and chunked ways of a run are all among them.
LAYOUTS: tuple[dict[str, dict[str, Any]], ...] = (
    {"run": {"prefill_tokens": 7, "microbatches": 2}},
    {"placement": {"strategy": "random", "seed": 3}, "run": {"capacity": 40}},
    {"placement": {"strategy": "balanced", "replicas": "auto"}, "run": {"capacity": 3, "microbatches": 3}},
    {"model": {"leaves": 4}, "run": {"prefill_tokens": 50}},
    {"admission": {"policy": "rank0"}, "run": {"capacity": 12}},
)


# ---------------------------------------------------------------- watching a run


@dataclass(frozen=True)
class Watched(CpuForward):
    """Keeps the logits of every row of every step."""

    kept: Kept = field(default_factory=dict)

    async def choose(self, x: torch.Tensor, step: Step) -> tuple[list[int], list[float]]:
        logits = self.network.logits(x)
        places = zip(step.owners.tolist(), step.plan.positions.tolist(), strict=True)
        self.kept.update(zip(places, logits, strict=True))
        return await super().choose(x, step)


@dataclass(frozen=True)
class Forced(Watched):
    """Sends every row to experts that are given, with the weights that its own gate has for these."""

    experts: dict[int, list[torch.Tensor]] = field(default_factory=dict)  # {MoE layer: [T, K] of every input row}

    def gate(self, layer: Layer, x: torch.Tensor, step: Step) -> tuple[torch.Tensor, Route]:
        hidden, _ = super().gate(layer, x, step)
        given = self.experts[layer.number]
        places = zip(step.owners.tolist(), step.plan.positions.tolist(), strict=True)
        experts = torch.stack([given[row][position] for row, position in places])
        weights = layer.gate(hidden.float()).softmax(-1).gather(-1, experts)
        if layer.config.normalize_gate:
            weights = weights / weights.sum(-1, keepdim=True)
        return hidden, Route(experts, weights)


def run_watched(comm: MPI.Intracomm, job: Job, kind: type[Watched], **more: Any) -> Kept:
    """Run a job whose forward passes are of this kind; all that they kept, on the first rank. Collective."""
    watched: list[Watched] = []

    def build(*args: Any, **options: Any) -> Rank:
        rank = build_rank(*args, **options)
        held = {each.name: getattr(rank.forward, each.name) for each in fields(CpuForward)}
        watched.append(kind(**held, **more))
        return replace(rank, forward=watched[0])

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(spine, "build_rank", build)
        spine.run(comm, job)
    gathered = comm.gather(watched[0].kept, root=0)
    return {place: logits for kept in gathered or [] for place, logits in kept.items()}


# ---------------------------------------------------------------- who runs what


@contextmanager
def group(world: MPI.Intracomm, sizes: tuple[int, ...], folder: Path) -> Iterator[tuple[int, MPI.Intracomm, Path]]:
    """This rank's group among groups of these sizes: number, communicator and folder. Collective over the launch."""
    assert sum(sizes) == world.size, f"groups of {sizes} ranks; this launch has {world.size}"
    number = int(np.searchsorted(np.cumsum(sizes), world.rank, side="right"))
    comm = world.Split(number, world.rank)
    path = folder / str(number)
    if comm.rank == 0:
        path.mkdir()
    yield number, comm, path
    mpi.meet(world)
    comm.Free()


@pytest.fixture
def show(world: MPI.Intracomm, capsys: pytest.CaptureFixture[str]) -> Show:
    """Prints on rank 0, whether or not the test fails."""

    def on_rank_0(text: str) -> None:
        if world.rank == 0:
            with capsys.disabled():
                print(f"\n{text}", flush=True)

    return on_rank_0


def share_of(number: int, n_groups: int) -> list[int]:
    """Which of the random models a group runs; the last two are left to all ranks together."""
    return list(range(number, CONFIGS - 2, n_groups)) if n_groups > 1 else [CONFIGS - 2, CONFIGS - 1]


def job_of(folder: Path, model: Model, number: int, new_tokens: int) -> Job:
    """The job that runs a model's sequences."""
    table: dict[str, dict[str, Any]] = {
        "model": {"weights": str(model.weights)},
        "input": {"file": "prompts.h5"},
        "output": {"file": f"out-{number}.h5"},
        "generate": {"max_new_tokens": new_tokens, "stop_at_eos": False},
        "engine": {"stall_timeout": 60.0},
        "trace": {"level": "off"},
    }
    for name, options in LAYOUTS[number % len(LAYOUTS)].items():
        table[name] = table.get(name, {}) | options
    return job_from_table(table, folder / "job.toml")


def write_prompts(folder: Path, sequences: list[list[int]]) -> None:
    ids = [str(row) for row in range(len(sequences))]
    tokens = [np.array(sequence, dtype=np.int32) for sequence in sequences]
    write_inputs(folder / "prompts.h5", Prompts(ids, tokens, None, np.zeros(len(ids), np.int32)), {})


def prepare(comm: MPI.Intracomm, folder: Path, seed: int, gate_scale: float) -> Model:
    """A random model on the group's disk, and its prompts. Collective."""
    model = None
    if comm.rank == 0:
        model = make_model(folder / str(seed), seed, gate_scale)
        write_prompts(folder, model.sequences)
    mpi.meet(comm)
    return comm.bcast(model, root=0)


def logits_of(kept: Kept, row: int, n_tokens: int) -> torch.Tensor:
    """[T, V] of one sequence; a position that no step computed is a KeyError."""
    return torch.stack([kept[row, position] for position in range(n_tokens)])


# ---------------------------------------------------------------- the logits of random models


@pytest.mark.parametrize("sizes", [GROUPS, TOGETHER], ids=["groups", "together"])
def test_all_logits_are_those_of_transformers(
    world: MPI.Intracomm, sizes: tuple[int, ...], folder: Path, seed: int, show: Show
) -> None:
    show(f"seeds {seed} to {seed + CONFIGS - 1} (MOEMPI_TEST_SEED={seed}), groups of {sizes} ranks")
    with group(world, sizes, folder) as (number, comm, path):
        counts = [compare_free_run(comm, path, seed + i, i) for i in share_of(number, len(sizes))]
    gathered = world.gather(counts, root=0)
    if gathered is not None:
        total, excluded, worst = zip(*(count for counts in gathered for count in counts), strict=True)
        show(f"{sum(total)} tokens, {sum(excluded)} excluded; worst difference {max(worst):.1e} of the largest logit")
        assert sum(excluded) < MOST_EXCLUDED * sum(total), f"MOEMPI_TEST_SEED={seed}"


def compare_free_run(comm: MPI.Intracomm, folder: Path, seed: int, number: int) -> tuple[int, int, float]:
    """Tokens, tokens excluded and largest relative difference of one model; zeros on ranks that don't compare."""
    model = prepare(comm, folder, seed, gate_scale=20.0)
    job = job_of(folder, model, number, NEW_TOKENS)
    kept = run_watched(comm, job, Watched)
    if comm.rank:
        return 0, 0, 0.0
    config, theirs = read_config(model), load_transformers(model.checkpoint)
    out, total, excluded, worst = read_outputs(job.output.file), 0, 0, 0.0
    assert np.all(np.diff(out.offsets) == NEW_TOKENS), model
    for row, prompt in enumerate(model.sequences):
        tokens = prompt + out.tokens[out.offsets[row] : out.offsets[row + 1]].tolist()[:-1]
        expected, gates = pass_transformers(theirs, tokens, config.moe_layers)
        keep = comparable(gates, config.top_k, config.n_layers)
        found = logits_of(kept, row, len(tokens))
        worst = max(worst, relative_difference(found[keep], expected[keep]))
        total, excluded = total + len(tokens), excluded + int((~keep).sum())
        assert worst <= TOLERANCE, f"{worst:.1e} in sequence {row} of {len(tokens)} tokens, {comm.size} ranks; {model}"
    return total, excluded, worst


def read_config(model: Model) -> ModelConfig:
    with open_weights(model.weights) as weights:
        return weights.config


@pytest.mark.parametrize("sizes", [GROUPS, TOGETHER], ids=["groups", "together"])
def test_with_the_routes_of_transformers_every_token_is_compared(
    world: MPI.Intracomm, sizes: tuple[int, ...], folder: Path, seed: int, show: Show
) -> None:
    """Nothing is excluded, so gates may be as narrow as they like: these nearly tie all the time."""
    show(f"seeds {seed} to {seed + CONFIGS - 1} (MOEMPI_TEST_SEED={seed}), groups of {sizes} ranks")
    with group(world, sizes, folder) as (number, comm, path):
        worst = max(compare_forced_run(comm, path, seed + i, i) for i in share_of(number, len(sizes)))
    gathered = world.gather(worst, root=0)
    if gathered is not None:
        show(f"worst difference {max(gathered):.1e} of the largest logit")


def compare_forced_run(comm: MPI.Intracomm, folder: Path, seed: int, number: int) -> float:
    """Largest relative difference of one model; 0 on ranks that don't compare."""
    model = prepare(comm, folder, seed, gate_scale=1.0)
    passes, experts = [], None
    if comm.rank == 0:
        config, theirs = read_config(model), load_transformers(model.checkpoint)
        passes = [pass_transformers(theirs, sequence, config.moe_layers) for sequence in model.sequences]
        # As its router chooses: the largest probabilities.
        experts = {
            layer: [gates[layer].softmax(-1, torch.float).topk(config.top_k).indices for _, gates in passes]
            for layer in config.moe_layers
        }
    experts = comm.bcast(experts, root=0)
    kept = run_watched(comm, job_of(folder, model, number, new_tokens=1), Forced, experts=experts)
    worst = 0.0
    for row, (expected, _) in enumerate(passes):
        worst = max(worst, relative_difference(logits_of(kept, row, len(expected)), expected))
        assert worst <= TOLERANCE, f"{worst:.1e} in sequence {row}, {comm.size} ranks; {model}"
    return worst


# ---------------------------------------------------------------- what tinymoe generates

GENERATORS = 2  # ranks that run transformers; the others sleep
N_PROMPTS, N_NEW = 64, 64
Generated = tuple[list[int], list[float]]  # tokens, and how far the best logit was ahead of the second
TIE = 1e-4  # between the two best logits: here, and here only, a run may take the other one


def test_tinymoe_generates_what_transformers_generates(world: MPI.Intracomm, folder: Path, show: Show) -> None:
    if world.rank == 0:
        export_checkpoint(INPUTS / "tinymoe.h5", folder / "checkpoint")
        make_inputs(INPUTS / "prompts.jsonl", INPUTS / "tinymoe.h5", folder / "all.h5")
        write_prompts(folder, [tokens.tolist() for tokens in read_inputs(folder / "all.h5").tokens[:N_PROMPTS]])
    mpi.meet(world)
    prompts = [tokens.tolist() for tokens in read_inputs(folder / "prompts.h5").tokens]
    assert len(prompts) == N_PROMPTS
    job = tinymoe_job(folder)
    spine.run(world, job)
    theirs = {}
    if world.rank < GENERATORS:
        theirs = generate_with_transformers(folder / "checkpoint", prompts, world.rank)
    mpi.meet(world)
    gathered = world.gather(theirs, root=0)
    if gathered is not None:
        expected = {row: each for part in gathered for row, each in part.items()}
        out = read_outputs(job.output.file)
        ours = [out.tokens[out.offsets[row] : out.offsets[row + 1]].tolist() for row in range(N_PROMPTS)]
        check_generated(ours, [expected[row] for row in range(N_PROMPTS)], show)


def tinymoe_job(folder: Path) -> Job:
    table = {
        "model": {"weights": str(INPUTS / "tinymoe.h5"), "dtype": "float32"},
        "input": {"file": "prompts.h5"},
        "output": {"file": "tinymoe-out.h5"},
        "generate": {"max_new_tokens": N_NEW, "stop_at_eos": False},
        "trace": {"level": "off"},
    }
    return job_from_table(table, folder / "job.toml")


def generate_with_transformers(checkpoint: Path, prompts: list[list[int]], first: int) -> dict[int, Generated]:
    """Greedy generation, batch 1 with a cache, of every prompt that is this rank's."""
    model, generated = load_transformers(checkpoint), {}
    for row in range(first, len(prompts), GENERATORS):
        found = model.generate(
            torch.tensor([prompts[row]]),
            max_new_tokens=N_NEW,
            do_sample=False,
            use_cache=True,
            eos_token_id=None,
            pad_token_id=0,
            output_logits=True,
            return_dict_in_generate=True,
        )
        best = torch.cat(found.logits).topk(2).values  # [new tokens, 2]
        ahead = (best[:, 0] - best[:, 1]).tolist()
        generated[row] = (found.sequences[0, len(prompts[row]) :].tolist(), ahead)
    return generated


def check_generated(ours: list[list[int]], theirs: list[Generated], show: Show) -> None:
    ties, wrong = [], []
    for row, (found, (expected, ahead)) in enumerate(zip(ours, theirs, strict=True)):
        assert len(found) == len(expected) == N_NEW
        first = next((i for i in range(N_NEW) if found[i] != expected[i]), None)
        if first is not None:
            (ties if ahead[first] < TIE else wrong).append(f"prompt {row}, token {first}, {ahead[first]:.1e} ahead")
    smallest = min(min(ahead) for _, ahead in theirs)
    show(f"{len(ours)} x {N_NEW} tokens, {len(ties)} ties {ties}; smallest distance {smallest:.1e}")
    assert not wrong, f"first divergences that are no ties: {wrong}"
