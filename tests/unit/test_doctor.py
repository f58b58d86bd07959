"""What the doctor says of what it finds: by hand, and once of this very machine."""

from __future__ import annotations

import json

import pytest
from click.testing import CliRunner

from moempi import doctor
from moempi.cli import doctor as command
from moempi.cli.doctor import report
from moempi.doctor import FINE, NOTE, WRONG, Finding, RankReport

GIB = 2**30


def test_missing_libraries_are_wrong_and_can_be_installed() -> None:
    assert doctor.packages(lambda name: "1.0").state == FINE
    found = doctor.packages(lambda name: None if name in ("h5py", "click") else "1.0")
    assert found.state == WRONG and found.advice == "pip install h5py click"
    assert found.found.startswith("h5py, click not installed; torch 1.0")


def test_pictures_are_optional() -> None:
    assert doctor.pictures(lambda name: None).state == NOTE and doctor.pictures(lambda name: "3.9").state == FINE


@pytest.mark.parametrize(
    ("library", "launcher", "state"),
    [
        ("Open MPI v5.0.11", "mpirun (Open MPI) 5.0.11", FINE),
        ("Open MPI v5.0.11", "HYDRA build details:", WRONG),
        ("MPICH Version: 5.0.2", "HYDRA build details:", FINE),
        ("MPICH Version: 5.0.2", "prterun (PRRTE) 3", WRONG),
        ("Intel(R) MPI Library 2021", "Intel(R) MPI Library for Linux", FINE),
        ("Some MPI", "mpirun (Open MPI) 5", NOTE),
    ],
)
def test_library_and_launcher_have_to_be_of_one_kind(library: str, launcher: str, state: str) -> None:
    found = doctor.same_kind(Finding("MPI library", FINE, library), Finding("launcher", FINE, launcher))
    assert found.state == state


def test_a_launcher_that_is_missing_is_wrong_once() -> None:
    missing = Finding("launcher", WRONG, "there is none")
    assert doctor.same_kind(Finding("MPI library", FINE, "Open MPI"), missing).state == NOTE


def rank(node: int = 0, cores: int = 8, threads: int = 4, shared: int = 8 * GIB) -> RankReport:
    return RankReport(f"n{node}", node, cores, threads, shared)


def states(*reports: RankReport) -> dict[str, str]:
    return {each.subject: each.state for each in doctor.ranks(reports, 8_388_607)}


def test_ranks_of_two_nodes_are_counted() -> None:
    ranks, *_ = doctor.ranks([rank(0), rank(0), rank(1)], 8_388_607)
    assert ranks.found == "3 ranks on 2 nodes met: 2 on n0, 1 on n1; tags to 8,388,607"
    assert set(states(rank(0), rank(0), rank(1)).values()) == {FINE}


def test_crowded_cores_and_little_shared_memory_are_noted() -> None:
    assert states(*[rank(cores=2, threads=1)] * 3)["cores"] == NOTE
    assert states(rank(shared=GIB // 32), rank(shared=GIB // 32))["shared memory"] == NOTE
    assert states(rank(shared=GIB // 32))["shared memory"] == FINE, "a rank alone sends nothing"
    assert states(rank(shared=-1))["shared memory"] == NOTE


def test_gpus_and_what_stands_in_their_way() -> None:
    none = doctor.gpu([], "torch sees no GPU: look at nvidia-smi")
    assert none.state == FINE and none.found == "none found: jobs run on the CPU"
    listed = ["GPU 0: NVIDIA H100 (UUID: GPU-1)", "GPU 1: NVIDIA H100 (UUID: GPU-2)"]
    two = doctor.gpu(listed, "")
    assert two.state == FINE and two.found == "2 GPUs (GPU 0: NVIDIA H100)" and not two.advice
    hidden = doctor.gpu(listed, "there is no cupy: pip install cupy-cuda13x")
    assert hidden.state == NOTE and hidden.advice == "pip install cupy-cuda13x"
    assert hidden.found == "2 GPUs (GPU 0: NVIDIA H100), but there is no cupy: jobs run on the CPU"


def test_messages_between_gpus_are_told_by_pair() -> None:
    found = doctor.gpu_messages({"0-1": [0.01, 250.4], "0-2": [0.01, 31.26], "1-2": [0.5, 0.25]}, "")
    assert found.state == FINE
    assert found.found.endswith("between ranks 0-1 250 GB/s, 0-2 31.3 GB/s, 1-2 0.5 GB/s")
    none = doctor.gpu_messages({}, "the trial ended with 139")
    assert none.state == NOTE and "(the trial ended with 139): rows are staged" in none.found and none.advice


def test_slurm() -> None:
    assert doctor.slurm(None, [], [], {}).state == FINE
    assert doctor.slurm("/usr/bin/sbatch", [], [], {}).state == NOTE
    listed = ["MPI plugin types are...", "\tnone", "\tpmi2", "\tpmix", "specific pmix plugin versions: pmix_v4"]
    found = doctor.slurm("/usr/bin/sbatch", ["slurm 22.05.8"], listed, {"SLURM_JOB_ID": "17"})
    assert found.state == FINE and "inside job 17; srun --mpi= knows none, pmi2, pmix" in found.found
    assert doctor.slurm("/usr/bin/sbatch", ["slurm 22.05.8"], listed[:3], {}).state == NOTE


def test_a_report_fits_a_terminal_and_says_what_to_do() -> None:
    text = report([Finding("MPI library", WRONG, "word " * 40, "do " * 60), Finding("GPU", FINE, "none")])
    lines = text.splitlines()
    assert max(map(len, lines)) <= 80 and lines[-1] == "GPU              fine  none"
    assert lines[0].startswith("MPI library      wrong word word") and sum("-> do" in one for one in lines) == 1


def test_this_machine_can_run_the_tests() -> None:
    done = CliRunner().invoke(command.doctor, ["--json"], standalone_mode=False)
    assert done.exception is None, done.exception
    found = {each["subject"]: each for each in json.loads(done.output)}
    assert done.return_value == (1 if any(each["state"] == WRONG for each in found.values()) else 0)
    assert found["libraries"]["state"] == found["HDF5"]["state"] == FINE
    assert all(each["advice"] for each in found.values() if each["state"] == WRONG)
