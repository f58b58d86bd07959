"""A run that is stopped, goes on on other ranks, and that twice, gives the bits of one that was not stopped.

Told to stop, it leaves half generated sequences behind; killed, it leaves what it has committed.
"""

from __future__ import annotations

import json
import os
import signal
import time
from contextlib import suppress
from pathlib import Path

import pytest
from ranks import Running, alive, run
from small_jobs import SEQUENCES, Tokens, commits, finished, moempi, mpirun_of, wait_for_commit, wait_until, write_job

from moempi.files.committed import committed
from moempi.launch import session_members

# Slower than in test_run: 8 ranks share two cores, and shall be stopped with much still to do.
SETTINGS = ["--set", "engine.stall_timeout=120.0"]


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Tokens:
    """What the job comes to on one rank, undisturbed."""
    job = write_job(tmp_path_factory.mktemp("whole"))
    ended = run(moempi("run", job, "--set", "run.capacity=40"), timeout=120)
    assert ended.code == 0, ended.err
    return finished(job.parent / "out.h5")


def stop(job: Path, ranks: int, how: str, *options: str) -> None:
    """Resume on so many ranks, and stop once more is committed: told to, or killed with all that belongs to it."""
    with Running(moempi("run", job, "--resume", "-n", str(ranks), *SETTINGS, *options)) as running:
        wait_for_commit(running, job, more_than=commits(job))
        if how == "USR1":
            running.signal(signal.SIGUSR1)
            ended = running.wait(90)
            assert ended.code == 75, ended.err
        else:
            victims = [*session_members(mpirun_of(running)), running.process.pid]
            for pid in victims:
                with suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
            running.wait()
            wait_until(lambda: not alive(victims), "the end of all", 20)
            time.sleep(0.1)


@pytest.mark.parametrize(("ranks", "first", "second"), [((8, 3, 5), "USR1", "KILL"), ((2, 3, 1), "KILL", "USR1")])
def test_stopped_twice_and_finished_on_other_ranks(
    tmp_path: Path, whole: Tokens, ranks: tuple[int, int, int], first: str, second: str
) -> None:
    job, output = write_job(tmp_path), tmp_path / "out.h5"
    stop(job, ranks[0], first)
    after_first = finished(output)
    assert after_first.items() <= whole.items()
    if first == "USR1":
        assert committed(output).partial, "no sequence was under way"
    stop(job, ranks[1], second, "--set", "placement.strategy=balanced")
    kept, before = finished(output), committed(output)
    assert after_first.items() < kept.items() < whole.items()
    assert second == "KILL" or before.partial, "no sequence was under way"

    ended = run(moempi("run", job, "--resume", "-n", str(ranks[2]), "--json", *SETTINGS), timeout=120)
    assert ended.code == 0, ended.err
    assert finished(output) == whole
    # The totals are those of all three runs together; the rate is that of the last one.
    outcome = json.loads(ended.out)
    tokens = sum(len(values[0]) // 4 for values in whole.values())
    assert (outcome["finished"], outcome["new_tokens"]) == (SEQUENCES, tokens)
    assert (outcome["earlier_finished"], outcome["earlier_new_tokens"]) == (len(kept), before.new_tokens)
    assert outcome["tokens_per_second"] == pytest.approx((tokens - before.new_tokens) / outcome["seconds"])
    assert str(committed(output)) == f"{SEQUENCES} of {SEQUENCES} sequences finished, {tokens} new tokens; complete"
    check_that_overwrite_leaves_nothing_of_it(job)


def check_that_overwrite_leaves_nothing_of_it(job: Path) -> None:
    assert (job.parent / "out.trace.1.h5").exists()
    again = run(moempi("run", job, "--overwrite", "--set", "run.capacity=40"), timeout=120)
    assert again.code == 0, again.err
    assert sorted(path.name for path in job.parent.iterdir()) == ["job.toml", "out.h5", "out.trace.h5", "prompts.h5"]
