"""`moempi cancel`: end a submitted job so that what it has done is committed, or at once."""

from __future__ import annotations

import click

from moempi.errors import JobError


@click.command()
@click.argument("job")
@click.option("--set", "overrides", multiple=True, metavar="SECTION.KEY=VALUE", help="As the job was submitted.")
@click.option("--now", is_flag=True, help="End it at once: only what is committed already is kept.")
def cancel(job: str, overrides: tuple[str, ...], now: bool) -> None:
    """End JOB (the id of a job of Slurm, or a job file): it commits what it has done and is not requeued.

    `moempi submit JOB --resume` goes on with it later.

    \b
    moempi cancel 1234
    moempi cancel jobs/demo.toml --now
    """
    from moempi.slurm import scheduler
    from moempi.slurm.find import find

    meant = find(job, list(overrides))
    if not meant.ids:
        raise JobError(f"{job}: was not submitted from here: beside {meant.outputs[-1]} there is no record of it")
    living = {one: scheduler.living(one) for one in meant.ids}
    if not any(living.values()):
        raise JobError(f"{job}: Slurm knows of no such job that waits or runs; `moempi status` shows those there are")
    for job_id, found in living.items():
        states = {one.state for one in found}
        if now and states:
            scheduler.cancel(job_id)
        elif states:
            scheduler.interrupt(job_id, states)
        if states:
            drains = "RUNNING" in states and not now
            click.echo(f"job {job_id}: {'commits what it has done and ends' if drains else 'cancelled'}")
