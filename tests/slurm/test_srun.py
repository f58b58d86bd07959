"""Ranks started by srun: through PMIx with Open MPI, through PMI-2 with MPICH; and what a binding of GPUs hides."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
from local_slurm import Cluster, do_without
from slurm_jobs import ROOT, SMALL, Tokens, finished, text_of, write_job


def sbatch(cluster: Cluster, folder: Path, mpirun: str, *words: str) -> tuple[str, Path]:
    """Submit nodes.sbatch with srun in place of mpirun; id and log."""
    cluster.environ |= {"MOEMPI_VENV": sys.prefix, "PYTHONPATH": str(ROOT), "MOEMPI_MPIRUN": mpirun}
    given = [*SMALL, *words, f"--output={folder / 'log'}", "slurm/nodes.sbatch", str(folder / "job.toml")]
    return cluster.command("sbatch", "--parsable", *given, cwd=ROOT).strip(), folder / "log"


def test_srun_with_pmix_and_a_warning_of_hidden_gpus(one_node: Cluster, tmp_path: Path, undisturbed: Tokens) -> None:
    write_job(tmp_path)
    sizes = ["--nodes=1", "--ntasks-per-node=2", "--gpus-per-node=2"]
    # What some sites recommend: a GPU of its own for every task.
    job_id, log = sbatch(one_node, tmp_path, "srun --mpi=pmix --gpu-bind=map_gpu:0,1", *sizes)
    assert one_node.wait(job_id)["JobState"] == "COMPLETED", text_of(log)
    assert finished(tmp_path / "out.h5") == undisturbed
    assert "this rank sees 1 of 2 GPUs of its node" in text_of(log)


def test_a_wrong_mpi_of_srun_is_refused(one_node: Cluster, tmp_path: Path) -> None:
    write_job(tmp_path)
    sizes = ["--nodes=1", "--ntasks-per-node=2", "--gpus-per-node=2"]
    job_id, log = sbatch(one_node, tmp_path, "srun --mpi=none", *sizes)
    assert one_node.wait(job_id)["ExitCode"] == "2:0"
    assert "each is alone in its own MPI world of 1" in text_of(log) and not (tmp_path / "out.h5").exists()


@pytest.fixture(scope="session")
def mpich(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The library of an MPICH from PyPI, in a folder of its own: beside Open MPI it would take its mpirun's place."""
    folder = tmp_path_factory.mktemp("mpich")
    install = [sys.executable, "-m", "pip", "install", "-q", "--no-deps", "--prefix", str(folder), "mpich>=4.2,<6"]
    done = subprocess.run(install, capture_output=True, text=True, timeout=300)
    if done.returncode:
        do_without(f"MPICH cannot be installed: {done.stderr[-300:]}")
    # libmpi.so itself is a text in which pip has lost the link.
    return next(folder.rglob("libmpi.so.12"))


def test_srun_with_pmi2_on_two_nodes(cluster: Cluster, tmp_path: Path, mpich: Path, undisturbed: Tokens) -> None:
    write_job(tmp_path)
    cluster.environ["MPI4PY_LIBMPI"] = str(mpich)
    sizes = ["--nodes=2", "--ntasks-per-node=1", "--gpus-per-node=1"]
    job_id, log = sbatch(cluster, tmp_path, "srun --mpi=pmi2", *sizes)
    del cluster.environ["MPI4PY_LIBMPI"], cluster.environ["MOEMPI_MPIRUN"]
    assert cluster.wait(job_id)["JobState"] == "COMPLETED", text_of(log)
    assert finished(tmp_path / "out.h5") == undisturbed
    assert "2 ranks" in text_of(log)
