"""Kill -9 of one rank, of all, of mpirun, then a resume: a few of what `benchmarks/kill_anywhere.py` does 100 times."""

from __future__ import annotations

import os
import random
from dataclasses import replace
from pathlib import Path

import pytest
from kills import WHOM, count_tokens, draw, prepare, trial
from ranks import run
from small_jobs import SEQUENCES, Tokens, finished, moempi

SEED = int(os.environ.get("MOEMPI_TEST_SEED", random.SystemRandom().randrange(10**6)))


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> Tokens:
    """What the job comes to on one rank, without mpirun."""
    job = prepare(tmp_path_factory.mktemp("undisturbed"))
    ended = run(moempi("run", job, "--set", "run.capacity=40"), timeout=120)
    assert ended.code == 0, ended.err
    return finished(job.parent / "out.h5")


@pytest.mark.parametrize("whom", WHOM)
def test_after_a_kill_nothing_is_lost_or_twice_and_the_resume_completes(
    tmp_path: Path, undisturbed: Tokens, whom: str
) -> None:
    print(f"seed {SEED} (MOEMPI_TEST_SEED)")
    assert len(undisturbed) == SEQUENCES
    # After some commits, in the middle of the work.
    kill = replace(draw(1, SEED, 1, 0.0), whom=whom, rank=0, after=count_tokens(undisturbed) // 4)
    found = trial(kill, tmp_path, undisturbed)
    assert found["state"] == "some" and found["exit_code"] != 0, found
