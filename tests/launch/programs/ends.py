"""A program of many ranks that ends in the way that its argument names."""

import sys
import threading

from moempi import mpi
from moempi.errors import DataError, FitError, JobError


def before_mpi(how: str) -> None:
    if how == "all before MPI" or (how == "one before MPI" and mpi.launched_rank() == 1):
        raise JobError("no such job")


def end(how: str) -> int:
    before_mpi(how)
    world = mpi.start()
    last = world.Get_rank() == world.Get_size() - 1
    world.Barrier()
    if how == "all":
        raise ValueError("boom")
    if how == "one" and last:
        raise DataError("bad file")
    if how == "thread" and last:
        threading.Thread(target=lambda: 1 // 0).start()
    if how == "exit" and last:
        sys.exit(5)
    if how == "agree":
        mpi.agree(world, None)
        mpi.agree(world, FitError("too big") if world.Get_rank() in (1, 2) else None)
    # Everybody else waits for a message that nobody sends.
    world.recv(source=world.Get_rank())
    return 0


sys.exit(mpi.guard(end, sys.argv[1]))
