"""The benchmarks of GPUs where there is none: arguments, ranks and the form of results, by trials on the CPU."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

from ranks import Running

from moempi import analysis

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"


def found(folder: Path, name: str, *options: str, ranks: int = 2) -> Any:
    """What a benchmark has written."""
    out = folder / "found.json"
    program = [sys.executable, str(BENCHMARKS / name), "--out", str(out), *options]
    launch = [sys.executable, "-m", "moempi.launch", "-n", str(ranks), "--"] if ranks else []
    with Running([*launch, *program]) as running:
        running.process.wait(200)
    assert running.process.returncode == 0, running.out[-1000:] + running.err[-4000:]
    return json.loads(out.read_text())


def test_a_stack_beside_its_experts_alone(tmp_path: Path) -> None:
    rows = found(tmp_path, "gpu_stack.py", "--small", "--trace", str(tmp_path / "trace.h5"))["stack"]
    assert analysis.load(tmp_path / "trace.h5").job["bench layer"]["tokens"] == 40
    assert [(row["tokens"], row["microbatches"], list(row["rounds"])) for row in rows] == [
        (1, 1, ["stack"]),
        (40, 3, ["stack", "pure"]),
    ]
    assert all(len(times) == 7 for row in rows for times in row["rounds"].values())


def test_whole_layers(tmp_path: Path) -> None:
    one = found(tmp_path, "gpu_layer.py", "--small", "--rounds", "1", "--modes", "exact")["exact"]
    assert "mfu" in one and [len(times) for times in one["seconds"].values()] == [1, 1]


def test_steps_of_decode(tmp_path: Path) -> None:
    told = found(tmp_path, "gpu_decode.py", "--small")
    assert all(len(told["seconds"][name]) == 2 for name in ("prefill", "whole"))


def test_the_part_of_the_host(tmp_path: Path) -> None:
    told = found(tmp_path, "gpu_host.py", "--rounds", "1", "--profile", "3")
    assert "us_a_layer_and_step" in told and [len(times) for times in told["seconds"].values()] == [1] * 4


def test_all_in_one_call(tmp_path: Path) -> None:
    sections = "--sections", "links", "stack", "job"
    told = found(tmp_path, "multi_gpu.py", "--gpus", "2", "--small", "--seconds", "150", *sections, ranks=0)["sections"]
    links, stack, job = (told[name]["found"] for name in sections[1:])
    assert "error" not in stack and "error" not in job, told
    assert [(pair["source"], pair["destination"]) for pair in links["pairs"]] == [(0, 1)]
    assert [[row["tokens"] for row in one["results"]] for one in stack["results"]] == [[8, 16]] * 2
    assert [one["ranks"] for one in job["rates"]] == [1, 2]
