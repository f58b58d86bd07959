"""The batch script of a job: pure text. Whatever names and paths hold, neither sbatch nor the shell takes it apart."""

from __future__ import annotations

import re
import shlex
import unicodedata
from dataclasses import dataclass, field
from pathlib import Path

from moempi.errors import JobError
from moempi.slurm.request import Request
from moempi.slurm.site import Site
from moempi.slurm.times import show_time

# Named here as in slurm/*.sbatch, whose text says what each is for.
_HEAD = """\
#!/bin/bash
# Written by `moempi submit`; `sbatch {script}` takes it again as it is.
"""

_BODY = """
# The signal that comes {lead} s before the time limit must not end this shell before moempi is there to take it.
trap '' USR1
{setup}
export SRUN_CPUS_PER_TASK="${{SLURM_CPUS_PER_TASK:-1}}"
{choice}
# In place of the shell, so that signals to the batch script reach moempi: it stops the ranks in order, and asks for
# another turn (scontrol requeue) if it was stopped early and this turn got anywhere.
exec {command}
"""


@dataclass(frozen=True)
class Batch:
    """What a script says besides what it asks Slurm for."""

    name: str
    script: Path  # where it will lie
    log: Path  # sbatch's pattern: %j, or %A and %a of an array
    job: Path
    overrides: tuple[str, ...] = ()
    program: tuple[str, ...] = ("moempi",)
    overwrite: bool = False  # at the first attempt
    quiet: bool = False
    log_dir: Path | None = None  # of an array: with a folder for each shard
    after: str | None = None  # id of a job that must have ended well
    shards: int = 0  # elements of an array; 0: none
    shard_files: dict[str, Path] = field(default_factory=dict)  # option -> file name with {} for the shard's number


def write_script(batch: Batch, request: Request, site: Site) -> str:
    """The text of a batch script.

    Raises:
        JobError: a name or path with a control character, or a log that sbatch cannot be told of.
    """
    options = sbatch_options(batch, request, site)
    lines = [f"#SBATCH {name}" + ("" if value is None else f"={quote(value)}") for name, value in options]
    head = _HEAD.format(script=shlex.quote(_line(str(batch.script)))) + "\n".join(lines)
    sourced = f"source {shlex.quote(_line(str(site.env_file)))}" if site.env_file else "# (the site has no env_file)"
    body = _BODY.format(
        lead=request.lead,
        setup=sourced,
        choice=_choice(batch),
        command=_command(batch, site),
    )
    return f"{head}\n{body}"


def sbatch_options(batch: Batch, request: Request, site: Site) -> list[tuple[str, str | None]]:
    """(option, value) for every #SBATCH line."""
    options: list[tuple[str, str | None]] = [
        ("--job-name", batch.name),
        ("--nodes", str(request.nodes)),
        ("--ntasks-per-node", str(request.tasks_per_node)),
        ("--cpus-per-task", str(request.cores_per_task)),
        ("--time", show_time(request.seconds)),
        ("--signal", f"B:USR1@{request.lead}"),
        ("--requeue", None),
        ("--open-mode", "append"),
        ("--output", _pattern(batch.log)),
        ("--chdir", str(batch.job.parent)),
    ]
    if request.memory_per_node:
        options.append(("--mem", f"{-(-request.memory_per_node // 2**20)}M"))
    if request.gpus_per_node:
        # Any other binding hides the GPUs of the neighbours, and what is hidden cannot be sent to.
        options += [("--gpus-per-node", str(request.gpus_per_node)), ("--gpu-bind", "none")]
    named = {"partition": site.partition, "account": site.account, "qos": site.qos, "constraint": site.constraint}
    options += [(f"--{name}", value) for name, value in named.items() if value is not None]
    options += [("--exclusive", None)] * site.exclusive
    if batch.after is not None:
        options.append(("--dependency", f"afterok:{batch.after}"))
    if batch.shards:
        options.append(("--array", f"0-{batch.shards - 1}"))
    more = [one.partition("=") for one in site.sbatch]
    return options + [(name, value if equals else None) for name, equals, value in more]


def quote(value: str) -> str:
    """A value on an #SBATCH line: in double quotes where it is not plain, which sbatch takes away again."""
    _line(value)
    if re.fullmatch(r"[\w./:=,@%+-]+", value):
        return value
    escaped = value.replace("\\", "\\\\").replace('"', '\\"')
    return f'"{escaped}"'


def _line(text: str) -> str:
    if any(unicodedata.category(one) in ("Cc", "Cs", "Zl", "Zp") for one in text):
        raise JobError(f"{text!r}: a name or path in a batch script can have no control character; rename it")
    return text


def _pattern(log: Path) -> str:
    """The log's folder as it is, its name as a pattern of sbatch."""
    if "\\" in str(log):
        raise JobError(f"{log}: sbatch writes no log to a path with a backslash; give another `output.file`")
    return f"{str(log.parent).replace('%', '%%')}/{log.name}"


def _choice(batch: Batch) -> str:
    lines = []
    if batch.shards:
        lines.append('shard=$(printf %03d "$SLURM_ARRAY_TASK_ID")')
    lines.append("how=--resume   # begins where nothing is there yet")
    if batch.overwrite:
        lines.append('[ "${SLURM_RESTART_COUNT:-0}" != 0 ] || how=--overwrite')
    return "\n".join(lines)


def _command(batch: Batch, site: Site) -> str:
    words = [shlex.join([*batch.program, "run", str(batch.job)]), '-n "$SLURM_NTASKS"']
    words += [f"--mpirun {shlex.quote(site.launcher)}"] if site.launcher else []
    words.append('"$how" --requeue')
    words += ["--quiet"] * batch.quiet
    if batch.log_dir:
        words.append(f"--log-dir {shlex.quote(str(batch.log_dir))}" + ('/shard-"$shard"' if batch.shards else ""))
    words += [f"--set {shlex.quote(one)}" for one in batch.overrides]
    for option, path in batch.shard_files.items():
        before, after = str(path).rsplit("{}", 1)
        words.append(f'--set {shlex.quote(f"{option}={before}")}"$shard"{shlex.quote(after)}')
    return " \\\n  ".join(words)
