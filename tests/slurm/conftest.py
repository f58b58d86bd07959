"""A Slurm for the tests of this folder, or the reason why there is none."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from local_slurm import Cluster, do_without, host_name, install, why_not
from slurm_jobs import LONG, Tokens, alone, write_job


@contextmanager
def running(folder: Path, nodes: tuple[str, ...]) -> Iterator[Cluster]:
    reason = why_not()
    if reason:
        do_without(f"no Slurm here: {reason}")
    install()
    cluster = Cluster(folder, nodes)
    try:
        cluster.start()
        yield cluster
    finally:
        cluster.stop()


@pytest.fixture(scope="session")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    """Two nodes."""
    with running(tmp_path_factory.mktemp("slurm"), ("n0", "n1")) as started:
        yield started


@pytest.fixture(scope="session")
def one_node(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    """One node that has this machine's name: PMIx in srun finds no other."""
    with running(tmp_path_factory.mktemp("slurm1"), (host_name(),)) as started:
        yield started


@pytest.fixture(scope="session")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> Tokens:
    """What the short job comes to on one rank, without Slurm."""
    return alone(write_job(tmp_path_factory.mktemp("alone")))


@pytest.fixture(scope="session")
def long_undisturbed(tmp_path_factory: pytest.TempPathFactory) -> Tokens:
    """The same of the long job."""
    return alone(write_job(tmp_path_factory.mktemp("alone"), LONG))
