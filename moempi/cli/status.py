"""`moempi status`: what Slurm says of submitted jobs, and what they have committed."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

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
    from moempi.slurm.find import by_folder, find

    if job is None:
        known = [(state, by_folder(state)) for state in scheduler.states()]
        return [_row(state, submitted) for state, submitted in known if submitted is not None]
    found = find(job, overrides)
    states = scheduler.states(found.ids)
    rows = [_row(state, found.submissions.get(state.id.split("_")[0]) or by_folder(state)) for state in states]
    if not rows and found.ids:
        rows = [{"id": found.ids[-1], "state": "not known to Slurm any more"}]
    if found.outputs and not any("output" in row for row in rows):
        # Slurm has forgotten it, or it was never submitted: what is committed is there all the same.
        rows += [_progress(output) for output in found.outputs]
    return rows


def _row(state: State, submitted: Submitted | None) -> dict[str, Any]:
    row = {key: str(value) for key, value in asdict(state).items()}
    if submitted is None:
        return row
    number = state.id.partition("_")[2]
    element = int(number) if number.isdecimal() else 0
    if element >= len(submitted.outputs):
        return row
    return row | {"job": submitted.job} | _progress(submitted.outputs[element])


def _progress(output: str) -> dict[str, Any]:
    from moempi.files.committed import committed

    found = committed(Path(output))
    return {"output": output, **asdict(found), "progress": str(found)}


def _lines(row: dict[str, Any]) -> list[str]:
    lines = []
    if "id" in row:
        more = f" on {row['where']}, {row['elapsed']} gone, {row['left']} left" if row["state"] == "RUNNING" else ""
        reason = f" {row['where']}" if row["state"] == "PENDING" else ""
        lines.append(f"job {row['id']}: {row['state']}{more}{reason}")
    if "output" in row:
        lines += [f"  {row['progress']}", f"  output  {row['output']}"]
    return lines
