"""`moempi run`: a job, under mpirun or srun, or alone and starting mpirun itself."""

from __future__ import annotations

import json
import os
import signal
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import click

from moempi import mpi
from moempi.cli import logs
from moempi.cli.complete import complete_option
from moempi.cli.results import plural
from moempi.errors import EXIT_DONE, JobError
from moempi.job import Job, load_job, to_toml
from moempi.planning.memory import show_bytes
from moempi.progress import TERMINAL, open_terminal, own_terminal, terminal_for_ranks

if TYPE_CHECKING:
    from mpi4py import MPI

    from moempi.report import Outcome

BEGAN = "MOEMPI_BEGAN"  # when `moempi run -n` was given, in s since 1970, for its ranks


@click.command()
@click.argument("job", type=click.Path(path_type=Path))
@click.option("-n", "--ranks", type=click.IntRange(1), help="Start mpirun with this many ranks.")
@click.option(
    "--set",
    "overrides",
    multiple=True,
    metavar="SECTION.KEY=VALUE",
    shell_complete=complete_option,
    help="Override an option of the job; paths in it begin at the current folder.",
)
@click.option("--resume", is_flag=True, help="Go on where a stopped run of the job ended.")
@click.option("--overwrite", is_flag=True, help="Replace the output of an earlier run.")
@click.option("--verify", is_flag=True, help="Recompute the digests of the weights before the run.")
@click.option("--dry-run", is_flag=True, help="Print the effective job and what each rank will hold, then end.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object instead of text.")
@click.option("--quiet", is_flag=True, help="No progress, no summary: only warnings, errors, and --json.")
@click.option("--log-dir", type=click.Path(path_type=Path), help="Write a file of messages per rank into this folder.")
@click.option("--mpirun", metavar="COMMAND", help="The mpirun that -n starts; by default the one beside this Python.")
@click.option("--requeue", is_flag=True, help="In a batch job: ask Slurm for another turn if stopped early.")
def run(
    job: Path,
    ranks: int | None,
    overrides: tuple[str, ...],
    dry_run: bool,
    as_json: bool,
    quiet: bool,
    log_dir: Path | None,
    mpirun: str | None,
    requeue: bool,
    **how: bool,
) -> int:
    """Run JOB: completions for a file of prompts.

    Under mpirun or srun this is one rank of the job. Alone it is a job of one rank, or of as many as -n says.

    \b
    moempi run jobs/demo.toml -n 16
    mpirun -n 16 moempi run jobs/demo.toml
    moempi run jobs/demo.toml -n 4 --resume --log-dir logs
    moempi run jobs/demo.toml --dry-run -n 64 --set model.dtype=bfloat16
    """
    if how["resume"] and how["overwrite"]:
        raise JobError("--resume and --overwrite exclude each other: one goes on with the output, one replaces it")
    checked = load_job(job, list(overrides))
    if dry_run:
        return _dry_run(checked, ranks or mpi.launched_size(), as_json)
    if ranks is not None and mpi.launched_size() > 1:
        raise JobError(f"-n {ranks} starts mpirun, but this is one of {mpi.launched_size()} ranks already: omit -n")
    if requeue and ranks is None:
        raise JobError("--requeue is for the one process of a batch script that starts the ranks: give -n")
    if mpi.launched_size() == 1:
        _look_through(checked)
    if ranks is not None:
        given = {**{f"--{name}": on for name, on in how.items()}, "--json": as_json, "--quiet": quiet}
        words = ["run", str(job), *(part for override in overrides for part in ("--set", override))]
        words += [flag for flag, on in given.items() if on]
        words += ["--log-dir", str(log_dir)] if log_dir else []
        what = "" if quiet else f"{plural(ranks, 'rank')} for {job}"
        return _launch(words, ranks, checked, mpirun, what, requeue=requeue, fresh=how["overwrite"])
    return _run_here(checked, Shown(as_json, quiet, log_dir), **how)


@dataclass(frozen=True)
class Shown:
    """What a run tells, and where."""

    as_json: bool
    quiet: bool
    log_dir: Path | None


def _look_through(job: Job) -> None:
    """Let a child process walk the files that a job names, while there are no ranks yet that a crash could hurt."""
    from moempi.files.check_in_child import check_in_child

    check_in_child(job.files_to_read())


def _launch(
    arguments: list[str], ranks: int, job: Job, mpirun: str | None, what: str, *, requeue: bool, fresh: bool
) -> int:
    from moempi.launch import find_mpirun, launch, this_program
    from moempi.slurm.requeue import Turn

    find_mpirun(mpirun, os.environ)  # before anything is said
    if what:
        click.echo(f"moempi: starting {what}", err=True)
    # The ranks write into pipes: only this process knows of the terminal behind them, and when it all began.
    os.environ[TERMINAL] = terminal_for_ranks(sys.stderr, os.environ)
    os.environ[BEGAN] = repr(time.time())
    turn = Turn(job.output.file, fresh=fresh) if requeue else None
    code = launch(this_program(*arguments), ranks, job.run.grace, mpirun, mpi.signals)
    if word := word_of_kill(code, mpi.signals.signal):
        click.echo(word, err=True)
    if turn is not None:
        turn.end(code, mpi.signals.signal)
    return code


