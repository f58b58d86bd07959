"""Whether MPI moves bytes between GPUs: tried in child processes, so that a crash is an answer.

    mpirun -n 2 python -m moempi.exchange.gpu_trial

Every rank sends bytes to the next one from GPU memory and checks what it gets. Rank 0 prints the bandwidths.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from typing import TYPE_CHECKING

from moempi import launch
from moempi.exchange import gpu_mpi

if TYPE_CHECKING:
    from mpi4py import MPI

SIZES = (64, 4096, 2**20, 2**25)  # bytes
TIMEOUT = 90.0  # s


def ask(n_ranks: int, mpirun: list[str]) -> tuple[dict[str, float], str]:
    """Run the trial in processes of its own.

    Args:
        mpirun: the command that starts ranks, with its options.

    Returns:
        GB/s by bytes, and what went wrong (empty: nothing).
    """
    line = [*mpirun, "-n", str(n_ranks), sys.executable, "-m", "moempi.exchange.gpu_trial"]
    environ = launch.child_environment(gpu_mpi.child_environment(os.environ), os.geteuid() == 0)
    try:
        done = subprocess.run(line, env=environ, capture_output=True, text=True, timeout=TIMEOUT)
    except (OSError, subprocess.TimeoutExpired) as error:
        return {}, f"the trial did not end: {error}"
    answers = [text for text in done.stdout.splitlines() if text.startswith("{")]
    if done.returncode or not answers:
        return {}, f"the trial ended with {done.returncode}: {' '.join((done.stderr or done.stdout).split())[-300:]}"
    return json.loads(answers[-1]), ""


def main() -> None:
    """One rank of the trial."""
    import torch

    prepared = gpu_mpi.prepare(os.environ)
    from mpi4py import MPI

    world = MPI.COMM_WORLD
    node = world.Split_type(MPI.COMM_TYPE_SHARED)
    torch.cuda.set_device(node.rank % torch.cuda.device_count())
    rates = {str(nbytes): _move(world, nbytes) for nbytes in SIZES}
    if world.rank == 0:
        print(prepared, file=sys.stderr)
        print(json.dumps(rates), flush=True)


def _move(world: MPI.Intracomm, nbytes: int) -> float:
    """Send bytes to the next rank and check those of the one before; GB/s."""
    import torch
    from mpi4py import MPI

    def numbers(rank: int) -> torch.Tensor:
        random = torch.Generator("cuda").manual_seed(rank + nbytes)
        return torch.randint(0, 256, (nbytes,), generator=random, dtype=torch.uint8, device="cuda")

    mine, got = numbers(world.rank), torch.zeros(nbytes, dtype=torch.uint8, device="cuda")
    torch.cuda.synchronize()
    after, before = (world.rank + 1) % world.size, (world.rank - 1) % world.size
    best = float("inf")
    for _ in range(3):
        world.Barrier()
        begin = time.perf_counter()
        requests = [
            world.Irecv([MPI.buffer.fromaddress(got.data_ptr(), nbytes), MPI.BYTE], before),
            world.Isend([MPI.buffer.fromaddress(mine.data_ptr(), nbytes), MPI.BYTE], after),
        ]
        MPI.Request.Waitall(requests)
        best = min(best, time.perf_counter() - begin)
    if not torch.equal(got, numbers(before)):
        raise SystemExit(f"{nbytes} bytes from rank {before} arrived damaged")
    return nbytes / best / 1e9


if __name__ == "__main__":
    main()
