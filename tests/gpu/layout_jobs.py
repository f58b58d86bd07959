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

from moempi import analysis
from moempi.exchange.predict import RowSizes, messages_from_routes
from moempi.exchange.slots import layer_tables
from moempi.files.outputs import read_outputs
from moempi.job import Job, to_toml
from moempi.prepare import look
from moempi.stages import CONTAINERS

PROGRAMS = Path(__file__).parent / "programs"
ON_GPU = {"run.device": "cuda", "run.share_gpus": True}
ROUTES = {"trace.level": "routes"}
TIGHT = {"exchange.arrival_budget": 0, "run.prefill_tokens": 16, "run.capacity": 3}
DTYPES = "float32", "bfloat16"
DENSE = "dense"  # a model without experts
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
    Case("two", 2, {"exchange.gpu_aware": "on", "run.microbatches": 2, **ROUTES}),
    Case("two-staged", 2, {"exchange.gpu_aware": "off", "run.prefill_tokens": 7, "run.microbatches": 3, **ROUTES}),
    Case("two-auto", 2, {"exchange.gpu_aware": "auto"}),
    Case("four", 4, {"exchange.gpu_aware": "on", "run.microbatches": 2, "placement.strategy": "random", **ROUTES}),
    Case("four-tight", 4, {"exchange.gpu_aware": "on", "run.microbatches": 4, **TIGHT}),
    Case("four-pieces", 4, {"exchange.gpu_aware": "on", "exchange.piece_bytes": 600, "placement.replicas": 2} | ROUTES),
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
    jobs: Mapping[tuple[str, str], Job]


def models(folder: Path, dtypes: Sequence[str], n: int, longest: int) -> dict[str, Model]:
    rng = random.Random(20260101)
    made = {}
    for dtype in dtypes:
        for i in range(n):
            place = folder / f"{dtype}-{i}"
            place.mkdir()
            config = random_config(rng, rng.choice([4, 5, 8]))
            config["eos_token_id"] = list(range(0, config["vocab_size"], 6))  # some sequences end by their tokens
            if i == 0 and config["num_hidden_layers"] > 1:
                config["mlp_only_layers"] = [0]  # what a step begins with has no experts
            if i == 0 and dtype == "bfloat16":
                config["hidden_size"] += config["hidden_size"] % 2  # rows of whole words are sent in frames
            lengths = [70, *(rng.randint(1, longest) for _ in range(6))]  # the first one goes over a page
            made[place.name] = write_model(place, config, 100 + i, lengths, 9, {"model.dtype": dtype})
    (folder / DENSE).mkdir()
    config = random_config(rng, 4)
    config["mlp_only_layers"] = list(range(config["num_hidden_layers"]))
    made[DENSE] = write_model(folder / DENSE, config, 99, [5, 9, 1], 4, {"model.dtype": "float32"})
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
    named: dict[tuple[str, str], Job] = {}
    launches: dict[tuple[int, str, str], list[Job]] = {}
    for name, model in models(folder, dtypes, n_models, longest).items():
        all_cases = *CASES, *LEAFY, Case("cpu", 1), Case("cpu-leaves", 1, {"model.leaves": 4})
        for case in (case for case in all_cases if name != DENSE or case.name in ("one", "two")):
            device = "cpu" if case.name.startswith("cpu") else "cuda"
            options = {**case.options, **(ON_GPU if device == "cuda" else {"run.device": "cpu"})}
            outputs[name, case.name] = folder / f"{name}.{case.name}.h5"
            layout = Layout(case.ranks, options, _cuts(case, model))
            job = job_of(model, layout, outputs[name, case.name])
            if layout.cuts:
                write_cuts(job, layout)
            launches.setdefault((case.ranks, device, case.engine), []).append(job)
            named[name, case.name] = job
    for (ranks, device, engine), jobs in launches.items():
        name = "run_jobs.py" if device == "cpu" else program
        launch(folder / f"{ranks}-{device}-{engine}", PROGRAMS / name, ranks, engine, jobs)
    return Runs(outputs, named)


def _cuts(case: Case, model: Model) -> tuple[Cut, ...]:
    from moempi.files.weights import open_weights

    if case.name != "leaves-cut":
        return ()
    with open_weights(model.weights) as weights:
        layer = weights.config.moe_layers[0]
    return ((layer, 0, 4), (layer, 1, 2))


def launch(folder: Path, program: Path, ranks: int, engine: str, jobs: Sequence[Job]) -> None:
    """Run jobs, one after the other, with what a program of PROGRAMS makes of an engine's name."""
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


def check_dense(runs: Runs) -> None:
    """A model without experts, of which no rank sends any rows."""
    expected = read_outputs(runs.outputs[DENSE, "one"])
    assert len(expected) == 3 and not difference(expected, runs.outputs[DENSE, "two"])


def check_traces(runs: Runs, name: str) -> None:
    """Traffic is what the routes say, spans are a partition of each rank's time, and all counts agree."""
    for case in (case for case in CASES if "trace.level" in case.options):
        job = runs.jobs[name, case.name]
        trace, shape = analysis.load(job.trace_file), look(job, case.ranks).shape
        sizes = RowSizes(shape.config.d_model, shape.dtype.itemsize, shape.layout.piece_rows)
        predicted = messages_from_routes(trace.routes, layer_tables(shape.layout.placement), sizes)
        order = np.lexsort([trace.traffic[key] for key in ("destination", "layer", "kind", "source")])
        for key, column in predicted.items():
            assert np.array_equal(trace.traffic[key][order], column), (case.name, key)
        assert predicted["messages"].sum() > 0
        assert analysis.disagreements(trace, read_outputs(job.output.file)) == [], case.name
        assert analysis.coverage(trace).tolist() == [1.0] * case.ranks, case.name
        leaves = trace.spans["stage"] >= len(CONTAINERS)
        for rank in range(case.ranks):
            mine = leaves & (trace.spans["rank"] == rank)
            begin, end = trace.spans["begin"][mine], trace.spans["end"][mine]
            assert (end >= begin).all() and np.array_equal(begin[1:], end[:-1]), case.name


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
