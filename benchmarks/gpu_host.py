"""The host's part of decode on GPUs, measured without one: kernels and copies that take no time and do nothing.

    python -m moempi.launch -n 2 -- python benchmarks/gpu_host.py --out FILE        # a minute
    python -m moempi.launch -n 2 -- python benchmarks/gpu_host.py --profile 30      # where it goes, by cProfile

Everything else is what `moempi run` does on GPUs: engine, messages (of few bytes, by shared memory), plans, recordings,
which are replayed by doing nothing. What is left of a layer and step is Python's and MPI's: about what decode takes on
GPUs beside its kernels, on a host like this one. On several ranks some of it is looking for what another one has not
sent yet, which is told apart. Launches of the driver are not in it (a graph some 10 us), nor is what a GPU's messages
take longer.
"""

from __future__ import annotations

import argparse
import cProfile
import json
import pstats
import sys
import tempfile
import time
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np

sys.path.insert(0, str(Path(__file__).parents[1] / "tests" / "gpu" / "programs"))
import emulated_gpu as emulated

from moempi import mpi
from moempi.cli.measuring import start_mpi
from moempi.files.schema import environment

LAYERS, EXPERTS, TOP_K, SEQUENCES = 24, 64, 8, 128  # sequences of a rank
PROMPT, FEW, MANY = 16, 12, 212  # tokens of a prompt, new ones of two jobs: both record, the longer one replays more
CONFIG = {
    "model_type": "qwen3_moe", "hidden_size": 16, "num_hidden_layers": LAYERS, "num_attention_heads": 8,
    "num_key_value_heads": 1, "head_dim": 16, "vocab_size": 64, "intermediate_size": 16, "moe_intermediate_size": 16,
    "num_experts": EXPERTS, "num_experts_per_tok": TOP_K, "mlp_only_layers": [], "norm_topk_prob": True,
    "tie_word_embeddings": True, "rope_theta": 1e6, "rms_norm_eps": 1e-6, "max_position_embeddings": 256,
    "eos_token_id": 0,
}  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--profile", type=int, metavar="LINES", help="print so many lines of a profile of rank 0")
    given = parser.parse_args()
    world = start_mpi("cpu")
    emulated.install(late=False)
    do_nothing()
    made = tempfile.TemporaryDirectory(prefix="moempi-bench-") if world.rank == 0 else None
    folder = Path(world.bcast(made.name if made else "", root=0))
    if world.rank == 0:
        write(folder, world.size)
    mpi.meet(world)
    seconds = measure(world, folder, given.rounds, given.profile)
    if world.rank == 0:
        results = told(world.size, seconds)
        print(json.dumps(results), flush=True)
        if given.out:
            given.out.write_text(json.dumps(results, indent=1) + "\n")
    mpi.meet(world)
    if made:
        made.cleanup()


