"""`moempi bench layer` on emulated GPUs, with a trace.

    python emulated_layers.py FILE TRACE
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import emulated_gpu

from moempi import mpi
from moempi.cli.measuring import start_mpi

STACK = {"layers": 3, "d_model": 16, "hidden": 8, "experts": 5, "top_k": 2, "microbatches": 2}
TOKENS, PASSES = 7, 2


def main() -> None:
    world = start_mpi("cpu")
    emulated_gpu.install(late=False)
    import torch

    from moempi.bench import run_layers
    from moempi.bench.layers_cuda import CudaLayers
    from moempi.bench.stack import Stack
    from moempi.device.cuda import Cuda

    class EmulatedGpu(Cuda):
        def __init__(self) -> None:
            self.device, self.mode = torch.device("cpu"), "exact"

    def make(tokens: int, passes: int) -> CudaLayers:
        return CudaLayers(run_layers.look_around(world), EmulatedGpu(), stack, tokens, passes, staged=False)

    stack = Stack(**STACK, dtype="float32", gpu_aware="on")  # type: ignore[arg-type]
    on_gpu: Any = lambda topology, stack: (make, {"device": "emulated"})  # noqa: E731
    run_layers._on_gpu = on_gpu
    out, trace = map(Path, sys.argv[1:])
    found = run_layers.run_layers(world, stack, (TOKENS,), device="cuda", rounds=2, passes=PASSES, trace=trace)
    if world.rank == 0:
        out.write_text(json.dumps(found))
    mpi.meet(world)


if __name__ == "__main__":
    sys.exit(mpi.guard(main))
