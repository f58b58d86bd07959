"""Started under mpirun on an emulated cluster: runs jobs one after the other, and counts what the links carry of each.

    python cluster_jobs.py JOB...     job files that `moempi run` would take; earlier outputs are overwritten

Rank 0 prints a JSON object last: under "jobs", what every job came to, with the bytes that every node's link carried;
"rank_seconds" of processor time all ranks have used.
Starting many ranks on few cores takes longer than a job, and opening connections is no part of one: both happen once.
"""

from __future__ import annotations

import json
import os
import resource
import sys
from pathlib import Path
from typing import Any

from mpi4py import MPI

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests" / "cluster"))
from emulation import Counters, link_counters

from moempi import mpi
from moempi.job import load_job
from moempi.run import run


def main() -> int:
    world = mpi.start()
    world.alltoall([b""] * world.size)
    found = [measure(world, Path(name)) for name in sys.argv[1:]]
    used = resource.getrusage(resource.RUSAGE_SELF)
    seconds = world.allreduce(used.ru_utime + used.ru_stime)
    if world.rank == 0:
        print(json.dumps({"jobs": found, "rank_seconds": seconds}))
    return 0


def measure(world: MPI.Intracomm, path: Path) -> dict[str, Any]:
    """What a job came to, on rank 0. Collective."""
    before = count(world)
    outcome = run(world, load_job(path), overwrite=True).as_dict()
    moved = [new - old for new, old in zip(count(world), before, strict=True)]
    return outcome | {"link_bytes": [one.sent for one in moved], "link_received": [one.received for one in moved]}


def count(world: MPI.Intracomm) -> list[Counters]:
    """What every node's link has carried, in the order of their first ranks; on every rank. Collective."""
    mpi.meet(world)
    counted: list[tuple[str, Counters]] = world.allgather((os.uname().nodename, link_counters(os.getpid())))
    return list(dict(counted).values())


if __name__ == "__main__":
    sys.exit(mpi.guard(main))
