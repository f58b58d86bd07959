"""Who runs where: the ranks of a job, and the nodes that they share."""

from __future__ import annotations

import os
import platform
import time
from dataclasses import dataclass
from pathlib import Path

from mpi4py import MPI

from moempi.exchange.nodes import Nodes, numbered
from moempi.threads import fair_share, share_of_cores

ROUND_TRIPS = 20  # of which the shortest bounds the error of a clock


@dataclass(frozen=True)
class Topology:
    """The ranks of a job and their nodes. A node is what shares memory, as MPI sees it, or what the job pretends."""

    world: MPI.Intracomm
    nodes: Nodes
    hosts: tuple[str, ...]  # host name of every rank
    threads: int  # this rank's share of the cores of its node
    cores: float  # the same before it is rounded: under 1 where ranks share a core
    place_on_node: tuple[int, int] = (0, 1)  # rank inside the node, and ranks of the node

    def describe(self) -> list[dict[str, int | str]]:
        """Node and host of every rank."""
        return [{"node": node, "host": host} for node, host in zip(self.nodes.of, self.hosts, strict=True)]


def look_around(world: MPI.Intracomm) -> Topology:
    """Find the nodes of a communicator. Collective."""
    node = world.Split_type(MPI.COMM_TYPE_SHARED, key=world.rank)
    first = node.bcast(world.rank, root=0)
    allowed = node.allgather(os.sched_getaffinity(0))
    threads, cores = fair_share(allowed, node.rank), share_of_cores(allowed, node.rank)
    place = node.rank, node.size
    node.Free()
    hosts = tuple(world.allgather(platform.node()))
    return Topology(world, numbered(world.allgather(first)), hosts, threads, cores, place)


@dataclass(frozen=True)
class Clock:
    """How this rank's `time.perf_counter_ns` stands to rank 0's: `offset` = this - rank 0's, in ns, +- `error`."""

    offset: int
    error: int
    at: int  # when it was measured, on this rank's clock


def align_clocks(world: MPI.Intracomm) -> Clock:
    """Measure this rank's clock against rank 0's. Collective; ranks take turns.

    Ranks that run under the same kernel read the same clock: offset and error are 0. Others exchange
    messages with rank 0; half the shortest round trip bounds the error (Cristian, 1989). Measured again at the
    end of a job it also shows how far the clocks have drifted.
    """
    kernels = world.allgather(_kernel())
    clock = Clock(0, 0, time.perf_counter_ns())
    for rank in range(1, world.size):
        if kernels[rank] == kernels[0]:
            continue
        if world.rank == 0:
            _serve_time(world, rank)
        elif world.rank == rank:
            clock = _ask_time(world)
    return clock


def _kernel() -> tuple[str, str]:
    """Boot id and time namespace: processes that have both in common share the monotonic clock."""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        return boot, str(Path("/proc/self/ns/time").readlink())
    except OSError:
        return platform.node(), str(os.getpid())


def _serve_time(world: MPI.Intracomm, rank: int) -> None:
    for _ in range(ROUND_TRIPS):
        world.recv(source=rank)
        world.send(time.perf_counter_ns(), dest=rank)


def _ask_time(world: MPI.Intracomm) -> Clock:
    best = Clock(0, 2**62, 0)
    for _ in range(ROUND_TRIPS):
        begin = time.perf_counter_ns()
        world.send(None, dest=0)
        theirs = world.recv(source=0)
        end = time.perf_counter_ns()
        if end - begin < 2 * best.error:
            best = Clock((begin + end) // 2 - theirs, -(-(end - begin) // 2), end)
    return best
