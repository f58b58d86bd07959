"""`moempi bench`: measure what planners and `auto` options need to know of a machine."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from moempi import mpi
from moempi.cli.bench_job import job
from moempi.cli.bench_layer import layer
from moempi.cli.groups import Group
from moempi.cli.measuring import Size, refuse_ranks_in_ranks, start_mpi, start_ranks
from moempi.cli.results import refuse_existing, show
from moempi.errors import EXIT_DONE, JobError

if TYPE_CHECKING:
    from mpi4py import MPI


@click.group(cls=Group)
def bench() -> None:
    """Measure what planners and `auto` options need to know of a machine.

    Example: moempi bench links links.h5 -n 8
    """


bench.add_command(layer)
bench.add_command(job)


@bench.command()
@click.argument("out", type=click.Path(path_type=Path))
@click.option("-n", "--ranks", type=click.IntRange(2), help="Start mpirun with this many ranks.")
@click.option("--largest", type=Size(), default="64 MiB", show_default=True, help="Largest message.")
@click.option("--device", type=click.Choice(["cpu", "cuda"]), default="cpu", show_default=True, help="Whose memory.")
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
    device: str,
    repeats: int,
    limit: float,
    overwrite: bool,
    as_json: bool,
    mpirun: str | None,
) -> int:
    """Measure latency and bandwidth between every two ranks, and write them to OUT.

    One pair sends at a time. Ranks are placed as the launcher places those of a job; so start it as you start jobs.
    With --device cuda messages go from GPU to GPU; ranks take turns where there are fewer GPUs.

    \b
    moempi bench links links.h5 -n 8
    moempi bench links gpus.h5 -n 2 --device cuda
    mpirun -n 8 moempi bench links links.h5
    """
    if not 2 <= largest < 2**31:
        raise JobError(f"--largest {largest}: expected 2 bytes to 2 GiB - 1 (2147483647)")
    if mpi.launched_size() == 1 and ranks is None:
        raise JobError("a link needs two ranks: give -n RANKS, or start the command under mpirun or srun")
    refuse_ranks_in_ranks(ranks)
    if mpi.launched_rank() == 0:
        refuse_existing(out, overwrite)
    if ranks is not None:
        options = [f"--largest={largest}", f"--device={device}", f"--repeats={repeats}", f"--limit={limit}"]
        flags = [flag for flag, on in {"--overwrite": overwrite, "--json": as_json}.items() if on]
        return start_ranks(["bench", "links", str(out), *options, *flags], ranks, mpirun)
    return _measure(out, largest, device, repeats, limit, as_json)


def _measure(out: Path, largest: int, device: str, repeats: int, limit: float, as_json: bool) -> int:
    world = start_mpi(device)
    from moempi.bench.links import host_buffer, measure_links
    from moempi.cli.links_table import as_dict, links_table
    from moempi.files.links import write_links

    make_buffer, name = _gpu_memory(world) if device == "cuda" else (host_buffer, "cpu")
    found = measure_links(world, largest, repeats, limit, make_buffer, name)
    if found is not None:
        write_links(out, found)
        if as_json:
            show({"links": str(out), **as_dict(found)}, as_json=True)
        else:
            click.echo("\n".join([*links_table(found), f"links: {out}"]))
    mpi.meet(world)
    return EXIT_DONE


def _gpu_memory(world: MPI.Intracomm) -> tuple[Callable[[int], Any], str]:
    """What makes buffers of this rank's GPU, and the name of it. Collective."""
    import torch

    from moempi.bench.gpu import GpuBuffers, take_gpu
    from moempi.exchange.gpu_aware import choose_way
    from moempi.exchange.topology import look_around

    topology = look_around(world)
    index = take_gpu(topology)
    way = choose_way(topology, "auto")
    if way.staged:
        raise JobError(f"this MPI does not take the memory of GPUs: {way.reason}; --device cpu measures that of hosts")
    return GpuBuffers(), f"{torch.cuda.get_device_name(index)} {index}"
