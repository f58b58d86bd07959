"""The commands of Slurm, run and read; nothing here decides anything."""

from __future__ import annotations

import re
import shutil
import subprocess
from dataclasses import dataclass
from pathlib import Path

from moempi.errors import JobError, MoempiError

_PATIENCE = 60.0  # s for a controller that is slow or just being restarted
_OVER = ("COMPLETED", "CANCELLED", "FAILED", "TIMEOUT", "NODE_FAIL", "OUT_OF_MEMORY", "DEADLINE", "BOOT_FAIL")
_FIELDS = "%i|%T|%M|%L|%R|%o"


class SlurmError(MoempiError):
    """Slurm refused something, or its controller does not answer."""


@dataclass(frozen=True)
class State:
    """A job, or one element of an array, as Slurm sees it."""

    id: str
    state: str  # RUNNING, PENDING, COMPLETED, ...
    elapsed: str
    left: str
    where: str  # nodes, or in parentheses the reason for waiting
    script: Path


def check_id(text: str) -> str:
    """The id of a job or of an element of an array: "12", "12_3".

    Raises:
        JobError: it is none.
    """
    if not re.fullmatch(r"[0-9]+(_[0-9]+)?", text):
        raise JobError(f"{text!r} is not the id of a job of Slurm; expected a number, like 12, or 12_3 of an array")
    return text


def sbatch(script: Path) -> str:
    """Submit a script; the id of the job."""
    # Some clusters answer "id;cluster".
    return check_id(_run("sbatch", "--parsable", str(script)).strip().split(";")[0])


def states(ids: list[str] | None = None) -> list[State]:
    """Jobs of these ids, an element of an array each; without ids all jobs of this user that have not ended.

    Of ended jobs Slurm knows for some minutes; those that it has forgotten are left out.
    """
    if ids is None:
        return _read_states(_run("squeue", "-h", "-r", "--me", "-o", _FIELDS))
    found = []
    for one in ids:
        try:
            found += _read_states(_run("squeue", "-h", "-r", "--states=all", "-j", check_id(one), "-o", _FIELDS))
        except SlurmError as error:
            if "Invalid job id" not in str(error):
                raise
    return found


def living(job_id: str) -> list[State]:
    """What has not ended yet of a job."""
    return [one for one in states([job_id]) if one.state not in _OVER]


def _read_states(shown: str) -> list[State]:
    found = []
    for line in shown.splitlines():
        job_id, state, elapsed, left, where, script = line.split("|", 5)
        found.append(State(job_id, state, elapsed, left, where, Path(script)))
    return found


def cancel(job_id: str) -> None:
    """End a job, or take it out of the queue."""
    _run("scancel", check_id(job_id))


def interrupt(job_id: str, states: set[str]) -> None:
    """Take what waits of a job out of the queue, and send SIGINT to the batch script of what runs.

    Args:
        states: of its elements; Slurm refuses a signal to a job that has ended.
    """
    if states - {"RUNNING"}:
        _run("scancel", *(["--state=PENDING"] if "RUNNING" in states else []), check_id(job_id))
    if "RUNNING" in states:
        _run("scancel", "--state=RUNNING", "--signal=INT", "--batch", check_id(job_id))


def requeue(job_id: str) -> None:
    """Put the job back into the queue; what is left of its processes is ended at once."""
    _run("scontrol", "requeue", check_id(job_id))


def _run(*words: str) -> str:
    """What a command printed.

    Raises:
        JobError: there is no Slurm here.
        SlurmError: it fails, or takes too long.
    """
    if shutil.which(words[0]) is None:
        raise JobError(f"there is no {words[0]} on PATH: this machine has no Slurm, or its module is not loaded")
    try:
        done = subprocess.run(words, capture_output=True, text=True, errors="replace", timeout=_PATIENCE)
    except subprocess.TimeoutExpired:
        raise SlurmError(f"{words[0]} gave no answer within {_PATIENCE:g} s; is the controller up? (sinfo)") from None
    if done.returncode:
        raise SlurmError(f"{words[0]} failed ({done.returncode}): {done.stderr.strip() or done.stdout.strip()}")
    return done.stdout
