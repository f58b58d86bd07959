"""A rank that works until it is asked to drain; its argument says how it takes that: willing, deaf or failing."""

import os
import sys
import time

from moempi import mpi
from moempi.errors import DataError

mpi.signals.install()


def work(how: str) -> int:
    world = mpi.start()
    print(f"ready {os.getpid()};", flush=True)
    # Time enough for every test; a rank that nobody ends does not stay for ever.
    end = time.monotonic() + 60
    while time.monotonic() < end and (how == "deaf" or not mpi.signals.requested):
        time.sleep(0.01)
    if how == "failing":
        raise DataError("disk full")
    print("drained", flush=True)
    world.Barrier()
    return mpi.signals.exit_code


sys.exit(mpi.guard(work, sys.argv[1]))
