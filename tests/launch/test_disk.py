"""Real jobs on a file system of their own, which is full after a while, or cannot be written at all."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
from ranks import Running, run
from small_jobs import causes, commits, finished, moempi, wait_for_commit, write_job


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Path]:
    """A file system in memory, of 8 MiB."""
    if os.geteuid() != 0:
        pytest.skip("only root can mount a file system of limited size")
    folder = tmp_path / "disk"
    folder.mkdir()
    made = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=8m", "tmpfs", folder], capture_output=True, text=True)
    if made.returncode != 0:
        pytest.skip(f"no file system can be mounted here: {made.stderr.strip()}")
    yield folder
    subprocess.run(["umount", "-l", folder], check=True)


def fill(path: Path) -> None:
    """Take all room that is left."""
    with pytest.raises(OSError, match="No space left"), path.open("wb", buffering=0) as file:
        while True:
            file.write(bytes(4096))


def test_a_full_disk_is_one_message_and_the_run_goes_on_once_there_is_room(disk: Path, tmp_path: Path) -> None:
    whole = write_job(tmp_path)
    assert run(moempi("run", whole, "--set", "run.capacity=40"), timeout=120).code == 0
    job = write_job(disk)
    with Running(moempi("run", job, "-n", "2")) as running:
        wait_for_commit(running, job)
        fill(disk / "ballast")
        ended = running.wait()
    assert ended.code == 3, ended.err
    assert len(causes(ended.err)) == 1 and str(disk / "out") in causes(ended.err)[0], ended.err
    assert commits(job) and finished(disk / "out.h5").items() <= finished(tmp_path / "out.h5").items()
    (disk / "ballast").unlink()
    again = run(moempi("run", job, "-n", "2", "--resume"), timeout=120)
    assert again.code == 0, again.err
    assert finished(disk / "out.h5") == finished(tmp_path / "out.h5")


def test_a_disk_that_is_full_from_the_start_is_one_message(disk: Path) -> None:
    job = write_job(disk)
    fill(disk / "ballast")
    ended = run(moempi("run", job, "-n", "2"), timeout=60)
    assert ended.code == 3, ended.err
    assert len(causes(ended.err)) == 1 and str(disk / "out") in causes(ended.err)[0], ended.err
    assert "Traceback" not in ended.err and not commits(job)


def test_an_output_folder_that_cannot_be_written_is_one_message(disk: Path) -> None:
    job = write_job(disk)
    subprocess.run(["mount", "-o", "remount,ro", disk], check=True)
    ended = run(moempi("run", job, "-n", "2"), timeout=60)
    assert ended.code == 3, ended.err
    assert len(causes(ended.err)) == 1 and str(disk / "out") in causes(ended.err)[0], ended.err
