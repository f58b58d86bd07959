"""Where a step of decode goes on several GPUs: a model of eight layers as jobs, and what a rank's host does in turn.

    python -m moempi.launch -n 2 -- python benchmarks/gpu_decode.py --out FILE        # under two minutes on two GPUs

The layers are those of whole_job.py, with 128 prompts for each GPU. After the jobs that are timed one runs with some
methods wrapped; between two of them lies what the first one's name stands for and the wait for the second. Attention's
graph comes behind "answers are back", that of an expert call behind "expert call"; from "graph" to "replayed" is both.
Wrapping costs a microsecond a call. Beside it: how many expert calls there were, how many recordings were made and what
they took.
"""

from __future__ import annotations

import argparse
import functools
import importlib
import itertools
import json
import sys
import tempfile
import time
from collections import defaultdict
from pathlib import Path
from typing import Any

import numpy as np
from whole_job import CONFIG, LONGEST, SHORTEST, SMALL
from whole_job_ranks import write_job

from moempi import mpi
from moempi.cli.measuring import start_mpi

LAYERS, PROMPTS = 8, 128
# By module and class: what is noted when a method is called, and when it has returned.
NOTED = {
    "exchange.engine_cuda.CudaEngine": {
        "counts": ("packed", ""),
        "send": ("send", "sent"),
        "_came": ("frame is here", "arrived"),
        "serve": ("expert call", "launched"),
        "_served": ("computed", ""),
        "_answered": ("answer is here", ""),
    },
    "device.cuda_graphs.Graphs": {"run": ("graph", "replayed")},
    "layer_cuda.CudaForward": {
        "combine_steady": ("end of step", "combined"),
        "on_gpu": ("step to GPU", "step is on GPU"),
    },
    "home.Home": {"accept": ("tokens are here", "accepted"), "next_step": ("next step", "step is made")},
}

Events = list[tuple[int, str]]  # (ns, what)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--folder", type=Path, help="for the model; 5 GB")
    parser.add_argument("--mode", default="fast")
    parser.add_argument("--new-tokens", type=int, default=60)
    parser.add_argument("--set", nargs="*", default=[], metavar="OPTION=VALUE", help="of the jobs")
    parser.add_argument("--small", action="store_true", help="a trial of this script on the CPU, in small")
    given = parser.parse_args()
    world = start_mpi("cpu" if given.small else "cuda")
    made = tempfile.TemporaryDirectory(dir=given.folder, prefix="moempi-bench-") if world.rank == 0 else None
    folder = Path(world.bcast(made.name if made else "", root=0))
    prompts = write(folder, world.size, given.new_tokens, small=given.small) if world.rank == 0 else 0
    prompts = world.bcast(prompts, root=0)
    results = measure(world, folder, prompts, given)
    if world.rank == 0:
        given.out.write_text(json.dumps(results, indent=1) + "\n")
        print("\n".join(lines(results)), flush=True)
    mpi.meet(world)
    if made:
        made.cleanup()


def write(folder: Path, n_ranks: int, new_tokens: int, *, small: bool) -> int:
    """The model, and jobs of prefill alone and with decode; how many prompts they have."""
    from moempi.files.init_weights import init_weights

    config = CONFIG | {"num_hidden_layers": LAYERS} | (SMALL if small else {})
    random, n = np.random.default_rng(1), (4 if small else PROMPTS) * n_ranks
    lengths = random.integers(SHORTEST, LONGEST + 1, n) // (8 if small else 1)
    prompts = [random.integers(1, config["vocab_size"], length).astype(np.int32) for length in lengths]
    (folder / "config.json").write_text(json.dumps(config))
    init_weights(folder / "config.json", folder / "weights.h5", 1, "bfloat16", alike=True)
    write_job(folder, "prefill", prompts, 1)
    write_job(folder, "whole", prompts, new_tokens)
    return n


