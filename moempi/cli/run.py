"""`moempi run`: a job, under mpirun or srun, or alone and starting mpirun itself."""

from __future__ import annotations

import json
import os
import signal
from pathlib import Path
from typing import TYPE_CHECKING

import click

from moempi import mpi
from moempi.errors import EXIT_DONE, JobError
from moempi.job import Job, load_job, to_toml

if TYPE_CHECKING:
    from mpi4py import MPI

    from moempi.report import Outcome


@click.command()
@click.argument("job", type=click.Path(path_type=Path))
@click.option("-n", "--ranks", type=click.IntRange(1), help="Start mpirun with this many ranks.")
@click.option("--set", "overrides", multiple=True, metavar="SECTION.KEY=VALUE", help="Override an option of the job.")
@click.option("--resume", is_flag=True, help="Go on where a stopped run of the job ended.")
@click.option("--overwrite", is_flag=True, help="Replace the output of an earlier run.")
@click.option("--verify", is_flag=True, help="Recompute the digests of the weights before the run.")
@click.option("--dry-run", is_flag=True, help="Print the effective job and what each rank will hold, then end.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object instead of text.")
@click.option("--mpirun", metavar="COMMAND", help="The mpirun that -n starts; by default the one beside this Python.")
@click.option("--requeue", is_flag=True, help="In a batch job: ask Slurm for another turn if stopped early.")
def run(
    job: Path,
    ranks: int | None,
    overrides: tuple[str, ...],
    resume: bool,
    overwrite: bool,
    verify: bool,
    dry_run: bool,
    as_json: bool,
    mpirun: str | None,
    requeue: bool,
) -> int:
    """Run JOB: completions for a file of prompts.

    Under mpirun or srun this is one rank of the job. Alone it is a job of one rank, or of as many as -n says.

    \b
    moempi run jobs/demo.toml -n 16
    mpirun -n 16 moempi run jobs/demo.toml
    moempi run jobs/demo.toml --dry-run -n 64 --set model.dtype=bfloat16
    """
    if resume and overwrite:
        raise JobError("--resume and --overwrite exclude each other: one keeps the earlier output, one removes it")
    checked = load_job(job, list(overrides))
    if dry_run:
        return _dry_run(checked, ranks or mpi.launched_size(), as_json)
    if ranks is not None and mpi.launched_size() > 1:
        raise JobError(f"-n {ranks} starts mpirun, but this is one of {mpi.launched_size()} ranks already: omit -n")
    if requeue and ranks is None:
        raise JobError("--requeue is for the one process of a batch script that starts the ranks: give -n")
    if ranks is not None:
        given = {"--resume": resume, "--overwrite": overwrite, "--verify": verify, "--json": as_json}
        flags = [flag for flag, on in given.items() if on]
        settings = [part for override in overrides for part in ("--set", override)]
        arguments = ["run", str(job), *settings, *flags]
        return _launch(arguments, ranks, checked, mpirun, requeue=requeue)
    return _run_here(checked, as_json, resume=resume, overwrite=overwrite, verify=verify)


def _launch(arguments: list[str], ranks: int, job: Job, mpirun: str | None, *, requeue: bool) -> int:
    from moempi.launch import launch, this_program
    from moempi.slurm.requeue import Turn

    turn = Turn(job.output.file) if requeue else None
    code = launch(this_program(*arguments), ranks, job.run.grace, mpirun, mpi.signals)
    if turn is not None:
        turn.end(code)
    return code


def _run_here(job: Job, as_json: bool, *, resume: bool, overwrite: bool, verify: bool) -> int:
    if mpi.launched_size() == 1:
        # No launcher stands between this process and the terminal: Ctrl-C drains too.
        mpi.signals.install(signal.SIGUSR1, signal.SIGINT, signal.SIGTERM)
    world = mpi.start()
    _log_from(world.rank)
    _warn_of_hidden_gpus(world)
    from moempi.run import run as run_job

    outcome = run_job(world, job, resume=resume, overwrite=overwrite, verify=verify, drain=mpi.signals)
    if world.rank == 0:
        click.echo(json.dumps(outcome.as_dict()) if as_json else describe(outcome))
    return outcome.exit_code


def _warn_of_hidden_gpus(world: MPI.Intracomm) -> None:
    """Say so where Slurm hides the neighbours' GPUs. Collective, because ranks of a node are counted."""
    import logging

    from moempi.slurm.binding import hidden_gpus

    text = hidden_gpus(os.environ, mpi.ranks_on_node(world))
    if text and world.rank == 0:
        logging.getLogger("moempi").warning(text)


def _log_from(rank: int) -> None:
    import logging

    level = logging.INFO if rank == 0 else logging.WARNING
    logging.basicConfig(level=level, format=f"rank {rank}: %(message)s" if rank else "%(message)s")


def describe(outcome: Outcome) -> str:
    """The last lines of a run, for a person."""
    if outcome.already_done:
        return f"nothing to do: {outcome.output} is complete"
    now = outcome.new_tokens - outcome.earlier_new_tokens
    resumed = outcome.earlier_new_tokens or outcome.earlier_finished
    lines = [
        f"{outcome.finished} of {outcome.sequences} sequences finished, {outcome.new_tokens} new tokens"
        f"{f'; in this run {now}' if resumed else ''} in {outcome.seconds:.2f} s: "
        f"{outcome.tokens_per_second:.0f} tokens/s ({outcome.mode} mode, {outcome.ranks} ranks)",
    ]
    if outcome.exit_code == EXIT_DONE:
        lines.append(f"output: {_nearby(outcome.output)}")
    else:
        lines.append(f"stopped early and committed; go on with --resume (exit code {outcome.exit_code})")
    if outcome.trace is not None:
        lines.append(f"trace:  {_nearby(outcome.trace)}")
    return "\n".join(lines)


def _nearby(path: Path | None) -> str:
    """A path as one would type it here, where it lies below the current folder."""
    near = os.path.relpath(path or "")
    return str(path) if near.startswith(os.pardir) else near


def _dry_run(job: Job, n_ranks: int, as_json: bool) -> int:
    from dataclasses import asdict

    from moempi.cli.plan_table import memory_table, route_lines
    from moempi.prepare import look

    layout = look(job, n_ranks).shape.layout
    if mpi.launched_rank() != 0:
        return EXIT_DONE
    if as_json:
        ranks = [asdict(plan) | {"total": plan.total} for plan in layout.memory]
        route = {"name": layout.route.name, "reason": layout.route.reason, "node_of_rank": layout.nodes.of}
        shown = {"job": job.model_dump(mode="json"), "dtype": layout.dtype, "route": route, "ranks": ranks}
        click.echo(json.dumps(shown))
    else:
        # The tables stand in comments, so that what is printed is a job file as a whole.
        lines = [*route_lines(layout), *memory_table(layout)]
        click.echo("\n".join([to_toml(job), *(f"# {line}" for line in lines)]))
    return EXIT_DONE
