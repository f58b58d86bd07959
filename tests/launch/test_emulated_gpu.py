"""The way of tokens through GPUs where there is none: all of it but the kernels, which are emulated.

Steady steps, recordings, messages, streams, memory: the jobs and checks are those of `tests/gpu/test_jobs.py`.
"""

from __future__ import annotations

import json
import random
import sys
from collections import Counter
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[1] / "gpu"))

from layout_jobs import (
    DTYPES,
    ON_GPU,
    PROGRAMS,
    Runs,
    check_cuts,
    check_dense,
    check_layouts,
    check_tokens,
    check_traces,
    launch,
    run_all,
)
from layouts import Layout, job_of
from models import random_config, write_model
from ranks import Running
from stacks import check_trace

from moempi.bench.stack import Stack


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Runs:
    return run_all(tmp_path_factory.mktemp("jobs"), "emulated_gpu.py", n_models=1, longest=20)


@pytest.mark.parametrize("dtype", DTYPES)
def test_the_bits_do_not_depend_on_the_layout(runs: Runs, dtype: str) -> None:
    check_layouts(runs, f"{dtype}-0")


def test_a_model_without_experts(runs: Runs) -> None:
    check_dense(runs)


@pytest.mark.parametrize("dtype", DTYPES)
def test_traces_add_up(runs: Runs, dtype: str) -> None:
    check_traces(runs, f"{dtype}-0")


@pytest.mark.parametrize("dtype", DTYPES)
def test_the_bits_do_not_depend_on_cuts(runs: Runs, dtype: str) -> None:
    check_cuts(runs, f"{dtype}-0")


@pytest.mark.parametrize("cpu,gpu", [("cpu", "one"), ("cpu", "four"), ("cpu-leaves", "leaves-cut")])
def test_tokens_are_those_of_the_cpu(runs: Runs, cpu: str, gpu: str) -> None:
    check_tokens(runs, "float32-0", cpu, gpu)


def test_a_stack_and_its_trace(tmp_path: Path) -> None:
    out, trace = tmp_path / "found.json", tmp_path / "trace.h5"
    program = Path(__file__).parents[1] / "gpu" / "programs" / "emulated_layers.py"
    launch = [sys.executable, "-m", "moempi.launch", "-n", "2", "--", sys.executable]
    with Running([*launch, *map(str, (program, out, trace))]) as run:
        run.process.wait(100)
    assert run.process.returncode == 0, run.err[-4000:]
    found = json.loads(out.read_text())
    stack, (line,) = Stack(**found["stack"]), found["results"]
    assert list(line["ms"]) == ["stack", "pure", "ceiling"] and found["ms_of_trace"] > 0
    check_trace(trace, stack, 2, line["tokens"], 2)


def test_steps_are_made_ahead_and_send_frames(runs: Runs) -> None:
    """Else the others say nothing of it."""
    folder, told = next(iter(runs.outputs.values())).parent, dict[str, Counter[str]]()
    for file in folder.glob("*/*.steady-*.json"):
        for job, counts in json.loads(file.read_text()).items():
            told.setdefault(job, Counter()).update(counts)
    total = sum(told.values(), Counter())
    done = "frames", "too_large", "steps_ahead", "steps_begun", "steps_in_vain"
    assert all(total[what] > 0 for what in done), total
    begun = Counter[str]()
    for job, counts in told.items():
        begun[job.partition(".")[2]] += counts["steps_begun"]
    # Whatever else a job is about.
    for case in ("one", "two", "two-staged", "four", "four-lockstep", "four-pieces", "leaves-cut", "two-poisoned"):
        assert begun[case] > 0, begun


def test_a_job_ends_behind_a_step_that_was_begun_in_vain(tmp_path: Path) -> None:
    """No kernel is at work any more when it has ended, where `run_jobs` looks: others may get their memory."""
    config = random_config(random.Random(1), 4, num_hidden_layers=3, mlp_only_layers=[])
    model = write_model(tmp_path, config, 1, [3, 5, 4], 20, {"generate.stop_at_eos": False, "run.capacity": 3})
    job = job_of(model, Layout(1, ON_GPU), tmp_path / "ended.h5")
    launch(tmp_path / "jobs", PROGRAMS / "emulated_gpu.py", 1, "ending", [job])
    counts = json.loads(next((tmp_path / "jobs").glob("*.steady-0.json")).read_text())["ended"]
    assert counts["steps_begun"] == 3 and counts["steps_ahead"] == 3, counts
