"""`moempi submit`: a job to Slurm, as a batch script that is written, shown and kept."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from moempi.errors import DataError, JobError
from moempi.job import Job, load_job, parse_bytes

if TYPE_CHECKING:
    from moempi.slurm.request import Needs, Request
    from moempi.slurm.script import Batch
    from moempi.slurm.site import Site


@click.command()
@click.argument("job", type=click.Path(path_type=Path))
@click.option("-N", "--nodes", type=click.IntRange(1), default=1, show_default=True, help="Nodes.")
@click.option("--tasks-per-node", type=click.IntRange(1), help="Ranks per node; by default one per GPU, or per core.")
@click.option("--time", "limit", help='Time limit, like "90" (minutes) or "1-12:00:00"; by default estimated.')
@click.option("--mem", "memory", help='Memory per node, like "64 GiB"; by default as planned, with a margin.')
@click.option("--name", help="Name of the job; by default that of the job file.")
@click.option("--site", "site_name", metavar="NAME|FILE", help="Profile of the cluster: a TOML file.")
@click.option(
    "--set",
    "overrides",
    multiple=True,
    metavar="SECTION.KEY=VALUE",
    help="Override an option of the job; paths in it begin at the current folder.",
)
@click.option("--array", "shards", type=click.IntRange(1, 1000), help="Cut the input into so many shards, a job each.")
@click.option("--after", metavar="ID", help="Begin when this job of Slurm has ended well.")
@click.option("--resume", is_flag=True, help="Go on where a stopped run of the job ended.")
@click.option("--overwrite", is_flag=True, help="Replace the output of an earlier run.")
@click.option("--quiet", is_flag=True, help="No progress, no summary in the job's log.")
@click.option("--log-dir", type=click.Path(path_type=Path), help="Write a file of messages per rank into this folder.")
@click.option("--dry-run", is_flag=True, help="Print the script and what it rests on; write and submit nothing.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object.")
def submit(job: Path, dry_run: bool, as_json: bool, **options: Any) -> None:
    """Write a batch script that runs JOB, and submit it.

    The job is checked and its memory planned here, before it waits in a queue. The script goes on by itself after
    a time limit: it commits, is requeued, resumes.

    \b
    moempi submit jobs/demo.toml --nodes 2 --tasks-per-node 8 --time 30 --dry-run
    moempi submit jobs/demo.toml --nodes 4 --site mycluster
    """
    from moempi.slurm.place import folder_of
    from moempi.slurm.script import write_script
    from moempi.slurm.site import load_site

    if options["resume"] and options["overwrite"]:
        raise JobError("--resume and --overwrite exclude each other: one goes on with the output, one replaces it")
    checked, site = load_job(job, list(options["overrides"])), load_site(options["site_name"])
    request, needs = _request(checked, site, options)
    batch = _batch(job, checked, site, options)
    text = write_script(batch, request, site)
    if dry_run:
        click.echo(text)
        click.echo("\n".join(f"# {line}" for line in _reasons(request, needs, site)))
        return
    outputs = _outputs(checked, batch)
    if not (options["resume"] or options["overwrite"]):
        _refuse_existing(checked, batch, outputs)
    _write(batch, checked, text, overwrite=options["overwrite"])
    job_id = _submit(batch, checked, outputs)
    if as_json:
        about = {"id": job_id, "script": str(batch.script), "outputs": outputs, "log": _log(batch, job_id)}
        click.echo(json.dumps(about | {"nodes": request.nodes, "ranks": request.ranks, "seconds": request.seconds}))
    else:
        click.echo("\n".join(_told(batch, checked, request, job_id, folder_of(checked.output.file))))


# ---------------------------------------------------------------- what is asked for


def _request(job: Job, site: Site, options: dict[str, Any]) -> tuple[Request, Needs]:
    from moempi.slurm.needs import needs_of
    from moempi.slurm.request import resolve, tasks_per_node
    from moempi.slurm.times import parse_time

    tasks = tasks_per_node(site, options["tasks_per_node"], job.run.device)
    try:
        seconds = None if options["limit"] is None else parse_time(options["limit"])
        memory = None if options["memory"] is None else parse_bytes(options["memory"])
    except ValueError as error:
        shown = {"--time": options["limit"], "--mem": options["memory"]}
        raise JobError(f"{', '.join(f'{k} {v!r}' for k, v in shown.items() if v is not None)}: {error}") from None
    needs = needs_of(job, options["nodes"] * tasks, options["shards"] or 1, gpus=site.gpus_per_node > 0)
    request = resolve(
        needs,
        site,
        nodes=options["nodes"],
        tasks=tasks,
        seconds=seconds,
        memory=memory,
        grace=job.run.grace,
        share_gpus=job.run.share_gpus,
    )
    return request, needs


def _reasons(request: Request, needs: Needs, site: Site) -> list[str]:
    from moempi.planning.memory import show_bytes
    from moempi.slurm.request import estimate
    from moempi.slurm.times import show_time

    guess = estimate(needs, site, request.ranks)
    of_gpu = f", and {show_bytes(needs.gpu_bytes)} of its GPU" if needs.gpu_bytes else ""
    return [
        f"{request.ranks} ranks; the fullest is planned with {show_bytes(needs.rank_bytes)}{of_gpu}",
        f"time: {show_time(request.seconds)}; estimated {guess:.0f} s for {needs.prompt_tokens} prompt tokens and at "
        f"most {needs.new_tokens} new ones, from the rates of the site profile",
    ]


def _batch(path: Path, job: Job, site: Site, options: dict[str, Any]) -> Batch:
    from moempi.slurm.place import SCRIPT, folder_of, settled, shard_output
    from moempi.slurm.scheduler import check_id
    from moempi.slurm.script import Batch

    folder, shards = folder_of(job.output.file), options["shards"] or 0
    output = shard_output(job.output.file, 0)
    named = {
        "input.file": folder / "shard-{}.h5",
        "output.file": output.with_name("shard-{}.out.h5"),
        "trace.file": output.with_name("shard-{}.out.trace.h5"),
    }
    return Batch(
        name=options["name"] or path.stem,
        script=folder / SCRIPT,
        log=folder / ("%A_%a.log" if shards else "%j.log"),
        job=path.resolve(),
        overrides=settled(options["overrides"], job),
        program=(str(site.python or sys.executable), "-m", "moempi"),
        overwrite=options["overwrite"],
        quiet=options["quiet"],
        log_dir=options["log_dir"] and options["log_dir"].absolute(),
        after=check_id(options["after"]) if options["after"] else None,
        shards=shards,
        shard_files=named if shards else {},
    )


# ---------------------------------------------------------------- doing it


def _outputs(job: Job, batch: Batch) -> list[str]:
    from moempi.slurm.place import shard_output

    if not batch.shards:
        return [str(job.output.file)]
    return [str(shard_output(job.output.file, shard)) for shard in range(batch.shards)]


def _refuse_existing(job: Job, batch: Batch, outputs: list[str]) -> None:
    """The refusals of `moempi run`, before anything waits in a queue."""
    from moempi.files.committed import committed
    from moempi.files.trace import refuse_existing
    from moempi.slurm.place import shard_trace

    for output in outputs:
        found = committed(Path(output))
        if found.complete or found.sequences:
            raise JobError(
                f"{output}: {found}; give --resume to go on, --overwrite to start again, or another `output.file`"
            )
    if job.trace.level != "off":
        shards = range(batch.shards)
        for trace in [shard_trace(job.output.file, shard) for shard in shards] or [job.trace_file]:
            refuse_existing(trace)


def _write(batch: Batch, job: Job, text: str, *, overwrite: bool) -> None:
    """Write the script and the shards."""
    from moempi.files.parts import make_folder
    from moempi.files.shards import split_inputs

    folder = batch.script.parent
    make_folder(folder)
    if batch.shards:
        # A shard that is there stays if it is the same: what its job has begun can go on.
        new_tokens = job.generate.max_new_tokens
        split_inputs(job.input.file, folder, batch.shards, new_tokens, keep=True, overwrite=overwrite)
    try:
        batch.script.write_text(text, encoding="utf-8")
    except OSError as error:
        raise JobError(f"{batch.script}: cannot be written: {error.strerror}") from error


def _submit(batch: Batch, job: Job, outputs: list[str]) -> str:
    from moempi.slurm import scheduler
    from moempi.slurm.place import Submitted, record

    job_id = scheduler.sbatch(batch.script)
    try:
        record(job.output.file, Submitted(job_id, str(batch.job), outputs))
    except DataError as error:
        lost = f"submitted as job {job_id}, but not recorded: {error}; `moempi cancel {job_id}` ends it"
        raise DataError(lost) from error
    return job_id


def _log(batch: Batch, job_id: str) -> str:
    return str(batch.log.with_name(f"{job_id}_*.log" if batch.shards else f"{job_id}.log"))


def _told(batch: Batch, job: Job, request: Request, job_id: str, folder: Path) -> list[str]:
    import shlex

    lines = [
        f"submitted as job {job_id}: {request.nodes} nodes x {request.tasks_per_node} ranks",
        f"  script  {batch.script}",
        f"  log     {_log(batch, job_id)}",
        f"  output  {job.output.file if not batch.shards else folder / 'shard-*.out.h5'}",
        f"how far it is: moempi status {job_id}; to end it: moempi cancel {job_id}",
    ]
    if batch.shards:
        target, shards = shlex.quote(str(job.output.file)), shlex.quote(str(folder))
        lines.append(f"once all have ended: moempi outputs merge {target} {shards}/shard-*.out.h5")
    return lines
