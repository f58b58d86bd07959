"""`moempi doctor`: what of this machine is fine, alone or as seen by ranks."""

from __future__ import annotations

import json
import os
import textwrap
from collections.abc import Sequence
from dataclasses import asdict
from typing import TYPE_CHECKING

import click

from moempi import mpi
from moempi.errors import EXIT_DONE, EXIT_FAILED, JobError

if TYPE_CHECKING:
    from moempi.doctor import Finding

_WIDTH = 80
_INDENT = 17


@click.command()
@click.option("-n", "--ranks", type=click.IntRange(1), help="Start so many ranks, and say what they see.")
@click.option("--mpirun", metavar="COMMAND", help="The mpirun that -n starts; by default the one beside this Python.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object instead of text.")
def doctor(ranks: int | None, mpirun: str | None, as_json: bool) -> int:
    """Say what of this machine is fine for moempi, and what to do about the rest.

    MPI library and launcher, ranks, nodes and cores, HDF5, GPUs and messages between them, Slurm, and versions. Ends
    with 1 where something is wrong.

    \b
    moempi doctor
    moempi doctor -n 4                   starts four ranks here
    srun -n 8 moempi doctor --json       inside a job: the ranks of this step
    """
    if ranks is not None and mpi.launched_size() > 1:
        raise JobError(f"-n {ranks} starts mpirun, but this is one of {mpi.launched_size()} ranks already: omit -n")
    if ranks is not None:
        from moempi.launch import launch, this_program

        return launch(this_program("doctor", *(["--json"] if as_json else [])), ranks, grace=5.0, mpirun=mpirun)
    findings, on_node = _seen_by_ranks() if mpi.launched_size() > 1 else ([], _gpus())
    if mpi.launched_rank() != 0:
        return mpi.start().bcast(None, root=0)
    from moempi.doctor import WRONG, examine, try_gpu_messages

    findings = [*examine(os.environ), *findings, *try_gpu_messages(on_node)]
    code = EXIT_FAILED if any(each.state == WRONG for each in findings) else EXIT_DONE
    click.echo(json.dumps([asdict(each) for each in findings], indent=2) if as_json else report(findings))
    return mpi.start().bcast(code, root=0) if mpi.launched_size() > 1 else code


def _gpus() -> int:
    """GPUs that this process sees: as many ranks send each other messages."""
    import torch

    return torch.cuda.device_count()


def _seen_by_ranks() -> tuple[list[Finding], int]:
    """What all ranks say together, and how many are on this node; nothing elsewhere than on rank 0. Collective."""
    from moempi.doctor import ranks, this_rank
    from moempi.exchange.topology import look_around

    world = mpi.start()
    topology = look_around(world)
    reports = world.gather(this_rank(topology.nodes.of[world.rank], topology.threads), root=0)
    return (ranks(reports, mpi.largest_tag()) if reports is not None else []), topology.place_on_node[1]


def report(findings: Sequence[Finding]) -> str:
    """Lines of at most 80 characters: subject, state, what was found; below it what to do."""
    lines = []
    for each in findings:
        head = f"{each.subject:<{_INDENT}}{each.state:<6}"
        body = textwrap.wrap(each.found, _WIDTH - len(head)) or [""]
        lines += [head + body[0], *(" " * len(head) + line for line in body[1:])]
        advice = textwrap.wrap(each.advice, _WIDTH - len(head) - 3)
        lines += [" " * len(head) + ("-> " if first else "   ") + line for first, line in _marked(advice)]
    return "\n".join(lines)


def _marked(lines: list[str]) -> list[tuple[bool, str]]:
    return [(number == 0, line) for number, line in enumerate(lines)]
