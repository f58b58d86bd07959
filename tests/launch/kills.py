"""Kill -9 at any moment of a small job, and what must hold after it.

A trial starts the job of `small_jobs`, kills some of it at a moment that was drawn, looks at every file that is left,
resumes on another number of ranks, and holds the final file against that of an undisturbed run, bit for bit.
"""

from __future__ import annotations

import os
import random
import signal
import time
from collections import Counter
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import h5py
import numpy as np
from ranks import Running, alive, mpirun_line, run
from small_jobs import SEQUENCES, Tokens, commits, finished, moempi, mpirun_of, rank_pids, wait_until, write_job

from moempi.files.check_in_child import walk
from moempi.files.completions import PARTIAL
from moempi.files.output_parts import PATTERN, Part, read_parts
from moempi.files.parts import committed_parts
from moempi.launch import session_members

COMMIT_EVERY = 0.05  # s
TIME_LIMIT = 120  # s; for each of the two launches of a trial
# Who is killed, and how often out of ten; "mpirun": what `moempi run -n` started; "bare mpirun": nobody watches it.
WHOM = {"a rank": 4, "all ranks": 2, "mpirun": 2, "bare mpirun": 2}
AT_ANY_TIME = 20  # one kill in so many comes at a moment of the whole launch, with its start and its end


@dataclass(frozen=True)
class Kill:
    """One kill: who, and when.

    Attributes:
        rank: of "a rank"; -1 for the others.
        after: the kill comes once finished sequences of so many new tokens are committed; -1: after the launch.
        seconds: so much later than that.
        resume_ranks: ranks of the run that goes on.
    """

    number: int
    ranks: int
    whom: str
    rank: int
    after: int
    seconds: float
    resume_ranks: int


def draw(number: int, seed: int, tokens: int, launch_seconds: float) -> Kill:
    """The kill of a number, always the same for a seed.

    Args:
        tokens: that the job generates in all.
        launch_seconds: of an undisturbed launch from its start to its end.
    """
    dice = random.Random(f"{seed}-{number}")
    ranks = dice.choice((2, 2, 2, 3, 4))
    whom = dice.choices([*WHOM], [*WHOM.values()])[0]
    rank = dice.randrange(ranks) if whom == "a rank" else -1
    if number % AT_ANY_TIME == 0:
        after, seconds = -1, dice.uniform(0, launch_seconds)
    else:
        after, seconds = dice.randrange(tokens), dice.uniform(0, 2 * COMMIT_EVERY)
    return Kill(number, ranks, whom, rank, after, seconds, dice.choice((1, 1, 1, 2, 3)))


# The resume goes as fast as it can.
ALL_AT_ONCE = ("--set", "run.capacity=40")


def prepare(folder: Path) -> Path:
    """Prompts and a job file of two or three seconds of work."""
    return write_job(folder, commit_every=str(COMMIT_EVERY), longest="180")


def trial(kill: Kill, folder: Path, undisturbed: Tokens) -> dict[str, Any]:
    """Kill, look, resume, compare; returns what was seen.

    Raises:
        AssertionError: a promise is broken.
    """
    job = prepare(folder)
    output = folder / "out.h5"
    code, before = _launch_and_kill(kill, job, output)
    files = check_what_is_left(output, before, undisturbed)
    resumed = run(moempi("run", job, "--resume", *_ranks(kill.resume_ranks), *ALL_AT_ONCE), timeout=TIME_LIMIT)
    assert resumed.code == 0, resumed.err
    assert finished(output) == undisturbed, "the resumed run came to something else"
    walk(output)
    return asdict(kill) | {"exit_code": code, "state": state(before), "finished": len(before), "files": files}


def count_tokens(found: Tokens) -> int:
    """New tokens of all sequences."""
    return sum(len(tokens) for tokens, _, _ in found.values()) // 4


def state(then: set[str]) -> str:
    """How far a job was when the kill came: "none", "some" or "all" of its sequences were committed."""
    return "none" if not then else "some" if len(then) < SEQUENCES else "all"


