"""`moempi bench`: measure what planners and `auto` options need to know of a machine."""

from __future__ import annotations

from pathlib import Path

import click

from moempi import mpi
from moempi.cli.groups import Group
from moempi.cli.results import refuse_existing, show
from moempi.errors import EXIT_DONE, JobError
from moempi.job import parse_bytes

GRACE = 5.0  # seconds that ranks have to end after a signal; there is nothing to commit


class Size(click.ParamType):
    """A number of bytes, or a size like "64 MiB"."""

    name = "bytes"

    def convert(self, value: object, param: click.Parameter | None, ctx: click.Context | None) -> int:
        try:
            return int(parse_bytes(value))
        except (TypeError, ValueError) as error:
            self.fail(f"{value!r}: {error}", param, ctx)


@click.group(cls=Group)
def bench() -> None:
    """Measure what planners and `auto` options need to know of a machine.

    Example: moempi bench links links.h5 -n 8
    """


@bench.command()
@click.argument("out", type=click.Path(path_type=Path))
@click.option("-n", "--ranks", type=click.IntRange(2), help="Start mpirun with this many ranks.")
@click.option("--largest", type=Size(), default="64 MiB", show_default=True, help="Largest message.")
@click.option("--repeats", type=click.IntRange(1), default=11, show_default=True, help="Round trips of every size.")
@click.option(
    "--limit",
    type=click.FloatRange(0, min_open=True),
    default=1.0,
    show_default=True,
    help="Seconds after which a pair begins no further round trip of a size.",
)
@click.option("--overwrite", is_flag=True, help="Replace OUT where it exists.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object instead of a table.")
@click.option("--mpirun", metavar="COMMAND", help="The mpirun that -n starts; by default the one beside this Python.")
def links(
    out: Path,
    ranks: int | None,
    largest: int,
    repeats: int,
    limit: float,
    overwrite: bool,
    as_json: bool,
    mpirun: str | None,
) -> int:
    """Measure latency and bandwidth between every two ranks, and write them to OUT.

    One pair sends at a time. Ranks are placed as the launcher places those of a job; so start it as you start jobs.

    \b
    moempi bench links links.h5 -n 8
    mpirun -n 8 moempi bench links links.h5
    """
    if not 2 <= largest < 2**31:
        raise JobError(f"--largest {largest}: expected 2 bytes to 2 GiB - 1 (2147483647)")
    launched = mpi.launched_size()
    if launched == 1 and ranks is None:
        raise JobError("a link needs two ranks: give -n RANKS, or start the command under mpirun or srun")
    if launched > 1 and ranks is not None:
        raise JobError(f"-n {ranks} starts mpirun, but this is one of {launched} ranks already: omit -n")
    if mpi.launched_rank() == 0:
        refuse_existing(out, overwrite)
    if ranks is not None:
        options = [f"--largest={largest}", f"--repeats={repeats}", f"--limit={limit}"]
        flags = [flag for flag, on in {"--overwrite": overwrite, "--json": as_json}.items() if on]
        return _launch(["bench", "links", str(out), *options, *flags], ranks, mpirun)
    return _measure(out, largest, repeats, limit, as_json)


def _launch(arguments: list[str], ranks: int, mpirun: str | None) -> int:
    from moempi.launch import launch, this_program

    return launch(this_program(*arguments), ranks, GRACE, mpirun)


def _measure(out: Path, largest: int, repeats: int, limit: float, as_json: bool) -> int:
    world = mpi.start()
    from moempi.bench.links import measure_links
    from moempi.cli.links_table import as_dict, links_table
    from moempi.files.links import write_links

    found = measure_links(world, largest, repeats, limit)
    if found is not None:
        write_links(out, found)
        if as_json:
            show({"links": str(out), **as_dict(found)}, as_json=True)
        else:
            click.echo("\n".join([*links_table(found), f"links: {out}"]))
    mpi.meet(world)
    return EXIT_DONE