def do_nothing() -> None:
    """No kernel computes, but routes are even, tokens are tokens, and what the host reads is there."""
    import torch

    from moempi.device import cuda_attention, cuda_products

    for name in emulated.KERNELS:
        emulated.KERNELS[name] = lambda *_: None
    counts = np.random.default_rng(1)

    def sort_pairs(blocks: int, kinds: Any, *values: int) -> None:
        pairs = int((emulated.at(values[1], (values[7] // values[8],), torch.int64) >= 0).sum()) * values[8]
        of_cover = counts.multinomial(pairs, [1 / blocks] * blocks)
        emulated.at(values[6], (blocks,), torch.int64).copy_(torch.from_numpy(of_cover))

    def greedy(blocks: int, kinds: Any, logits: int, tokens: int, copy: int, logprobs: int, v: int) -> None:
        for address in filter(None, (tokens, copy)):
            emulated.at(address, (blocks,), torch.int64).fill_(5)
        emulated.at(logprobs, (blocks,), torch.float32).fill_(-1.0)

    emulated.KERNELS["sort_pairs"], emulated.KERNELS["greedy"] = sort_pairs, greedy
    cuda_products._launch = lambda *_: None
    cuda_attention._compiled = lambda *_: lambda *_: None
    emulated.Replay.replay = lambda _: None  # the counts of the recorded step stay where the host reads them


def write(folder: Path, n_ranks: int) -> None:
    """Model, prompts, and jobs of few new tokens and of many."""
    from whole_job_ranks import write_job

    from moempi.files.init_weights import init_weights

    (folder / "config.json").write_text(json.dumps(CONFIG))
    init_weights(folder / "config.json", folder / "weights.h5", 1, "bfloat16", alike=True)
    prompts = [np.full(PROMPT, 5, dtype=np.int32)] * (SEQUENCES * n_ranks)
    write_job(folder, "few", prompts, FEW)
    write_job(folder, "many", prompts, MANY)


def measure(world: Any, folder: Path, rounds: int, profile: int | None) -> dict[str, list[float]]:
    """Seconds of both jobs by turns, the first not counted; empty but on rank 0. Collective."""
    from moempi.bench.jobs import Phase, run_job
    from moempi.exchange.engine_cuda import CudaEngine

    options = ["run.device=cuda", "run.share_gpus=true", "exchange.gpu_aware=on", "model.mode=fast"]
    seconds: dict[str, list[float]] = {"few": [], "many": [], "few waiting": [], "many waiting": []}
    profiler, loop, waited = cProfile.Profile(), CudaEngine.run, add_up_rests()
    # The first round records; one more, where there is a profile, is what is profiled.
    for number in range(rounds + 1 + (profile is not None)):
        for name in ("few", "many"):
            profiled = number > rounds and name == "many"
            if profiled:
                CudaEngine.run = lambda engine, tasks: profiler.runcall(loop, engine, tasks)  # type: ignore[method-assign]
            waited[0] = 0.0
            outcome = run_job(world, folder, Phase(name, SEQUENCES * world.size, PROMPT, 1), options)
            mpi.meet(world)
            if world.rank == 0 and 0 < number <= rounds:
                seconds[name].append(outcome.seconds)
                seconds[f"{name} waiting"].append(waited[0])
    if profile and world.rank == 0:
        pstats.Stats(profiler).sort_stats("tottime").print_stats(profile)
    return seconds


def add_up_rests() -> list[float]:
    """Seconds [1] that this rank rests from now on, each time up to the last look that finds nothing."""
    from moempi.exchange.engine_cuda import CudaEngine
    from moempi.recorder import Recorder

    total, since = [0.0], [0.0]
    begin, rest, lap = CudaEngine._rest, Recorder.rest, Recorder.lap

    def begun(engine: CudaEngine) -> None:
        since[0] = time.perf_counter()
        begin(engine)

    def rested(recorder: Recorder, *given: int) -> None:
        rest(recorder, *given)
        now = time.perf_counter()
        total[0] += now - since[0]
        since[0] = now

    def lapped(recorder: Recorder, *given: Any, **named: Any) -> None:
        lap(recorder, *given, **named)
        since[0] = time.perf_counter()

    CudaEngine._rest, Recorder.rest, Recorder.lap = begun, rested, lapped  # type: ignore[method-assign]
    return total


def told(n_ranks: int, seconds: dict[str, list[float]]) -> dict[str, Any]:
    """us of rank 0 for a layer of a step of decode, of which it waits for others some; medians of rounds.

    A share of what a step takes between its last layer and the next one's first is in them.
    """
    us = {
        what: median(1e6 * (many - few) / (MANY - FEW) / LAYERS for few, many in zip(*of, strict=True))
        for what, of in (
            ("us_a_layer_and_step", (seconds["few"], seconds["many"])),
            ("us_of_them_waiting", (seconds["few waiting"], seconds["many waiting"])),
        )
    }
    shape = {"ranks": n_ranks, "layers": LAYERS, "experts": EXPERTS, "top_k": TOP_K, "sequences_a_rank": SEQUENCES}
    return {"machine": environment(), **shape, **us, "seconds": seconds}


if __name__ == "__main__":
    sys.exit(mpi.guard(main))