def word_of_kill(code: int, told: int | None) -> str:
    """What to say of ranks that were killed, since they could say nothing themselves; "" where that is not so.

    Args:
        code: that the launch ended with.
        told: the last signal that it was sent; None where there was none.
    """
    if code <= 128 or told is not None:
        return ""
    number = code - 128
    name = signal.Signals(number).name if number in set(signal.Signals) else "unknown"
    memory = ": the machine may be out of memory" if number == signal.SIGKILL else ""
    return (
        f"moempi: error: a rank, or mpirun, was ended by signal {number} ({name}){memory}; what was committed is kept, "
        "and --resume goes on from there"
    )


def _run_here(job: Job, shown: Shown, *, resume: bool, overwrite: bool, verify: bool) -> int:
    began = float(os.environ.get(BEGAN) or time.time())
    alone = mpi.launched_size() == 1
    if alone:
        # No launcher stands between this process and the terminal: Ctrl-C drains too, and so does its end.
        mpi.signals.answer = "\nmoempi: stopping: what is done gets committed, and --resume goes on from there\n"
        mpi.signals.install(signal.SIGUSR1, signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
    if job.run.device != "cpu" and job.exchange.gpu_aware != "off":
        _prepare_gpu_mpi()
    world = mpi.start()
    if alone:
        mpi.signals.install(signal.SIGHUP)  # once more: libraries of MPI (UCX) take it for themselves
    draws = world.rank == 0 and not shown.quiet
    terminal = (open_terminal(os.environ) or own_terminal(sys.stderr, os.environ)) if draws else None
    logs.set_up(world.rank, quiet=shown.quiet, folder=shown.log_dir, in_terminal=terminal is not None, append=resume)
    _warn_of_hidden_gpus(world)
    from moempi.run import run as run_job

    try:
        outcome = run_job(
            world, job, resume=resume, overwrite=overwrite, verify=verify, drain=mpi.signals, terminal=terminal
        )
    except BaseException as error:
        logs.END.error("%s", mpi.describe(error))
        raise
    if world.rank == 0 and shown.as_json:
        _tell(json.dumps(outcome.as_dict()))
    elif world.rank == 0 and not shown.quiet:
        _tell(describe(outcome, time.time() - began))
    return outcome.exit_code


def _tell(text: str) -> None:
    """Say the last lines. Where the terminal has gone, and the run stopped for that, nobody is there to read them."""
    try:
        click.echo(text)
    except OSError:
        if mpi.signals.signal != signal.SIGHUP:
            raise
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)  # nothing is to be flushed into it at exit


def _warn_of_hidden_gpus(world: MPI.Intracomm) -> None:
    """Say so where Slurm hides the neighbours' GPUs. Collective, because ranks of a node are counted."""
    import logging

    from moempi.slurm.binding import hidden_gpus

    text = hidden_gpus(os.environ, mpi.ranks_on_node(world))
    if text and world.rank == 0:
        logging.getLogger("moempi").warning(text)


def _prepare_gpu_mpi() -> None:
    """Let the embedded MPI take the memory of GPUs, where there are any; it must not have been loaded yet."""
    import torch

    from moempi.exchange import gpu_mpi

    if torch.cuda.is_available():
        gpu_mpi.prepare(os.environ)


def describe(outcome: Outcome, seconds: float = 0.0) -> str:
    """The last lines of a run, for a person.

    Args:
        seconds: since the command was given.
    """
    if outcome.already_done:
        return f"nothing to do: {outcome.output} is complete"
    now = outcome.new_tokens - outcome.earlier_new_tokens
    resumed = outcome.earlier_new_tokens or outcome.earlier_finished
    lines = [
        f"{outcome.finished} of {plural(outcome.sequences, 'sequence')} finished, "
        f"{plural(outcome.new_tokens, 'new token')}{f'; in this run {now:,}' if resumed else ''} in "
        f"{outcome.seconds:.2f} s: {outcome.tokens_per_second:.0f} tokens/s "
        f"({outcome.mode} mode, {plural(outcome.ranks, 'rank')})",
    ]
    if outcome.messages:
        lines.append(f"on {outcome.device}; rows travel {outcome.messages}")
    if outcome.memory_peak:
        lines.append(
            f"memory: {show_bytes(max(outcome.memory_peak))} at most on a rank, "
            f"{show_bytes(max(outcome.memory_planned))} planned"
        )
    if seconds:
        lines.append(f"total:  {seconds:.1f} s, with start-up, reading and writing")
    if outcome.exit_code == EXIT_DONE:
        lines.append(f"output: {_nearby(outcome.output)}")
    else:
        lines.append("stopped early and committed; go on with --resume")
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
