"""What the commands of `moempi bench` share: sizes in options, ranks to start, MPI for the memory of GPUs."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

import click

from moempi import mpi
from moempi.errors import JobError
from moempi.job import parse_bytes

if TYPE_CHECKING:
    from mpi4py import MPI

GRACE = 5.0  # seconds that ranks have to end after a signal; there is nothing to commit


class Size(click.ParamType):
    """A number of bytes, or a size like "64 MiB"."""

    name = "bytes"

    def convert(self, value: object, param: click.Parameter | None, ctx: click.Context | None) -> int:
        try:
            return int(parse_bytes(value))
        except (TypeError, ValueError) as error:
            self.fail(f"{value!r}: {error}", param, ctx)


def refuse_ranks_in_ranks(ranks: int | None) -> None:
    """Refuse -n under a launcher.

    Raises:
        JobError: this is one of several ranks already.
    """
    if ranks is not None and mpi.launched_size() > 1:
        raise JobError(f"-n {ranks} starts mpirun, but this is one of {mpi.launched_size()} ranks already: omit -n")


def start_ranks(arguments: list[str], ranks: int, mpirun: str | None) -> int:
    """Run this program's command again on so many ranks."""
    from moempi.launch import launch, this_program

    return launch(this_program(*arguments), ranks, GRACE, mpirun)


def start_mpi(device: str) -> MPI.Intracomm:
    """The world, of an MPI that was made ready for the memory of GPUs first where they are measured."""
    if device == "cuda":
        from moempi.exchange import gpu_mpi

        gpu_mpi.prepare(os.environ)
    return mpi.start()


def options_of(ctx: click.Context, without: tuple[str, ...] = ("out", "ranks", "mpirun")) -> list[str]:
    """The options of a command as they would be typed, for the ranks that it starts."""
    words: list[str] = []
    for parameter in ctx.command.params:
        name, value = parameter.name or "", ctx.params.get(parameter.name or "")
        if name in without or value is None or value is False:
            continue
        long = max(parameter.opts, key=len)
        if value is True:
            words.append(long)
        else:
            words += [f"{long}={each}" for each in (value if isinstance(value, tuple) else (value,))]
    return words
