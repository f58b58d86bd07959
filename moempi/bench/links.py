"""What a message takes between every two ranks: `moempi bench links`.

One pair at a time sends a message to and fro while all other ranks sleep, so that what is measured is the link and
neither the load on it nor on the processors. Times are halves of round trips: no clocks have to agree. Behind that, all
ranks compute at once: how long they then take for a second of work says how they share processors.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from itertools import combinations
from statistics import median
from typing import TYPE_CHECKING, Any

import numpy as np

from moempi.bench.fit import ladder, latency_and_bandwidth
from moempi.exchange.topology import look_around
from moempi.files.links import MeasuredLinks
from moempi.mpi import meet

if TYPE_CHECKING:
    from mpi4py import MPI

# Makes a buffer of so many bytes (uint8, flat) that MPI can send: on the host here, on a device elsewhere.
MakeBuffer = Callable[[int], Any]

_COMPUTING = 0.5  # s in which all ranks compute
_PING, _END = 0, 1  # tags: send it back; no more of this size


def host_buffer(n_bytes: int) -> np.ndarray:
    """A message in ordinary memory, every page of it touched."""
    return np.ones(n_bytes, dtype=np.uint8)


def measure_links(
    world: MPI.Intracomm,
    largest: int,
    repeats: int,
    limit: float,
    make_buffer: MakeBuffer = host_buffer,
    device: str = "cpu",
) -> MeasuredLinks | None:
    """Latency and bandwidth of every pair of ranks; None on all ranks but 0. Collective.

    Args:
        largest: bytes of the largest message; sizes rise to it from 1 byte in steps of 4.
        repeats: round trips of every size, of which the median counts; one before them does not.
        limit: seconds after which a pair begins no further round trip of a size (it makes one at least).
        make_buffer: of the memory that is sent.
        device: whose memory that is, on this rank.
    """
    where, sizes = look_around(world).describe(), ladder(largest)
    devices = world.allgather(device)
    comm = world.Dup()
    buffer = make_buffer(largest)
    times: dict[tuple[int, int], list[float]] = {}
    for source, destination in combinations(range(comm.size), 2):
        meet(comm)
        if comm.rank == source:
            times[source, destination] = [_ping(comm, buffer[:size], destination, repeats, limit) for size in sizes]
        elif comm.rank == destination:
            for size in sizes:
                _pong(comm, buffer[:size], source)
    meet(comm)
    gathered = comm.gather((times, _oversubscription()), root=0)
    comm.Free()
    if gathered is None:
        return None
    found = {pair: row for mine, _ in gathered for pair, row in mine.items()}
    return summarize(found, sizes, where, devices, [crowd for _, crowd in gathered])


def summarize(
    times: dict[tuple[int, int], list[float]],
    sizes: list[int],
    where: list[dict[str, int | str]],
    devices: list[str],
    oversubscription: list[float],
) -> MeasuredLinks:
    """The measured times of pairs as a table, with latency and bandwidth. Pure.

    Args:
        times: s by size, of every pair (source, destination).
        where: node and host of every rank.
        devices, oversubscription: of every rank.
    """
    pairs = sorted(times)
    time = np.array([times[pair] for pair in pairs], dtype=np.float64).reshape(len(pairs), len(sizes))  # [P, S]
    size = np.array(sizes, dtype=np.int64)
    found = np.array([latency_and_bandwidth(size, row) for row in time]).reshape(len(pairs), 2)
    ends = np.array(pairs, dtype=np.int32).reshape(len(pairs), 2)
    return MeasuredLinks(
        size=size,
        source=ends[:, 0],
        destination=ends[:, 1],
        time=time,
        latency=found[:, 0],
        bandwidth=found[:, 1],
        node=np.array([rank["node"] for rank in where], dtype=np.int32),
        host=[str(rank["host"]) for rank in where],
        device=devices,
        oversubscription=np.array(oversubscription),
    )


def _oversubscription() -> float:
    """Seconds per second of this rank's processor time; all ranks are to compute meanwhile."""
    begin, used = time.perf_counter(), time.process_time()
    while time.perf_counter() < begin + _COMPUTING:
        pass
    return max(1.0, (time.perf_counter() - begin) / (time.process_time() - used))


def _ping(comm: MPI.Intracomm, message: Any, peer: int, repeats: int, limit: float) -> float:
    """Send a message and wait until it is back; seconds of one way, the median of all but the first."""
    found: list[float] = []
    _round_trip(comm, message, peer)  # connects, and lets both sides get ready for messages of this size
    end = time.perf_counter() + limit
    while len(found) < repeats and (not found or time.perf_counter() < end):
        found.append(_round_trip(comm, message, peer) / 2)
    comm.Send(message[:0], dest=peer, tag=_END)
    return median(found)


def _round_trip(comm: MPI.Intracomm, message: Any, peer: int) -> float:
    begin = time.perf_counter()
    back = comm.Irecv(message, source=peer, tag=_PING)
    comm.Isend(message, dest=peer, tag=_PING).Wait()
    back.Wait()
    return time.perf_counter() - begin


def _pong(comm: MPI.Intracomm, message: Any, peer: int) -> None:
    """Send back every message until the other side says that it was the last."""
    from mpi4py import MPI

    status = MPI.Status()
    while True:
        comm.Irecv(message, source=peer, tag=MPI.ANY_TAG).Wait(status)
        if status.Get_tag() == _END:
            return
        comm.Isend(message, dest=peer, tag=_PING).Wait()
