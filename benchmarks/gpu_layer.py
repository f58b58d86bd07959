"""Whole layers of a large model as a job: attention of 128 heads of 128, one expert per GPU, every token to all.

    python -m moempi.launch -n 2 -- python benchmarks/gpu_layer.py --out benchmarks/results/gpu_layer.json

Dimension 7168, hidden 2048, bfloat16; prefill of prompts of 1024 tokens, as `moempi run` does it. Two models that
differ in their number of layers alone are run by turns: what a layer takes is the difference of their times by that of
their layers, so that embedding, head, start and end do not count. Beside it the rate of one large product on the same
GPU; what a layer reaches of it is its MFU. Operations: two for every weight that a token meets, and four for every
number of a query and every position that it attends to. Medians of the rounds.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from moempi import mpi
from moempi.cli.measuring import start_mpi

D, HEADS, HEAD_DIM, HIDDEN = 7168, 128, 128, 2048
LAYERS = 1, 5
PROMPTS, LENGTH, STEP = 96, 1024, 8192  # tokens of a microbatch in a step


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--folder", type=Path, help="for the models; 7 GB")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--modes", nargs="*", default=["fast", "exact"])
    parser.add_argument("--small", action="store_true", help="a trial of this script on the CPU, in small")
    given = parser.parse_args()
    world = start_mpi("cpu" if given.small else "cuda")
    made = tempfile.TemporaryDirectory(dir=given.folder, prefix="moempi-bench-") if world.rank == 0 else None
    folder = Path(world.bcast(made.name if made else "", root=0))
    results: dict[str, Any] = {"gpus": world.size}
    for layers in LAYERS:
        write(world, folder / str(layers), layers, small=given.small)
    for mode in ["exact"] if given.small else given.modes:
        results[mode] = measure(world, folder, mode, given.rounds, small=given.small)
        if world.rank == 0:
            given.out.write_text(json.dumps(results, indent=1) + "\n")
            print(mode, json.dumps(results[mode]), flush=True)
    mpi.meet(world)
    if made:
        made.cleanup()


def config_of(layers: int, experts: int, *, small: bool) -> dict[str, Any]:
    """config.json of a model."""
    d, heads, hidden = (64, 4, 32) if small else (D, HEADS, HIDDEN)
    return {
        "model_type": "qwen3_moe", "hidden_size": d, "num_hidden_layers": layers, "num_attention_heads": heads,
        "num_key_value_heads": heads, "head_dim": HEAD_DIM, "vocab_size": 256, "intermediate_size": hidden,
        "moe_intermediate_size": hidden, "num_experts": experts, "num_experts_per_tok": experts, "mlp_only_layers": [],
        "norm_topk_prob": True, "tie_word_embeddings": True, "rope_theta": 1e6, "rms_norm_eps": 1e-6,
        "max_position_embeddings": LENGTH + 1, "eos_token_id": 0,
    }  # fmt: skip


def phase_of(*, small: bool) -> Any:
    """The prompts."""
    from moempi.bench.jobs import Phase  # which loads MPI

    return Phase("prefill", 4 if small else PROMPTS, 32 if small else LENGTH, 1)


def write(world: Any, folder: Path, layers: int, *, small: bool) -> None:
    """Weights, prompts and job of a model. Collective."""
    from moempi.bench.jobs import write_together

    if world.rank == 0:
        folder.mkdir()
    config = config_of(layers, world.size, small=small)
    write_together(world, folder, config, {"prefill": phase_of(small=small)}, "bfloat16")


def measure(world: Any, folder: Path, mode: str, rounds: int, *, small: bool) -> dict[str, Any]:
    """Both models by turns, the first time not counted; empty but on rank 0. Collective."""
    from moempi.bench.jobs import run_job, without_trial

    phase = phase_of(small=small)
    seconds: dict[int, list[float]] = {layers: [] for layers in LAYERS}
    overrides = [f"model.mode={mode}", f"run.prefill_tokens={64 if small else STEP}"]
    overrides.append(f"run.device={'cpu' if small else 'cuda'}")
    for number in range(rounds + 1):
        for layers in LAYERS:
            outcome = run_job(world, folder / str(layers), phase, overrides)
            overrides = without_trial(world, outcome, overrides)
            mpi.meet(world)
            if number and world.rank == 0:  # who alone knows
                seconds[layers].append(outcome.seconds)
    if world.rank:
        return {}
    few, many = LAYERS
    layer = (statistics.median(seconds[many]) - statistics.median(seconds[few])) / (many - few)
    rate = operations(world.size, phase, small=small) / layer / world.size / 1e12
    peak = product_rate(small=small)
    told = {"ms_a_layer": 1e3 * layer, "tflops_of_a_gpu": rate, "tflops_of_a_product": peak, "mfu": rate / peak}
    return {**told, "seconds": seconds, "prompts": phase.prompts, "prompt_tokens": phase.length}


def operations(experts: int, phase: Any, *, small: bool) -> float:
    """Of a layer for all prompts: projections, attention, gate, experts."""
    config = config_of(1, experts, small=small)
    d, width = config["hidden_size"], config["num_attention_heads"] * HEAD_DIM
    weights = 4 * d * width + d * experts + experts * 3 * d * config["moe_intermediate_size"]
    attended = 4 * width * (phase.length + 1) / 2
    return float(phase.prompts * phase.length * (2 * weights + attended))


def product_rate(*, small: bool) -> float:
    """TFLOP/s of a large product in bfloat16 on this rank's device; the median of ten."""
    import torch

    device, n = ("cpu", 256) if small else ("cuda", 8192)
    a, b = (torch.randn(n, n, device=device).bfloat16() for _ in range(2))
    times = []
    for _ in range(13):
        began = time.perf_counter()
        a @ b
        if not small:
            torch.cuda.synchronize()
        times.append(time.perf_counter() - began)
    return 2 * n**3 / statistics.median(times[3:]) / 1e12


if __name__ == "__main__":
    sys.exit(mpi.guard(main))
