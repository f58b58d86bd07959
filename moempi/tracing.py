"""A rank's share of the trace: notes taken while it runs, written in parts, merged by rank 0 at the end."""

from __future__ import annotations

import time
from collections.abc import Iterable

import numpy as np

from moempi.exchange.topology import Clock, Topology, align_clocks
from moempi.files.trace import between, make_way, merge_trace
from moempi.files.trace_writer import TraceWriter
from moempi.job import Job
from moempi.prepare import Shape
from moempi.recorder import PART_BYTES, Recorder


class Tracer:
    """Holds the recorder of a rank and writes what it collects. A service of the engine.

    Collective to build and to `finish`.

    Args:
        resume, overwrite: what happens to an earlier trace, as of `make_way`.
    """

    def __init__(self, topology: Topology, job: Job, shape: Shape, *, resume: bool, overwrite: bool):
        config, world = shape.config, topology.world
        self.path, self._every = job.trace_file, job.trace.flush_every
        self.recorder = Recorder(
            job.trace.level, world.rank, world.size, config.n_layers, config.n_experts, config.top_k
        )
        self._topology, self._job = topology, job
        if world.rank == 0:
            make_way(self.path, job.trace.level, resume=resume, overwrite=overwrite)
        self._clock = align_clocks(world)
        self.start = world.bcast(time.perf_counter_ns(), root=0)
        placement = shape.layout.placement
        cut_layers = np.unique(placement.layer[placement.hi - placement.lo < placement.leaves]).tolist()
        self._known = {**self.recorder.describe(), "mode": shape.layout.mode, "cut_layers": cut_layers}
        clock = {"start": self.start, "offset": self._clock.offset, "error": self._clock.error}
        self._writer = TraceWriter(self.path, world.rank, {**self._known, "job": job.to_json(), **clock})
        self._next = time.monotonic() + self._every

    def __call__(self) -> bool:
        """Have a part written if there is much to write, or if it is time; waits where the disk is two parts behind."""
        if self.recorder.size() < PART_BYTES and time.monotonic() < self._next:
            return False
        self._next = time.monotonic() + self._every
        self._writer.put(self.recorder.take())
        return True

    def finish(self, sources: dict[str, str] | None, measured: dict[str, object]) -> None:
        """Write the last part, then merge all ranks' parts on rank 0. Collective.

        Args:
            sources: {name: SHA-256} of what the job read; on rank 0.
            measured: what else is known of the run; on rank 0.
        """
        self._writer.put(self.recorder.take())
        world = self._topology.world
        clocks = (self._clock, align_clocks(world))
        ranks = world.gather((self._writer.close(), *clocks), root=0)
        if ranks is None or self.recorder.level == "off":
            return
        parts, begin, end = zip(*ranks, strict=True)
        merge_trace(
            self.path,
            self._job.to_json(),
            sources or {},
            between(self.start, measured_clocks(begin), measured_clocks(end)),
            self._topology.describe(),
            {**self._known, **measured},
            parts,
        )


def measured_clocks(clocks: Iterable[Clock]) -> np.ndarray:
    """Offset, error and time of measurement of every rank: int64 [N, 3]."""
    return np.array([(clock.offset, clock.error, clock.at) for clock in clocks], dtype=np.int64)
