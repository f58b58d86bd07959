"""A run that notes what it holds, four times a second: a job file, a folder for the notes, what it leaks.

    nothing      as it is
    everything   8 KiB with each answer, an open file with every twentieth
"""

import json
import os
import sys
import time
from pathlib import Path

from moempi import mpi

EVERY = 0.25  # s


def soak(path: str, folder: str, leak: str) -> int:
    world = mpi.start()
    from moempi.exchange.arrivals import Arrival
    from moempi.exchange.engine import Engine
    from moempi.job import load_job
    from moempi.run import run
    from moempi.service import Service

    path_of_notes = Path(folder, f"rank-{world.rank}.jsonl")
    leaked: list[object] = []

    class Noting(Engine):
        due, fewest, answers = 0.0, sys.maxsize, 0

        def turn(self) -> None:
            super().turn()
            self.fewest = min(self.fewest, len(self.requests))
            now = time.monotonic()
            if now >= self.due:
                self.note(now)
                self.due, self.fewest = now + EVERY, sys.maxsize

        def note(self, now: float) -> None:
            pages = int(Path("/proc/self/statm").read_text().split()[1])
            seen = {"time": now, "memory": pages * os.sysconf("SC_PAGE_SIZE"), "requests": self.fewest}
            seen["files"] = len([*Path("/proc/self/fd").iterdir()])
            routers = [one._router for one in self.services if isinstance(one, Service)]
            seen["finished"] = routers[0].finished if routers and routers[0] else -1
            notes.write(json.dumps(seen) + "\n")

        def answer(self, arrival: Arrival) -> None:
            super().answer(arrival)
            self.answers += 1
            if leak == "everything":
                leaked.append(bytearray(os.urandom(8192)))
            if leak == "everything" and self.answers % 20 == 0:
                leaked.append(os.open(os.devnull, os.O_RDONLY))

    with path_of_notes.open("w") as notes:
        return run(world, load_job(Path(path)), drain=mpi.signals, overwrite=True, engine_type=Noting).exit_code


sys.exit(mpi.guard(soak, *sys.argv[1:]))
