"""The run: look at the files, build the ranks, hand out sequences, generate, write what came out."""

from __future__ import annotations

import time
from dataclasses import dataclass
from functools import partial

import torch
from mpi4py import MPI

from moempi.errors import EXIT_DONE
from moempi.exchange.arrivals import Experts
from moempi.exchange.engine import Channels, Engine, Limits
from moempi.exchange.slots import layer_tables
from moempi.exchange.topology import Topology, look_around
from moempi.device.cpu import Cpu
from moempi.files.output_writer import OutputWriter
from moempi.files.weights import Weights, open_weights
from moempi.generate import generate, generate_in_lockstep
from moempi.home import Home
from moempi.job import Job
from moempi.layer import Forward
from moempi.model.cache import KVCache
from moempi.model.expert import Expert, leaf_range
from moempi.model.network import Network
from moempi.mpi import Drain
from moempi.prepare import Found, Shape, assignments, choose_device, look_together, open_output
from moempi.recorder import Recorder
from moempi.report import Outcome, finish
from moempi.router.control import Control
from moempi.router.router import Router
from moempi.router.service import Service
from moempi.tracing import Tracer


def run(
    comm: MPI.Intracomm,
    job: Job,
    *,
    resume: bool = False,
    overwrite: bool = False,
    drain: Drain | None = None,
    engine_type: type[Engine] = Engine,
) -> Outcome:
    """Run a job on the ranks of a communicator. Collective.

    Args:
        drain: set by a signal; the job then commits what it has and ends.
        engine_type: for tests, which watch an engine or hold its messages back.

    Raises:
        MoempiError: on all ranks alike for what is found before the start, on one rank for what fails later.
    """
    with torch.inference_mode():
        topology = look_around(comm)
        shape, found = look_together(comm, job)
        device = choose_device(topology, job, shape)
        writer = open_output(comm, job, found, device, resume=resume, overwrite=overwrite)
        if comm.bcast(writer is not None and writer.complete, root=0):
            return nothing_to_do(writer)
        rank = build(topology, job, shape, device, engine_type)
        service = Service(rank.home, rank.control, route(job, shape, found, writer), drain or Drain(), job)
        seconds = work(rank, service, shape, lockstep=job.exchange.lockstep)
        return finish(...)
