"""Pinned memory of the host, through which rows travel where MPI does not take the memory of GPUs.

The ranks of a node lay theirs side by side in shared memory: a GPU then fetches rows straight out of the memory of
the rank that sent them. MPI's own copy from one process to another is one thread's, some ten times slower than a GPU's.
"""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import torch
from mpi4py import MPI

from moempi.device.cuda_transfer import pin, unpin

_SHARED = Path("/dev/shm")  # where shared memory is taken from, and bounded


class HostMemory:
    """One piece per rank, of the layout of its memory of messages. Collective over the communicator.

    Args:
        nbytes: of this rank's piece.

    Attributes:
        own: address of this rank's piece.
        others: address, in this process, of the piece of every other rank of the node; none where they do not fit.
    """

    def __init__(self, world: MPI.Intracomm, nbytes: int):
        node: Any = world.Split_type(MPI.COMM_TYPE_SHARED, key=world.rank)
        self._window: MPI.Win | None = None
        self._private: torch.Tensor | None = None
        self.others: dict[int, int] = {}
        if _fits(node, nbytes):
            self._window = MPI.Win.Allocate_shared(nbytes, 1, comm=node)
            pieces = [self._window.Shared_query(rank)[0] for rank in range(node.size)]
            for piece in pieces:
                pin(piece.address, piece.nbytes)
            addresses = dict(zip(node.allgather(world.rank), [piece.address for piece in pieces], strict=True))
            self.own = addresses.pop(world.rank)
            self.others = addresses
        else:
            self._private = torch.empty(nbytes, dtype=torch.uint8, pin_memory=True)
            self.own = self._private.data_ptr()
        node.Free()

    def free(self) -> None:
        """Give it back. Collective; no copy may be under way."""
        if self._window is not None:
            for address in (self.own, *self.others.values()):
                unpin(address)
            self._window.Free()


def _fits(node: MPI.Comm, nbytes: int) -> bool:
    """Whether the pieces of all ranks of a node find room in its shared memory; the same answer on all of them."""
    free = shutil.disk_usage(_SHARED).free if _SHARED.is_dir() else 0
    wanted: int = node.allreduce(nbytes, op=MPI.SUM)
    return wanted < node.allreduce(free, op=MPI.MIN)
