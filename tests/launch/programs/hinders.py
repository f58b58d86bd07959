"""A run with one thing wrong: a job file, then what goes wrong, then the rank (or microbatch) that it happens to.

    raises RANK         the rank fails while it computes an expert's rows
    drops MICROBATCH    rank 0 loses its first answer to that microbatch of rank 1
"""

import sys
import time
from pathlib import Path

from moempi import mpi

mpi.signals.install()


def hinder(path: str, how: str, number: str) -> int:
    world = mpi.start()
    from moempi.exchange.arrivals import Arrival
    from moempi.exchange.engine import Engine
    from moempi.job import load_job
    from moempi.run import run

    class Raising(Engine):
        calls = 0

        def serve(self) -> None:
            super().serve()
            self.calls += 1
            if self.rank == int(number) and self.calls == 20:
                print(f"failing at {time.monotonic()};", flush=True)
                raise ZeroDivisionError("the expert divides by zero")

    class Dropping(Engine):
        lost = False

        def answer(self, arrival: Arrival) -> None:
            if self.rank == 0 and not self.lost and (arrival.source, arrival.microbatch) == (1, int(number)):
                self.lost = True
                print(f"dropped layer {arrival.layer} at {time.monotonic()};", flush=True)
                return
            super().answer(arrival)

    engine_type = {"raises": Raising, "drops": Dropping}[how]
    return run(world, load_job(Path(path)), drain=mpi.signals, engine_type=engine_type).exit_code


sys.exit(mpi.guard(hinder, *sys.argv[1:]))
