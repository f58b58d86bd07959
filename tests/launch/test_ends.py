"""How a job ends: one cause on top, one exit code, nobody left behind. Through a real mpirun, with small programs."""

from __future__ import annotations

import os
import platform
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from ranks import Running, alive, mpirun_line, program, run

RANKS = 4
# Seconds: ranks end within one or two of the error, and mpirun starts in as many; far more where the machine stalls.
END_SECONDS = 30


def causes(text: str) -> list[str]:
    return [line for line in text.splitlines() if line.startswith("moempi: error:")]


@pytest.mark.parametrize(
    ("how", "code", "said"),
    [
        ("all before MPI", 2, "no such job"),
        ("one before MPI", 2, "rank 1 ("),
        ("all", 1, "ValueError: boom"),
        ("one", 3, f"rank {RANKS - 1} ("),
        ("thread", 1, "ZeroDivisionError"),
        ("agree", 4, "moempi: error: too big"),
    ],
)
def test_cause_is_told_once_and_ends_all_ranks(how: str, code: int, said: str) -> None:
    ended = run(mpirun_line(RANKS, program("ends", how)), timeout=END_SECONDS)
    assert ended.code == code, ended.err
    assert len(causes(ended.err)) == 1, ended.err
    assert said in causes(ended.err)[0]
    assert ended.err.lstrip().startswith("moempi: error:"), "something stands above the cause"
    assert ended.err.count("Traceback") == (1 if code == 1 else 0)


def test_leaving_one_rank_with_a_code_ends_all_with_it() -> None:
    ended = run(mpirun_line(RANKS, program("ends", "exit")), timeout=END_SECONDS)
    assert ended.code == 5


def test_world_of_one_in_a_launch_of_many_is_refused() -> None:
    # What each of four tasks sees when srun and the MPI library do not speak to each other.
    strangers = {"SLURM_JOB_ID": "7", "SLURM_STEP_ID": "0", "SLURM_STEP_NUM_TASKS": "4", "SLURM_PROCID": "0"}
    strangers["OMPI_MCA_plm"] = strangers["PRTE_MCA_plm"] = "ssh"
    ended = run(program("ends", "all"), env=strangers)
    assert ended.code == 2, ended.err
    assert "4 ranks were started" in ended.err and "--mpi=" in ended.err and "MPI v" in ended.err


def launcher(how: str, grace: float = 30, ranks: int = 2) -> list[str]:
    return program("launches", str(ranks), str(grace), *program("drains", how))


def ready(running: Running, ranks: int = 2) -> list[int]:
    """Wait for all ranks; their process ids."""
    return [int(pid) for pid in running.wait_for(r"ready (\d+);", ranks)]


@pytest.mark.parametrize(
    ("number", "code"),
    [(signal.SIGINT, 130), (signal.SIGTERM, 75), (signal.SIGUSR1, 75), (signal.SIGHUP, 75)],
)
def test_first_signal_drains(number: int, code: int) -> None:
    with Running(launcher("willing")) as running:
        ready(running)
        running.signal(number)
        ended = running.wait()
    assert ended.code == code, ended.err
    assert ended.out.count("drained") == 2


def test_second_interrupt_ends_at_once_and_an_echo_of_the_first_does_not() -> None:
    with Running(launcher("deaf")) as running:
        ranks = ready(running)
        running.signal(signal.SIGINT)
        time.sleep(0.02)  # one that comes while the other is pending is none
        running.signal(signal.SIGINT)
        time.sleep(1)
        assert running.process.poll() is None
        running.signal(signal.SIGINT)
        ended = running.wait(END_SECONDS)
        assert ended.code == 137
        assert not alive(ranks)


def test_a_drain_that_takes_longer_than_grace_is_ended() -> None:
    with Running(launcher("deaf", grace=0.5)) as running:
        ranks = ready(running)
        running.signal(signal.SIGTERM)
        assert running.wait(END_SECONDS).code == 137
        assert not alive(ranks)


def test_an_error_during_the_drain_is_the_exit_code() -> None:
    with Running(launcher("failing")) as running:
        ready(running)
        running.signal(signal.SIGTERM)
        ended = running.wait(END_SECONDS)
    assert ended.code == 3 and len(causes(ended.err)) == 1


@pytest.mark.parametrize("victim", ["mpirun", "launcher"])
def test_nothing_outlives_a_kill(tmp_path: Path, victim: str) -> None:
    with Running(launcher("deaf"), {"TMPDIR": str(tmp_path)}) as running:
        ranks = ready(running)
        mpirun = os.getsid(ranks[0])
        os.kill(mpirun if victim == "mpirun" else running.process.pid, signal.SIGKILL)
        assert running.wait(END_SECONDS).code == (137 if victim == "mpirun" else -signal.SIGKILL)
        end = time.monotonic() + END_SECONDS
        while alive(ranks) and time.monotonic() < end:
            time.sleep(0.05)
        assert not alive(ranks)
    assert victim == "launcher" or not any(tmp_path.iterdir())


def test_what_a_killed_mpirun_has_left_is_not_in_the_way(tmp_path: Path) -> None:
    """Open MPI takes folders named after processes, whose numbers come again: here all that may be next are taken."""
    last = int(Path("/proc/sys/kernel/pid_max").read_text())
    for number in range(os.getpid(), os.getpid() + 3000):
        left = tmp_path / f"ompi.{number % last}"
        left.mkdir()
        (left / f"pmix.{platform.node().split('.')[0]}.tool.{number % last}").touch()
    with Running(launcher("willing"), {"TMPDIR": str(tmp_path)}) as running:
        ready(running)
        running.signal(signal.SIGTERM)
        assert running.wait().code == 75
    assert len(list(tmp_path.iterdir())) == 3000


def test_help_is_light_and_a_wrong_verb_is_one_message() -> None:
    light = (
        "import sys; from moempi.__main__ import run_command; run_command(['--help']);"
        "sys.exit(any(name in sys.modules for name in ('torch', 'mpi4py', 'numpy', 'pydantic')))"
    )
    shown = subprocess.run([sys.executable, "-c", light], capture_output=True, text=True)
    assert shown.returncode == 0 and "weights" in shown.stdout
    wrong = subprocess.run([sys.executable, "-m", "moempi", "fly"], capture_output=True, text=True)
    assert wrong.returncode == 2 and wrong.stderr.startswith("moempi: error:")
    assert "fly" in wrong.stderr and "Traceback" not in wrong.stderr
