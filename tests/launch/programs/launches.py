"""`moempi run -n` in small: ranks, grace, then the command that each rank runs."""

import sys

from moempi import launch, mpi

ranks, grace, *command = sys.argv[1:]
sys.exit(mpi.guard(launch.launch, command, int(ranks), float(grace)))
