"""Whole jobs on one GPU that 1, 2 and 4 ranks share: the tokens of the CPU, and bits that depend on no layout."""

from __future__ import annotations

import pytest
import torch

if not torch.cuda.is_available():
    pytest.skip("torch sees no GPU here", allow_module_level=True)

from layout_jobs import DTYPES, Runs, check_cuts, check_dense, check_layouts, check_tokens, check_traces, run_all

NAMES = [f"{dtype}-{i}" for dtype in DTYPES for i in range(2)]


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Runs:
    return run_all(tmp_path_factory.mktemp("jobs"), "run_jobs.py")


@pytest.mark.parametrize("name", NAMES)
def test_the_bits_do_not_depend_on_the_layout(runs: Runs, name: str) -> None:
    check_layouts(runs, name)


def test_a_model_without_experts(runs: Runs) -> None:
    check_dense(runs)


@pytest.mark.parametrize("name", NAMES)
def test_traces_add_up(runs: Runs, name: str) -> None:
    check_traces(runs, name)


@pytest.mark.parametrize("name", NAMES)
def test_the_bits_do_not_depend_on_cuts(runs: Runs, name: str) -> None:
    check_cuts(runs, name)


@pytest.mark.parametrize("name", [name for name in NAMES if name.startswith("float32")])
@pytest.mark.parametrize("cpu,gpu", [("cpu", "one"), ("cpu", "four"), ("cpu-leaves", "leaves-cut")])
def test_tokens_are_those_of_the_cpu(runs: Runs, name: str, cpu: str, gpu: str) -> None:
    check_tokens(runs, name, cpu, gpu)
