"""Started under mpirun: runs every job of a list, one after the other, on all ranks.

    python run_jobs.py LIST ENGINE     LIST: a JSON file of job files; ENGINE: plain, or poisoned

What the runs came to goes into a file beside LIST, ending in .outcomes.json.

Poisoned, a block of the memory of messages is overwritten the moment that it is given back, and kernels are held up
at random: whoever still reads or writes such a block computes something else.
"""

from __future__ import annotations

import json
import logging
import os
import random
import sys
from pathlib import Path
from typing import Any

import torch

from moempi import mpi
from moempi.exchange import gpu_mpi
from moempi.job import load_job


def engine_type(name: str) -> Any:
    from moempi.exchange.engine import Engine

    if name == "plain":
        return Engine
    from moempi.device.cuda_memory import MessageMemory
    from moempi.exchange.engine_cuda import CudaEngine

    rng, poison = random.Random(1), torch.cuda.Stream()

    class PoisonedMemory(MessageMemory):
        def give(self, block: int) -> None:
            end = self.arena_of(block)._taken[block]
            with torch.cuda.stream(poison):
                self.memory[block:end].fill_(255)
                event = torch.cuda.Event()
                event.record()
            while not event.query():
                pass
            super().give(block)

    class PoisonedEngine(CudaEngine):
        def __init__(self, *args: Any, **kwargs: Any):
            super().__init__(*args, **kwargs)
            self.memory.__class__ = PoisonedMemory

        def turn(self) -> None:
            if rng.random() < 0.2:
                with torch.cuda.stream(rng.choice([self.high, self.low])):
                    torch.cuda._sleep(rng.randrange(200_000))
            super().turn()

    return PoisonedEngine


def look_at_ends() -> None:
    """From now on an engine that ends while kernels of its are at work, in memory that others may get, is an error."""
    from moempi.exchange.engine_cuda import CudaEngine

    run = CudaEngine.run

    def looked_at(engine: CudaEngine, tasks: list[Any]) -> None:
        run(engine, tasks)
        assert engine.high.query(), "kernels are still at work"

    CudaEngine.run = looked_at  # type: ignore[method-assign]


def main() -> None:
    logging.basicConfig(level=logging.INFO)
    jobs = [load_job(Path(name)) for name in json.loads(Path(sys.argv[1]).read_text())]
    if jobs[0].run.device == "cuda":
        gpu_mpi.prepare(os.environ)
    world = mpi.start()
    if jobs[0].run.device == "cuda":
        look_at_ends()
    from moempi.run import run

    outcomes = []
    for job in jobs:
        outcome = run(world, job, engine_type=engine_type(sys.argv[2]))
        outcomes.append(outcome.as_dict())
        if world.rank == 0:
            print(job.output.file.name, outcome.mode, outcome.messages, f"{outcome.seconds:.2f} s", flush=True)
    if jobs[0].run.device == "cuda":
        free, total = torch.cuda.mem_get_info()
        print(f"beside torch's allocator {(total - free - torch.cuda.memory_reserved()) / 2**20:.0f} MiB are used")
    if world.rank == 0:
        Path(sys.argv[1]).with_suffix(".outcomes.json").write_text(json.dumps(outcomes))


if __name__ == "__main__":
    sys.exit(mpi.guard(main))
