"""Files that are replaced while a job runs on them, or between its runs."""

from __future__ import annotations

import os
import shutil
import signal
from pathlib import Path

import h5py
import numpy as np
from ranks import Running, alive, mpirun_line, program, run
from small_jobs import (
    SEQUENCES,
    TINYMOE,
    causes,
    commits,
    finished,
    moempi,
    mpirun_of,
    rank_pids,
    wait_for_commit,
    wait_until,
    write_job,
)

from moempi.files.inputs import Prompts, write_inputs
from moempi.files.schema import set_text_attribute
from moempi.files.tensors import digest_of
from moempi.files.weights import open_weights
from moempi.launch import session_members


def other_prompts(path: Path) -> None:
    """As many sequences as the job has, of other tokens."""
    rows = [np.array([7, 8, 9], np.int32)] * SEQUENCES
    write_inputs(path, Prompts([f"p{i}" for i in range(SEQUENCES)], rows, None, np.full(SEQUENCES, 5, np.int32)), {})


def test_an_input_replaced_meanwhile_is_not_mixed_with_the_old_one(tmp_path: Path) -> None:
    """The run that reads the old one goes on with it; a resume refuses the new one, and finishes with the old one."""
    (tmp_path / "whole").mkdir()
    whole = write_job(tmp_path / "whole")
    assert run(moempi("run", whole, "--set", "run.capacity=40"), timeout=120).code == 0
    job, prompts = write_job(tmp_path), tmp_path / "prompts.h5"
    shutil.copy(prompts, tmp_path / "old.h5")
    with Running(moempi("run", job, "-n", "2")) as running:
        wait_for_commit(running, job)
        other_prompts(prompts)
        wait_for_commit(running, job, more_than=commits(job))
        members = session_members(mpirun_of(running))
        for pid in rank_pids(mpirun_of(running)).values():
            os.kill(pid, signal.SIGKILL)
        assert running.wait().code == 137
        wait_until(lambda: not alive(members), "the end of all ranks", 20)
    # Without the old input the commits know rows, but no ids.
    kept = {f"p{row}": values for row, values in finished(tmp_path / "out.h5").items()}
    expected = finished(whole.with_name("out.h5"))
    assert kept and kept.items() <= expected.items()
    refused = run(moempi("run", job, "-n", "2", "--resume"))
    assert refused.code == 2 and len(causes(refused.err)) == 1 and "  inputs: was " in refused.err, refused.err
    (tmp_path / "old.h5").replace(prompts)
    ended = run(moempi("run", job, "--resume"), timeout=120)
    assert ended.code == 0, ended.err
    assert finished(tmp_path / "out.h5") == expected


def test_weights_replaced_while_ranks_start_are_refused(tmp_path: Path) -> None:
    """Rank 0 has looked at one model, all would compute with another one."""
    job, weights, other = write_job(tmp_path), tmp_path / "weights.h5", tmp_path / "other.h5"
    shutil.copy(TINYMOE, weights)
    shutil.copy(TINYMOE, other)
    job.write_text(job.read_text().replace(str(TINYMOE), str(weights)))
    with open_weights(weights) as opened:
        first = opened.digest()
    restamp(other)
    ended = run(mpirun_line(2, program("hinders", str(job), "replaces", str(other))))
    assert ended.code == 3, ended.err
    assert len(causes(ended.err)) == 1 and "Traceback" not in ended.err, ended.err
    assert f"{weights}: was replaced while the job was running: its digest was {first[:12]}" in ended.err


def restamp(path: Path) -> None:
    """Make another model of a file of weights: one number differs, and the digest beside it."""
    with h5py.File(path, "r+") as file:
        norm = file["model/norm"]
        norm[0] = norm[1]
        del norm.attrs["sha256"]
        set_text_attribute(norm, "sha256", digest_of(norm))
