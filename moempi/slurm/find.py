"""Which jobs of Slurm somebody means: by an id, or by the job file that they were submitted with."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

from moempi.errors import JobError
from moempi.job import load_job
from moempi.slurm.place import SCRIPT, Submitted, folder_of, submissions
from moempi.slurm.scheduler import State, check_id

_LOOKED_AT = 10  # submissions of one job, the newest: Slurm forgets older ones


@dataclass(frozen=True)
class Meant:
    """Ids, and what is known of them here."""

    ids: list[str]
    outputs: list[str] = field(default_factory=list)  # of the last submission
    submissions: dict[str, Submitted] = field(default_factory=dict)  # by id


def find(job: str, overrides: list[str]) -> Meant:
    """The jobs that `job` means: an id of Slurm, or the name of a job file.

    Raises:
        JobError: there is no such file, or it is wrong.
    """
    if job.replace("_", "").isdecimal() and not Path(job).exists():
        if overrides:
            raise JobError(f"--set goes with a job file, and {job} is the id of a job of Slurm")
        return Meant([check_id(job)])
    output = load_job(Path(job), overrides).output.file
    known = submissions(folder_of(output))[-_LOOKED_AT:]
    return Meant(
        ids=[one.id for one in known],
        outputs=known[-1].outputs if known else [str(output)],
        submissions={one.id: one for one in known},
    )


def by_folder(state: State) -> Submitted | None:
    """What was submitted as a job of Slurm, from the record beside its script; None where it is not one of ours."""
    if state.script.name != SCRIPT:
        return None
    wanted = state.id.split("_")[0]
    return next((one for one in submissions(state.script.parent) if one.id == wanted), None)
