"""What benchmarks make of times and options, by hand. No MPI is started."""

from __future__ import annotations

import json
from pathlib import Path

import click
import pytest
from click.testing import CliRunner

from moempi.bench.jobs import phases_of, rates
from moempi.bench.stack import Stack, sum_up
from moempi.cli import bench_job, bench_layer
from moempi.cli.bench import bench
from moempi.cli.measuring import options_of
from moempi.errors import DataError, JobError, MoempiError
from moempi.files.init_weights import init_weights
from moempi.files.weights import open_weights

STACK = Stack(layers=6, d_model=1000, hidden=500, experts=4, top_k=2, microbatches=2)


def test_what_a_stack_comes_to() -> None:
    # Each of 4 ranks: 100 tokens x 2 experts x 6 x 1000 x 500 = 600 MFLOP in 2 ms.
    found = sum_up(STACK, 4, 100, {"stack": [0.003, 0.002, 0.001], "pure": [0.001, 0.0015, 0.0016]})
    assert found["ms"] == {"stack": 2.0, "pure": 1.5} and found["of_pure"] == pytest.approx(0.75)
    assert found["tokens_per_second"] == pytest.approx(4 * 100 / 0.002)
    assert found["tflops_per_rank"] == pytest.approx(0.3)
    assert found["rounds"]["stack"] == pytest.approx([3, 2, 1]) and "of_stack" not in found


def test_the_table_of_a_stack() -> None:
    line = sum_up(STACK, 4, 100, {"stack": [0.002], "pure": [0.0015]})
    results = {"ranks": 4, "device": "cpu", "stack": vars(STACK), "results": [line]}
    assert list(bench_layer.lines(results)) == [
        "6 MoE layers, d 1000, hidden 500, E 4, K 2, bfloat16, exact, 2 microbatches; 4 ranks on cpu",
        "Medians per layer and microbatch, of the slowest rank:",
        "tokens  stack, ms  pure, ms  of pure  tokens/s  TFLOP/s a rank",
        "   100      2.000     1.500    0.750    200000             0.3",
    ]


def test_what_cannot_be_measured_is_refused() -> None:
    with pytest.raises(JobError, match=r"--top-k 5: there are only 4 experts"):
        Stack(1, 8, 8, 4, 5, 1).check("cpu")
    with pytest.raises(JobError, match="--mode fast: on the CPU"):
        Stack(1, 8, 8, 4, 2, 1, mode="fast").check("cpu")
    Stack(1, 8, 8, 4, 2, 1, mode="fast").check("cuda")


def test_rates_are_medians_and_scaling_is_by_rank() -> None:
    def one(ranks: int, phase: str, rate: float) -> dict[str, object]:
        return {"ranks": ranks, "phase": phase, "tokens_per_second": rate}

    found = [one(4, "decode", 300.0), one(4, "decode", 340.0), one(4, "decode", 320.0), one(1, "decode", 100.0)]
    assert rates(found) == [
        {"ranks": 1, "decode": 100.0, "decode_scaling": 1.0},
        {"ranks": 4, "decode": 320.0, "decode_scaling": pytest.approx(0.8)},
    ]


def test_tokens_that_count() -> None:
    phases = phases_of(prompts=10, prompt_tokens=256, new_tokens=33)
    assert {name: phase.tokens for name, phase in phases.items()} == {"prefill": 2560, "decode": 330}
    assert phases["prefill"].new_tokens == 1 and phases["decode"].length == 16


@pytest.mark.parametrize("command", [bench_layer.layer, bench_job.job], ids=["layer", "job"])
def test_ranks_are_started_with_the_options_that_were_given(command: click.Command) -> None:
    given = ["out.json", "-n", "3", "--layers=7", "--dtype=float32", "--overwrite"]
    more = {"layer": ["--tokens=3", "--tokens=9", "--skew=1.5"], "job": ["--counts=1", "--counts=2", "--set=a.b=c d"]}
    with command.make_context("it", [*given, *more[command.name or ""]]) as context:
        words = options_of(context)
    with command.make_context("it", ["out.json", *words]) as again:
        assert again.params == {**context.params, "ranks": None}


def test_more_counts_than_ranks_are_refused(tmp_path: Path) -> None:
    line = ["job", str(tmp_path / "o.json"), "-n", "2", "--counts", "4"]
    with pytest.raises(MoempiError, match=r"--counts 4: there are 2 ranks \(-n\)"):
        CliRunner().invoke(bench, line, standalone_mode=False, catch_exceptions=False)


def test_a_shape_is_a_config() -> None:
    with bench_job.job.make_context("job", ["o.json", "--experts=6", "--prompt-tokens=100"]) as context:
        config = bench_job.config_of(context.params)
    assert (config["num_experts"], config["max_position_embeddings"]) == (6, 133)


@pytest.mark.parametrize(("text", "said"), [(None, "No such file"), ("{", "as JSON"), ("[]", "with vocab_size")])
def test_a_config_that_is_none_is_refused(tmp_path: Path, text: str | None, said: str) -> None:
    path = tmp_path / "c.json"
    if text is not None:
        path.write_text(text)
    with (
        bench_job.job.make_context("job", ["o.json", f"--config={path}"]) as context,
        pytest.raises(DataError, match=f"--config {path}: .*{said}"),
    ):
        bench_job.config_of(context.params)


def test_alike_experts_are_the_first_one(tmp_path: Path) -> None:
    with bench_job.job.make_context("job", ["o.json", "--layers=1", "--d-model=8", "--hidden=6"]) as context:
        (tmp_path / "config.json").write_text(json.dumps(bench_job.config_of(context.params)))
    for alike in (False, True):
        init_weights(tmp_path / "config.json", tmp_path / f"{alike}.h5", 3, "float32", alike=alike)
    with open_weights(tmp_path / "False.h5") as drawn, open_weights(tmp_path / "True.h5") as same:
        first = drawn.expert(0, 0, 0, 6)
        for expert in (0, 31):
            assert all(a.equal(b) for a, b in zip(same.expert(0, expert, 0, 6), first, strict=True))
        assert not drawn.expert(0, 31, 0, 6)[0].equal(first[0])
        assert same.tensor("layers/0/gate").equal(drawn.tensor("layers/0/gate"))
