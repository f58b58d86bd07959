"""Whether a batch job that was stopped early gets another turn."""

from __future__ import annotations

import os
import signal
import sys
from pathlib import Path

from moempi.errors import EXIT_COMMITTED, EXIT_DONE, EXIT_KILLED, JobError, MoempiError
from moempi.files.committed import Committed, committed
from moempi.slurm import scheduler


class Turn:
    """One attempt of a batch job, from the start of `moempi run --requeue` to its end.

    Args:
        output: of the run.
        fresh: it replaces what an earlier run left there, which is no measure of its progress and may be damaged.

    Raises:
        JobError: this process is not in a job of Slurm.
    """

    def __init__(self, output: Path, *, fresh: bool = False) -> None:
        job_id = os.environ.get("SLURM_JOB_ID")
        if job_id is None:
            raise JobError("--requeue is for batch jobs of Slurm, and this is none (SLURM_JOB_ID is not set)")
        self._id, self._output = scheduler.check_id(job_id), output
        self._before = Committed() if fresh else committed(output)

    def end(self, code: int, told: int | None) -> None:
        """Ask for another turn if this one was stopped early and got somewhere; says what it does, and why.

        Args:
            code: that the run ended with.
            told: the last signal that it was sent; None where there was none.
        """
        # This process has nothing more to be told, and must not die of hearing it again.
        signal.signal(signal.SIGUSR1, signal.SIG_IGN)
        if code == EXIT_DONE:
            return
        try:
            refusal = why_not_for(code, told)
            if not refusal:
                after = committed(self._output)
                refusal = why_not_again(self._before, after) or self._why_slurm_would_not()
            if not refusal:
                # Said first: Slurm ends this process as soon as it has been asked.
                _say(f"moempi: job {self._id} is requeued: {after}")
                scheduler.requeue(self._id)
        except MoempiError as error:
            refusal = f"{error}; submit the job again to go on"
        if refusal:
            _say(f"moempi: not requeued: {refusal}")

    def _why_slurm_would_not(self) -> str:
        # scancel gives a job time to end as well: it must not come back from the dead.
        found = [one for one in scheduler.states([self._id]) if one.state != "RUNNING"]
        return f"Slurm says that the job is {found[0].state}" if found else ""


def why_not_for(code: int, told: int | None) -> str:
    """Why a job that ended so must not be requeued; "" if it may. See `Turn.end`."""
    # Merging what is committed looks at no signal: at the time limit it is killed after `run.grace`, and loses nothing.
    cut_short = code == EXIT_KILLED and told in (signal.SIGUSR1, signal.SIGTERM)
    if code == EXIT_COMMITTED or cut_short:
        return ""
    return f"it ended with {code}, and only a turn that Slurm stopped early is followed by another; --resume goes on"


def why_not_again(before: Committed, after: Committed) -> str:
    """Why a stopped job must not be requeued; "" if it may."""
    if after.complete:
        return "its output is complete"
    if (after.finished, after.new_tokens) <= (before.finished, before.new_tokens):
        return (
            f"no sequence and no token was committed in this turn ({after}), and the next one would do no better; give "
            "it a longer --time, more ranks, or look at what the log says above"
        )
    return ""


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)
