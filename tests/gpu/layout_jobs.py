"""Whole jobs of small random models on one GPU that 1, 2 and 4 ranks share, or on an emulated one; and what must hold.

One launch per number of ranks and engine runs all of its jobs.
"""

from __future__ import annotations

import json
import random
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

sys.path.insert(0, str(Path(__file__).parents[1] / "mpi"))

from layouts import Cut, Layout, job_of, write_cuts
from models import Model, difference, random_config, write_model

from moempi.files.outputs import read_outputs
from moempi.job import Job, to_toml

PROGRAMS = Path(__file__).parent / "programs"
ON_GPU = {"run.device": "cuda", "run.share_gpus": True}
DTYPES = "float32", "bfloat16"
NEAR = 2e-3  # a greedy choice between two tokens whose log-probabilities are closer than this may fall either way


@dataclass(frozen=True)
class Case:
    """A job on some ranks."""

    name: str
    ranks: int
    options: Mapping[str, Any] = field(default_factory=dict)
    engine: str = "plain"


CASES = (
    Case("one", 1),
    Case("one-token-by-token", 1, {"run.prefill_tokens": 1, "run.capacity": 1}),
    Case("two", 2, {"exchange.gpu_aware": "on", "run.microbatches": 2}),
    Case("two-staged", 2, {"exchange.gpu_aware": "off", "run.prefill_tokens": 7, "run.microbatches": 3}),
    Case("two-auto", 2, {"exchange.gpu_aware": "auto"}),
    Case("four", 4, {"exchange.gpu_aware": "on", "run.microbatches": 2, "placement.strategy": "random"}),
    Case("four-tight", 4, {"exchange.gpu_aware": "on", "exchange.arrival_budget": 0, "run.microbatches": 4}),
    Case("four-pieces", 4, {"exchange.gpu_aware": "on", "exchange.piece_bytes": 600, "placement.replicas": 2}),
    Case("four-lockstep", 4, {"exchange.gpu_aware": "on", "exchange.lockstep": True, "run.capacity": 3}),
    Case("two-poisoned", 2, {"exchange.gpu_aware": "on", "run.microbatches": 3}, engine="poisoned"),
    Case("two-staged-poisoned", 2, {"exchange.gpu_aware": "off", "run.microbatches": 3}, engine="poisoned"),
)
LEAFY = (
    Case("leaves-one", 1, {"model.leaves": 4}),
    Case("leaves-cut", 4, {"model.leaves": 4, "exchange.gpu_aware": "on", "placement.replicas": 0}),
)


@dataclass(frozen=True)
class Runs:
    """What came out, by (model, case)."""

    outputs: Mapping[tuple[str, str], Path]


def models(folder: Path, dtypes: Sequence[str], n: int, longest: int) -> dict[str, Model]:
    rng = random.Random(20260101)
    made = {}
    for dtype in dtypes:
        for i in range(n):
            place = folder / f"{dtype}-{i}"
            place.mkdir()
            config = random_config(rng, rng.choice([4, 5, 8]))
            lengths = [70, *(rng.randint(1, longest) for _ in range(6))]  # the first one goes over a page
            made[place.name] = write_model(place, config, 100 + i, lengths, 9, {"model.dtype": dtype})
    return made


def run_all(
    folder: Path, program: str, dtypes: Sequence[str] = DTYPES, n_models: int = 2, longest: int = 90
) -> Runs:
    """All jobs, run: one launch for each number of ranks, device and engine.

    Args:
        program: of PROGRAMS, which runs those on a GPU.
        longest: prompt, but for one of 70 tokens.
    """
    outputs: dict[tuple[str, str], Path] = {}
    launches: dict[tuple[int, str, str], list[Job]] = {}
    for name, model in models(folder, dtypes, n_models, longest).items():
        for case in (*CASES, *LEAFY, Case("cpu", 1), Case("cpu-leaves", 1, {"model.leaves": 4})):
            device = "cpu" if case.name.startswith("cpu") else "cuda"
            options = {**case.options, **(ON_GPU if device == "cuda" else {"run.device": "cpu"})}
            outputs[name, case.name] = folder / f"{name}.{case.name}.h5"
            layout = Layout(case.ranks, options, _cuts(case, model))
            job = job_of(model, layout, outputs[name, case.name])
            if layout.cuts:
                write_cuts(job, layout)
            launches.setdefault((case.ranks, device, case.engine), []).append(job)
    for (ranks, device, engine), jobs in launches.items():
        name = "run_jobs.py" if device == "cpu" else program
        _launch(folder / f"{ranks}-{device}-{engine}", PROGRAMS / name, ranks, engine, jobs)
    return Runs(outputs)


def _cuts(case: Case, model: Model) -> tuple[Cut, ...]:
    from moempi.files.weights import open_weights

    if case.name != "leaves-cut":
        return ()
    with open_weights(model.weights) as weights:
        layer = weights.config.moe_layers[0]
    return ((layer, 0, 4), (layer, 1, 2))


def _launch(folder: Path, program: Path, ranks: int, engine: str, jobs: Sequence[Job]) -> None:
    folder.mkdir()
    names = []
    for i, job in enumerate(jobs):
        names.append(str(folder / f"{i}.toml"))
        Path(names[-1]).write_text(to_toml(job))
    (folder / "list.json").write_text(json.dumps(names))
    command = [sys.executable, str(program), str(folder / "list.json"), engine]
    if ranks > 1:
        command = [sys.executable, "-m", "moempi.launch", "-n", str(ranks), "--", *command]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    print(done.stdout[-2000:])
    assert done.returncode == 0, f"{folder.name}: {done.stdout[-1000:]} {done.stderr[-4000:]}"


def check_layouts(runs: Runs, name: str) -> None:
    """Ranks, messages, microbatches, chunks, replicas, pieces and freed blocks: the bits of one rank alone."""
    expected = read_outputs(runs.outputs[name, "one"])
    for case in CASES:
        assert not difference(expected, runs.outputs[name, case.name]), case.name


def check_cuts(runs: Runs, name: str) -> None:
    """Experts cut in parts."""
    expected = read_outputs(runs.outputs[name, "leaves-one"])
    assert not difference(expected, runs.outputs[name, "leaves-cut"])


def check_tokens(runs: Runs, name: str, cpu: str, gpu: str) -> None:
    """Those of the CPU, in float32; a sequence is compared up to a choice near a tie, and few may have any."""
    expected, found = read_outputs(runs.outputs[name, cpu]), read_outputs(runs.outputs[name, gpu])
    ties = 0
    for row in range(len(expected)):
        span = slice(int(expected.offsets[row]), int(expected.offsets[row + 1]))
        ours = slice(int(found.offsets[row]), int(found.offsets[row + 1]))
        differs = np.flatnonzero(expected.tokens[span] != found.tokens[ours])
        same = int(differs[0]) if len(differs) else span.stop - span.start
        wanted, got = expected.logprobs[span], found.logprobs[ours]
        assert np.allclose(wanted[:same], got[:same], atol=1e-3), row
        if len(differs):
            ties += 1
            assert abs(wanted[same] - got[same]) < NEAR, (row, same)
    assert ties <= 1
