"""Where the things of a submitted job lie: in `<output>.slurm/`, with a record of what was submitted."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path

from moempi.errors import DataError
from moempi.job import Job

SCRIPT = "job.sbatch"
_RECORD = "submitted.jsonl"


@dataclass(frozen=True)
class Submitted:
    """One submission."""

    id: str
    job: str  # the job file
    outputs: list[str]  # of an array: those of its shards, in their order


def folder_of(output: Path) -> Path:
    """The folder for an output's script, logs and shards."""
    return output.with_name(output.name + ".slurm")


def shard_output(output: Path, shard: int) -> Path:
    """The output of one shard of an array."""
    return folder_of(output) / f"shard-{shard:03d}.out.h5"


def shard_trace(output: Path, shard: int) -> Path:
    """The trace of one shard of an array."""
    return folder_of(output) / f"shard-{shard:03d}.out.trace.h5"


def settled(overrides: list[str], job: Job) -> tuple[str, ...]:
    """Overrides that mean the same wherever they are read: their paths are those of `job`, which are absolute.

    A batch script runs in another folder than the one in which its job was submitted.
    """
    found = []
    for override in overrides:
        name = override.partition("=")[0].strip()
        section, _, key = name.partition(".")
        value = getattr(getattr(job, section), key)
        # In quotes: a name that ends in a space keeps it.
        found.append(f"{name}={json.dumps(str(value), ensure_ascii=False)}" if isinstance(value, Path) else override)
    return tuple(found)


def record(output: Path, submitted: Submitted) -> None:
    """Note a submission.

    Raises:
        DataError: it cannot be written.
    """
    path = folder_of(output) / _RECORD
    try:
        with path.open("a", encoding="utf-8") as stream:
            stream.write(json.dumps(asdict(submitted)) + "\n")
    except OSError as error:
        raise DataError(f"{path}: cannot be written: {error.strerror}") from error


def submissions(folder: Path) -> list[Submitted]:
    """What was submitted from a folder, oldest first; nothing where it is no such folder.

    Raises:
        DataError: the record is damaged.
    """
    path = folder / _RECORD
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
        return [Submitted(**json.loads(line)) for line in lines]
    except (FileNotFoundError, NotADirectoryError):
        return []
    except (OSError, ValueError, TypeError) as error:
        raise DataError(f"{path}: damaged record of submissions: {error}") from error
