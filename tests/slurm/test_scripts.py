"""The scripts of slurm/ as a user starts them, on a real Slurm; only sizes are changed on sbatch's command line."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from local_slurm import Cluster
from slurm_jobs import ROOT, SMALL, Tokens, finished, moempi, text_of, write_job


@pytest.fixture(autouse=True, scope="module")
def _environment(cluster: Cluster) -> Iterator[None]:
    """What sbatch hands on to the scripts: where their env.sh finds moempi, which need not be installed here."""
    before = dict(cluster.environ)
    cluster.environ |= {"MOEMPI_VENV": sys.prefix, "PYTHONPATH": str(ROOT)}
    yield
    cluster.environ = before


def sbatch(cluster: Cluster, log: Path, *words: str | Path) -> str:
    """Submit from the root of the repository; the id."""
    return cluster.command("sbatch", "--parsable", f"--output={log}", *SMALL, *words, cwd=ROOT).strip()


@pytest.mark.parametrize(
    ("script", "sizes"),
    [
        ("one-node", ["--ntasks-per-node=2", "--gpus-per-node=2"]),
        ("nodes", ["--nodes=2", "--ntasks-per-node=2", "--gpus-per-node=2"]),
    ],
)
def test_a_script_runs_a_job(
    cluster: Cluster, tmp_path: Path, undisturbed: Tokens, script: str, sizes: list[str]
) -> None:
    job, log = write_job(tmp_path), tmp_path / "log"
    job_id = sbatch(cluster, log, *sizes, f"slurm/{script}.sbatch", job, "--set", "run.capacity=4")
    assert cluster.wait(job_id)["JobState"] == "COMPLETED", text_of(log)
    assert finished(tmp_path / "out.h5") == undisturbed
    assert "hidden" not in text_of(log), "every rank sees all GPUs of its node"


def test_the_array_runs_shards(cluster: Cluster, tmp_path: Path, undisturbed: Tokens) -> None:
    job, shards = write_job(tmp_path), tmp_path / "my shards"
    moempi(cluster, "inputs", "split", tmp_path / "prompts.h5", shards, "-k", "2")
    sizes = ["--array=0-1", "--ntasks-per-node=2"]
    job_id = sbatch(cluster, tmp_path / "log-%a", *sizes, "slurm/array.sbatch", job, shards)
    for number in (0, 1):
        assert cluster.wait(f"{job_id}_{number}")["JobState"] == "COMPLETED", text_of(tmp_path / f"log-{number}")
    moempi(cluster, "outputs", "merge", tmp_path / "all.h5", *shards.glob("shard-*.out.h5"))
    assert list(finished(tmp_path / "all.h5").items()) == list(undisturbed.items())


def test_a_chain_goes_on_where_the_last_turn_ended(cluster: Cluster, tmp_path: Path, undisturbed: Tokens) -> None:
    job, log = write_job(tmp_path), tmp_path / "log"
    sizes = [*SMALL, "--nodes=2", "--ntasks-per-node=1", "--open-mode=append", f"--output={log}"]
    printed = cluster.command("slurm/chain.sh", "2", *sizes, "slurm/cpu.sbatch", str(job), cwd=ROOT)
    first, second = printed.split()
    assert cluster.wait(second)["JobState"] == "COMPLETED", text_of(log)
    assert cluster.show(first)["JobState"] == "COMPLETED"
    assert "nothing to do" in text_of(log)
    assert finished(tmp_path / "out.h5") == undisturbed
