"""A run with one thing wrong: a job file, what goes wrong, and the rank, microbatch or file of it.

    raises RANK         the rank fails while it computes an expert's rows
    drops MICROBATCH    rank 0 loses its first answer to that microbatch of rank 1
    replaces FILE       the weights are replaced by that file once rank 0 has looked at them
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

    engine_type = {"raises": Raising, "drops": Dropping, "replaces": Engine}[how]
    job = load_job(Path(path))
    if how == "replaces":
        replace_weights(world, number, job.model.weights)
    return run(world, job, drain=mpi.signals, engine_type=engine_type).exit_code


def replace_weights(world, other: str, weights: Path) -> None:
    """Just before the ranks read them; `run` chooses a device between rank 0's look and that."""
    import moempi.run

    choose = moempi.run.choose_device

    def choose_device(*given):
        if world.rank == 0:
            Path(other).replace(weights)
        world.Barrier()
        return choose(*given)

    moempi.run.choose_device = choose_device


sys.exit(mpi.guard(hinder, *sys.argv[1:]))
