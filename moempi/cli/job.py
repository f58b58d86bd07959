"""`moempi job`: schema."""

from __future__ import annotations

import json
from pathlib import Path

import click

from moempi.cli.groups import Group
from moempi.errors import JobError


@click.group(cls=Group)
def job() -> None:
    """Describe the job file.

    Example: moempi job schema --out job.schema.json
    """


@job.command()
@click.option("--out", type=click.Path(path_type=Path), help="Write it here instead of printing it.")
def schema(out: Path | None) -> None:
    """Print a JSON schema of the job file, with which editors complete and check options.

    With taplo (Even Better TOML), name it in the first line of a job: #:schema job.schema.json

    Example: moempi job schema --out jobs/job.schema.json
    """
    from moempi.job_schema import job_schema

    text = json.dumps(job_schema(), indent=2) + "\n"
    if out is None:
        click.echo(text, nl=False)
        return
    try:
        out.write_text(text, encoding="utf-8")
    except OSError as error:
        raise JobError(f"--out {out}: cannot be written: {error.strerror}") from None
    click.echo(f"{out}: schema of the job file")