def check_what_is_left(output: Path, before: set[str], undisturbed: Tokens) -> int:
    """After a kill: every file opens, nothing that was committed before is lost, nothing is there twice.

    Args:
        before: finished sequences that were committed when the kill came.

    Returns:
        How many files were read, to their last number.
    """
    # Temporary files (a dot ahead) are what was just being written: nobody reads them.
    files = [path for path in sorted(output.parent.rglob("*.h5")) if not path.name.startswith(".")]
    for path in files:
        walk(path)
    kept = finished(output) if output.exists() or commits(output.with_name("job.toml")) else {}
    assert before <= kept.keys(), f"committed and then lost: {sorted(before - kept.keys())}"
    assert kept.items() <= undisturbed.items(), "a committed sequence is not what an undisturbed run makes of it"
    twice = [row for row, times in _times_finished(read_parts(output)).items() if times > 1]
    assert not twice, f"finished twice: rows {twice}"
    return len(files)


def _times_finished(parts: list[Part]) -> Counter[int]:
    return Counter(int(row) for part in parts for row in part.index[part.finish_reason != PARTIAL])


def _ranks(ranks: int) -> tuple[str, ...]:
    return ("-n", str(ranks)) if ranks > 1 else ()


class Watch:
    """What an output has committed while its run goes on; every part is read once."""

    def __init__(self, output: Path) -> None:
        self._output = output
        self._seen: set[Path] = set()
        self.finished: set[str] = set()
        self._tokens = 0

    def look(self) -> int:
        """Take in new commits; returns how many new tokens the finished sequences have."""
        for path in committed_parts(self._output, PATTERN):
            # The end of a run merges the parts and removes them.
            with suppress(FileNotFoundError):
                if path not in self._seen:
                    self._take_in(path)
        if self._output.exists():
            self.finished.update(f"p{row}" for row in range(SEQUENCES))
        return self._tokens

    def _take_in(self, path: Path) -> None:
        with h5py.File(path, "r") as file:
            whole = file["finish_reason"][...] != PARTIAL
            rows, lengths = file["index"][...][whole], np.diff(file["offsets"][...])[whole]
        self._seen.add(path)
        self.finished.update(f"p{row}" for row in rows)
        self._tokens += int(lengths.sum())


def _launch_and_kill(kill: Kill, job: Path, output: Path) -> tuple[int, set[str]]:
    """Exit code of the launch, and the sequences that were committed when the kill came."""
    bare = kill.whom == "bare mpirun"
    words = mpirun_line(kill.ranks, moempi("run", job)) if bare else moempi("run", job, "-n", str(kill.ranks))
    watch, begin = Watch(output), time.monotonic()

    def due() -> bool:
        nonlocal begin
        if watch.look() < kill.after:
            begin = time.monotonic()
        return running.process.poll() is not None or time.monotonic() - begin >= kill.seconds

    def over() -> bool:
        return running.process.poll() is not None

    with Running(words) as running:
        wait_until(due, "the moment of the kill", TIME_LIMIT)
        # Early in a launch they are not there yet.
        wait_until(lambda: over() or bool(_victims(kill, running, bare)), "those to be killed", TIME_LIMIT)
        members = _members(running, bare)
        for pid in _victims(kill, running, bare):
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        watch.look()
        code = running.wait(TIME_LIMIT).code
        wait_until(lambda: not alive(members), "the end of all ranks", 30)
    return code, watch.finished


def _session(running: Running, bare: bool) -> int:
    """Process id of mpirun, whose session the ranks are in; 0 where it has not started, or has ended."""
    with suppress(FileNotFoundError, IndexError):
        return running.process.pid if bare else mpirun_of(running)
    return 0


def _members(running: Running, bare: bool) -> list[int]:
    session = _session(running, bare)
    return session_members(session) if session else []


def _victims(kill: Kill, running: Running, bare: bool) -> list[int]:
    """Those of a launch that are to be killed, as far as they are there."""
    session = _session(running, bare)
    if not session or kill.whom in ("mpirun", "bare mpirun"):
        return [session] if session else []
    with suppress(FileNotFoundError, ProcessLookupError):
        ranks = rank_pids(session)
        wanted = range(kill.ranks) if kill.whom == "all ranks" else [kill.rank]
        return [ranks[rank] for rank in wanted if rank in ranks]
    return []