def measure(world: Any, folder: Path, prompts: int, given: argparse.Namespace) -> dict[str, Any]:
    """Seconds of the jobs, and what happens in a layer; on rank 0. Collective."""
    from moempi.bench.jobs import Phase, run_job, without_trial

    options = [f"run.device={'cpu' if given.small else 'cuda'}"]
    options += [] if given.small else [f"model.mode={given.mode}", "run.prefill_tokens=4096"]
    options += given.set

    def seconds_of(name: str) -> float:
        nonlocal options
        outcome = run_job(world, folder, Phase(name, prompts, 0, 1), options)
        options = without_trial(world, outcome, options)
        mpi.meet(world)
        return outcome.seconds

    # Each once before it counts: kernels are compiled for their shapes.
    seconds = {name: [seconds_of(name) for _ in range(3)][1:] for name in ("prefill", "whole")}
    counted = {} if given.small else counts_of(lambda: seconds_of("whole"))
    events = [] if given.small else watched(lambda: seconds_of("whole"))
    gathered = world.gather((events, counted), root=0)
    if world.rank:
        return {}
    step = (min(seconds["whole"]) - min(seconds["prefill"])) / (given.new_tokens - 1)
    ranks = [intervals(of_rank) for of_rank, _ in gathered]
    counts = [of_rank for _, of_rank in gathered]
    return {"seconds": seconds, "us_a_step_and_layer": 1e6 * step / LAYERS, "counts": counts, "ranks": ranks}


def counts_of(work: Any) -> dict[str, float]:
    """Of this rank, while it worked: expert calls, recordings, and their seconds."""
    from moempi.device.cuda_graphs import Graphs
    from moempi.exchange.arrivals_cuda import CudaExperts

    found: dict[str, float] = dict.fromkeys(("calls", "recordings", "seconds_of_recordings"), 0)
    serve, record = CudaExperts.serve, Graphs._record

    def served(experts: CudaExperts, most_rows: int) -> Any:
        result = serve(experts, most_rows)
        found["calls"] += 1
        return result

    def recorded(graphs: Graphs, work: Any) -> Any:
        begin = time.perf_counter()
        result = record(graphs, work)
        found["recordings"] += 1
        found["seconds_of_recordings"] += time.perf_counter() - begin
        return result

    CudaExperts.serve, Graphs._record = served, recorded  # type: ignore[method-assign]
    work()
    CudaExperts.serve, Graphs._record = serve, record  # type: ignore[method-assign]
    return found


def watched(work: Any) -> Events:
    """What happened on this rank while it worked."""
    from moempi.layer_cuda import CudaForward

    events: Events = []
    for owner, methods in NOTED.items():
        module, _, kind = owner.rpartition(".")
        holder = getattr(importlib.import_module(f"moempi.{module}"), kind)
        for name, words in methods.items():
            setattr(holder, name, noting(getattr(holder, name), *words, events))
    returned = CudaForward.returned

    async def wrapped(*arguments: Any) -> None:
        await returned(*arguments)
        events.append((time.perf_counter_ns(), "answers are back"))

    CudaForward.returned = wrapped  # type: ignore[method-assign]
    work()
    return events


def noting(method: Any, before: str, after: str, events: Events) -> Any:
    """A method that notes when it is called, and when it has returned if there is a word for it."""

    @functools.wraps(method)
    def wrapped(*arguments: Any, **options: Any) -> Any:
        events.append((time.perf_counter_ns(), before))
        result = method(*arguments, **options)
        if after:
            events.append((time.perf_counter_ns(), after))
        return result

    return wrapped


def intervals(events: Events) -> list[dict[str, Any]]:
    """From each kind of event to the next: us and times a layer, the longest first; of the second half. Pure."""
    events = events[len(events) // 2 :]
    layers = sum(what == "answers are back" for _, what in events) or 1
    found: dict[tuple[str, str], list[int]] = defaultdict(list)
    for (begin, first), (end, then) in itertools.pairwise(events):
        found[first, then].append(end - begin)
    told = [
        {"from": first, "to": then, "us_a_layer": sum(ns) / 1e3 / layers, "times_a_layer": len(ns) / layers}
        for (first, then), ns in found.items()
    ]
    return sorted(told, key=lambda one: -float(str(one["us_a_layer"])))


def lines(results: dict[str, Any]) -> list[str]:
    """For people."""
    said = [f"seconds {results['seconds']}", f"{results['us_a_step_and_layer']:.0f} us a layer of a step of decode"]
    for rank, (found, counts) in enumerate(zip(results["ranks"], results["counts"], strict=True)):
        said += [f"rank {rank}: {counts}; us a layer, times a layer", *(
            f"  {one['from']:>17} -> {one['to']:17} {one['us_a_layer']:7.1f} {one['times_a_layer']:6.2f}"
            for one in found[:24]
        )]  # fmt: skip
    return said


if __name__ == "__main__":
    sys.exit(mpi.guard(main))
