"""Whether MPI moves bytes between GPUs: tried in child processes, so that a crash is an answer.

    mpirun -n 2 python -m moempi.exchange.gpu_trial

Every two ranks send each other bytes from GPU memory and check what they get. Rank 0 prints the bandwidths.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from itertools import combinations
from typing import TYPE_CHECKING

from moempi import launch
from moempi.errors import MoempiError
from moempi.exchange import gpu_mpi

if TYPE_CHECKING:
    import torch
    from mpi4py import MPI

SIZES = (64, 4096, 2**20, 2**25)  # bytes
TIMEOUT = 90.0  # s


def ask(n_ranks: int, mpirun: list[str]) -> tuple[dict[str, list[float]], str]:
    """Run the trial in processes of its own.

    Args:
        mpirun: the command that starts ranks, with its options.

    Returns:
        By pair of ranks ("0-1") the GB/s one way of every size of SIZES, both ways at once; and what went wrong
        (empty: nothing).
    """
    line = [*mpirun, "-n", str(n_ranks), sys.executable, "-m", "moempi.exchange.gpu_trial"]
    environ = launch.child_environment(gpu_mpi.child_environment(os.environ), os.geteuid() == 0)
    try:
        with launch.session_folder(mpirun, environ) as child:
            done = subprocess.run(line, env=child, capture_output=True, text=True, timeout=TIMEOUT)
    except (OSError, MoempiError, subprocess.TimeoutExpired) as error:
        return {}, f"the trial did not end: {error}"
    answers = [text for text in done.stdout.splitlines() if text.startswith("{")]
    if done.returncode or not answers:
        return {}, f"the trial ended with {done.returncode}: {' '.join((done.stderr or done.stdout).split())[-300:]}"
    return json.loads(answers[-1]), ""


def start(n_ranks: int) -> tuple[dict[str, list[float]], str]:
    """`ask` with the mpirun that moempi would take."""
    try:
        starter = launch.find_mpirun(None, os.environ)
        options = launch.mpirun_options(launch.version(starter), n_ranks, {})
    except MoempiError as error:
        return {}, str(error)
    return ask(n_ranks, [*starter, *options])


def main() -> None:
    """One rank of the trial."""
    import torch

    prepared = gpu_mpi.prepare(os.environ)
    from mpi4py import MPI

    world = MPI.COMM_WORLD
    node = world.Split_type(MPI.COMM_TYPE_SHARED)
    torch.cuda.set_device(node.rank % torch.cuda.device_count())
    pairs = combinations(range(world.size), 2)
    rates = {f"{a}-{b}": [_move(world, a, b, nbytes) for nbytes in SIZES] for a, b in pairs}
    if world.rank == 0:
        print(prepared, file=sys.stderr)
        print(json.dumps(rates), flush=True)


def _move(world: MPI.Intracomm, low: int, high: int, nbytes: int) -> float:
    """Let two ranks send each other bytes and check them; GB/s, on all ranks. Collective."""
    best = float("inf")
    peer = {low: high, high: low}.get(world.rank)
    if peer is not None:
        mine, got = _numbers(world.rank, nbytes), _numbers(world.rank, nbytes)
        for _ in range(3):
            best = min(best, _swap(world, peer, mine.data_ptr(), got.data_ptr(), nbytes))
        if not got.equal(_numbers(peer, nbytes)):
            raise SystemExit(f"{nbytes} bytes from rank {peer} to rank {world.rank} arrived damaged")
    return nbytes / world.bcast(best, root=low) / 1e9


def _swap(world: MPI.Intracomm, peer: int, mine: int, got: int, nbytes: int) -> float:
    """Send what is at one address and receive at the other; seconds, after both ranks have met."""
    from mpi4py import MPI

    world.sendrecv(None, peer, source=peer)
    begin = time.perf_counter()
    requests = [
        world.Irecv([MPI.buffer.fromaddress(got, nbytes), MPI.BYTE], peer),
        world.Isend([MPI.buffer.fromaddress(mine, nbytes), MPI.BYTE], peer),
    ]
    MPI.Request.Waitall(requests)
    return time.perf_counter() - begin


def _numbers(rank: int, nbytes: int) -> torch.Tensor:
    import torch

    random = torch.Generator("cuda").manual_seed(rank + nbytes)
    numbers = torch.randint(0, 256, (nbytes,), generator=random, dtype=torch.uint8, device="cuda")
    torch.cuda.synchronize()
    return numbers


if __name__ == "__main__":
    main()
