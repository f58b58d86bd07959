"""`moempi status`: what Slurm says of submitted jobs, and what they have committed."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from moempi.errors import DataError

if TYPE_CHECKING:
    from moempi.slurm.place import Submitted
    from moempi.slurm.scheduler import State


@click.command()
@click.argument("job", required=False)
@click.option("--set", "overrides", multiple=True, metavar="SECTION.KEY=VALUE", help="As the job was submitted.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object per job and line.")
def status(job: str | None, overrides: tuple[str, ...], as_json: bool) -> None:
    """Say how far JOB is: the id of a job of Slurm, or a job file. Without JOB: all of yours in the queue.

    What is committed is read from the outputs, while the job runs and after it ended.

    \b
    moempi status
    moempi status jobs/demo.toml
    """
    for row in _rows(job, list(overrides)):
        click.echo(json.dumps(row) if as_json else "\n".join(_lines(row)))


def _rows(job: str | None, overrides: list[str]) -> list[dict[str, Any]]:
    from moempi.slurm import scheduler
    from moempi.slurm.find import find

    if job is None:
        rows = [_row(state, {}) for state in scheduler.states()]
        return [row for row in rows if row.keys() & {"job", "progress"}]  # those of moempi
    found = find(job, overrides)
    rows = [_row(state, found.submissions) for state in scheduler.states(found.ids)]
    if not rows and found.ids:
        rows = [{"id": found.ids[-1], "state": "not known to Slurm any more"}]
    if found.outputs and not any("output" in row for row in rows):
        # Slurm has forgotten it, or it was never submitted: what is committed is there all the same.
        rows += [_progress(output) for output in found.outputs]
    return rows


def _row(state: State, submissions: dict[str, Submitted]) -> dict[str, Any]:
    """A job of Slurm, and what is known of it if it is one of moempi's; `submissions` are those known already."""
    from moempi.slurm.find import by_folder

    row = {key: str(value) for key, value in asdict(state).items()}
    number, _, element = state.id.partition("_")
    try:
        submitted = submissions.get(number) or by_folder(state)
    except DataError as error:
        return row | {"progress": str(error)}
    if submitted is None:
        return row
    row["job"], place = submitted.job, int(element) if element.isdecimal() else 0
    return row | _progress(submitted.outputs[place]) if place < len(submitted.outputs) else row


def _progress(output: str) -> dict[str, Any]:
    """What an output holds; where it is damaged, what is wrong: the other jobs are shown all the same."""
    from moempi.files.committed import committed

    try:
        found = committed(Path(output))
    except DataError as error:
        return {"output": output, "progress": str(error)}
    return {"output": output, **asdict(found), "progress": str(found)}


def _lines(row: dict[str, Any]) -> list[str]:
    lines = []
    if "id" in row:
        more = f" on {row['where']}, {row['elapsed']} gone, {row['left']} left" if row["state"] == "RUNNING" else ""
        reason = f" {row['where']}" if row["state"] == "PENDING" else ""
        lines.append(f"job {row['id']}: {row['state']}{more}{reason}")
    if "progress" in row:
        lines.append(f"  {row['progress']}")
    if "output" in row:
        lines.append(f"  output  {row['output']}")
    return lines
