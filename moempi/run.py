"""The run: look at the files, build the ranks, hand out sequences, generate, write what came out."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import replace
from functools import partial

import torch
from mpi4py import MPI

from moempi.build import Rank, build_rank
from moempi.device.seam import Device
from moempi.errors import EXIT_COMMITTED
from moempi.exchange.engine import Engine
from moempi.exchange.topology import look_around
from moempi.files.completions import Completion
from moempi.files.output_writer import OutputWriter
from moempi.generate import generate, generate_in_lockstep
from moempi.job import Job
from moempi.mpi import Drain, meet
from moempi.prepare import Found, assignments, choose_device, look_together, open_output
from moempi.progress import Progress, Terminal
from moempi.report import Outcome, Took, committed_before, finish, nothing_to_do
from moempi.router.router import Router
from moempi.router.watch import Watch
from moempi.service import Service
from moempi.tracing import Tracer, trace_of

log = logging.getLogger("moempi")


def run(
    comm: MPI.Intracomm,
    job: Job,
    *,
    resume: bool = False,
    overwrite: bool = False,
    verify: bool = False,
    drain: Drain | None = None,
    terminal: Terminal | None = None,
    engine_type: type[Engine] = Engine,
) -> Outcome:
    """Run a job on the ranks of a communicator. Collective.

    Args:
        resume: go on with what an earlier run of the job has committed.
        overwrite: remove what an earlier run has written.
        verify: recompute the digests of the weights first.
        terminal: where rank 0 draws its progress; None: it logs lines.
        drain: set by a signal; the job then commits what it has and ends.
        engine_type: for tests, which watch an engine or hold its messages back.

    Raises:
        MoempiError: on all ranks alike for what is found before the start, on one rank for what fails later.
    """
    drain = drain or Drain()
    with torch.inference_mode():
        topology = look_around(comm)
        shape, found = look_together(comm, job, topology.nodes, verify=verify)
        topology = replace(topology, nodes=shape.layout.nodes)  # those that the job pretends, if it does
        device = choose_device(topology, job, shape)
        writer = open_output(comm, job, found, device, resume=resume, overwrite=overwrite)
        with writer or nullcontext():
            if comm.bcast(writer is not None and writer.complete, root=0):
                return nothing_to_do(job, found)
            tracer = Tracer(topology, trace_of(job, shape), resume=resume, overwrite=overwrite)
            rank = builder(device)(topology, job, shape, device, tracer.recorder, engine_type)
            router = build_router(comm, job, found, writer)
            engine = rank.engine
            tokens = partial(getattr, rank.home, "new_tokens")
            watch = Watch(rank.control, comm.size, job.engine.stall_timeout, engine.now, engine.waits, tokens)
            load = partial(getattr, tracer.recorder, "load")
            progress = Progress(job.progress.every, terminal, committed_before(writer)[0], load)
            service = Service(rank.control, rank.home, router, watch, drain, progress)
            engine.services += [service, tracer]
            log.info("rank %d of %d is ready, threads: %d", comm.rank, comm.size, device.threads)
            took = work(comm, rank, service, lockstep=job.exchange.lockstep)
            log.debug("%d steps, %d expert calls in %.3f s", rank.home.steps, engine.experts.calls, took.seconds)
            code = drain.exit_code if drain.requested else EXIT_COMMITTED
            return finish(comm, job, rank, tracer, router, found, writer, took, code)


def builder(device: Device) -> Callable[..., Rank]:
    """What puts a rank together; what a GPU needs is loaded only where there is one."""
    if device.name == "cpu":
        return build_rank
    from moempi.build_cuda import build_rank as build_cuda_rank

    return build_cuda_rank


def build_router(comm: MPI.Intracomm, job: Job, found: Found | None, writer: OutputWriter | None) -> Router | None:
    """The router on rank 0, None elsewhere."""
    if found is None or writer is None:
        return None

    def keep(completion: Completion) -> None:
        writer.put(completion)

    homes, left = found.shape.layout.homes, assignments(found, writer)
    return Router(left, comm.size, homes, job.run.capacity, keep=keep, commit=writer.commit)


def work(comm: MPI.Intracomm, rank: Rank, service: Service, *, lockstep: bool) -> Took:
    """Generate until the router ends the job. Collective."""
    if lockstep:
        tasks = [generate_in_lockstep(rank.home, rank.forward)]
    else:
        tasks = [generate(rank.home, rank.forward, m) for m in range(rank.home.n_microbatches)]
    meet(comm)
    begin, used = time.perf_counter(), time.process_time()
    service.start()
    rank.engine.run(tasks)
    return Took(time.perf_counter() - begin, time.process_time() - used)
