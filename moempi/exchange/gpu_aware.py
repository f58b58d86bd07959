"""Whether MPI gets the memory of GPUs, or pinned memory of the host in its place: the same on all ranks."""

from __future__ import annotations

from dataclasses import dataclass

from moempi import mpi
from moempi.exchange import gpu_mpi, gpu_trial
from moempi.exchange.topology import Topology


@dataclass(frozen=True)
class Way:
    """How rows travel."""

    staged: bool  # through pinned memory of the host
    reason: str

    def __str__(self) -> str:
        return f"{'staged through the host' if self.staged else 'from GPU to GPU'} ({self.reason})"


def choose_way(topology: Topology, option: str) -> Way:
    """`exchange.gpu_aware`, with `auto` tried out. Collective.

    The first rank of every node lets two processes of its own send each other bytes; all ranks take the memory of
    GPUs only if that works on every node. On a site's own MPI a child may not be allowed to start a second job: it
    then ends with an error, and rows are staged. They are as well where this process's MPI was loaded before it could
    be made ready; `on` insists.
    """
    if topology.world.size == 1:
        return Way(False, "one rank sends no messages")
    if option != "auto":
        return Way(option == "off", f"exchange.gpu_aware = {option}")
    mine = gpu_mpi.why_not_ready()
    if not mine and topology.place_on_node[0] == 0:
        mine = gpu_trial.start(2)[1]
    mpi.meet(topology.world)  # sleeping, while the trials run
    reasons = topology.world.allgather(mine)
    failed = [(rank, reason) for rank, reason in enumerate(reasons) if reason]
    if not failed:
        return Way(False, f"a trial on {topology.nodes.n_nodes} node{'s' if topology.nodes.n_nodes > 1 else ''} worked")
    rank, reason = failed[0]
    return Way(True, f"rank {rank} ({topology.hosts[rank]}): {reason}")
