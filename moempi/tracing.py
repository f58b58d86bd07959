"""A rank's share of the trace: notes taken while it runs, written in parts, merged by rank 0 at the end."""

from __future__ import annotations

import time
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from moempi.exchange.topology import Clock, Topology, align_clocks
from moempi.files.trace import between, make_way, merge_trace
from moempi.files.trace_writer import TraceWriter
from moempi.job import Job
from moempi.model.config import ModelConfig
from moempi.planning.placement import Placement
from moempi.prepare import Shape
from moempi.recorder import PART_BYTES, Recorder


@dataclass(frozen=True)
class TraceOf:
    """What a trace is of, and where it goes.

    Args:
        level: of LEVELS.
        every: s after which what was noted is handed over to be written.
        mode: "exact" or "fast".
        job: JSON text of what is run.
    """

    path: Path
    level: str
    every: float
    config: ModelConfig
    placement: Placement
    mode: str
    job: str


def trace_of(job: Job, shape: Shape) -> TraceOf:
    """The trace of a job."""
    level, every, layout = job.trace.level, job.trace.flush_every, shape.layout
    return TraceOf(job.trace_file, level, every, shape.config, layout.placement, layout.mode, job.to_json())


class Tracer:
    """Holds the recorder of a rank and writes what it collects. A service of the engine.

    Collective to build and to `finish`.

    Args:
        of: level, place and subject of the trace.
        resume, overwrite: what happens to an earlier trace, as of `make_way`.
    """

    def __init__(self, topology: Topology, of: TraceOf, *, resume: bool, overwrite: bool):
        config, world = of.config, topology.world
        self.path, self._every = of.path, of.every
        self.recorder = Recorder(of.level, world.rank, world.size, config.n_layers, config.n_experts, config.top_k)
        self._topology, self._job = topology, of.job
        if world.rank == 0:
            make_way(self.path, of.level, resume=resume, overwrite=overwrite)
        self._clock = align_clocks(world)
        self.start = world.bcast(time.perf_counter_ns(), root=0)
        placement = of.placement
        cut_layers = np.unique(placement.layer[placement.hi - placement.lo < placement.leaves]).tolist()
        self._known = {**self.recorder.describe(), "mode": of.mode, "cut_layers": cut_layers}
        clock = {"start": self.start, "offset": self._clock.offset, "error": self._clock.error}
        self._writer = TraceWriter(self.path, world.rank, {**self._known, "job": of.job, **clock})
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
            self._job,
            sources or {},
            between(self.start, measured_clocks(begin), measured_clocks(end)),
            self._topology.describe(),
            {**self._known, **measured},
            parts,
        )


def measured_clocks(clocks: Iterable[Clock]) -> np.ndarray:
    """Offset, error and time of measurement of every rank: int64 [N, 3]."""
    return np.array([(clock.offset, clock.error, clock.at) for clock in clocks], dtype=np.int64)
