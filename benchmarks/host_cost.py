"""Processor time of the engine: per layer and microbatch and per message over 1 to 32 ranks, and of ranks that idle.

    python benchmarks/host_cost.py                             # measure, print, keep the raw figures
    python benchmarks/host_cost.py --doc docs/performance.md   # and put the tables into the page
    python benchmarks/host_cost.py --render benchmarks/results/host_cost.json      # print them again

The model is so small that its arithmetic costs next to nothing: what is left is Python, MPI, and the calls of kernels.
Processor time is counted and not wall time, so that ranks may share cores. Every rank is home to as many sequences.
"""

from __future__ import annotations

import argparse
import json
import os
import tempfile
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
from decode_report import put_into, table
from rounds import Rounds, about, add_options
from tinymoe_decode import HERE, machine, run

from moempi import analysis
from moempi.files.init_weights import init_weights
from moempi.files.inputs import Prompts, write_inputs
from moempi.launch import this_program

RESULTS = HERE / "results" / "host_cost.json"
SEQUENCES, NEW_TOKENS = 4, 48  # of every home
LONG = 6000  # new tokens of the lone sequence: more than 10 s
IDLE_GOAL = 0.1  # of a core, for the idle ranks together

# 32 experts in four MoE layers, top-2, 64 numbers a row.
TINY: dict[str, Any] = {
    "model_type": "qwen3_moe",
    "hidden_size": 64,
    "num_hidden_layers": 4,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "vocab_size": 256,
    "intermediate_size": 64,
    "moe_intermediate_size": 32,
    "num_experts": 32,
    "num_experts_per_tok": 2,
    "norm_topk_prob": True,
    "tie_word_embeddings": True,
    "rope_theta": 1e4,
    "rms_norm_eps": 1e-6,
    "max_position_embeddings": 8192,
    "eos_token_id": 0,
}
# Two experts on the first two of eight ranks, and one sequence, at home on the first: six ranks have nothing to do.
LONE = TINY | {"num_experts": 2, "num_experts_per_tok": 2}


@dataclass(frozen=True)
class Case:
    """What is measured in one launch."""

    load: str  # "homes": sequences everywhere; "lone": one sequence on rank 0
    ranks: int


def main() -> None:
    given = _arguments()
    results = json.loads(given.render.read_text()) if given.render else measure(given)
    print(render(results))
    if given.doc:
        put_into(given.doc, render(results), "host_cost")


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_options(parser, RESULTS, rounds=3)
    parser.add_argument("--ranks", type=int, nargs="+", default=[1, 2, 4, 8, 16, 32])
    return parser.parse_args()


def measure(given: argparse.Namespace) -> dict[str, Any]:
    """All figures, JSON-ready."""
    settings = {"machine": machine(len(os.sched_getaffinity(0))), "sequences": f"{SEQUENCES} a home"}
    del settings["machine"]["date"]
    rounds = Rounds(given.json, settings, given.resume)
    with tempfile.TemporaryDirectory(prefix="moempi-bench-") as name:
        folder = Path(name)
        for load, config in (("homes", TINY), ("lone", LONE)):
            (folder / "config.json").write_text(json.dumps(config))
            init_weights(folder / "config.json", folder / f"{load}-weights.h5", 1, "float32")
        cases = [Case("homes", n) for n in given.ranks] + [Case("lone", 8)]
        rounds.measure(cases, given.runs, lambda case: measure_one(folder, case))
    return rounds.results


def measure_one(folder: Path, case: Case) -> dict[str, Any]:
    """What every rank used of its processor, its steps, and the messages of all."""
    write_job(folder, case)
    found = run(this_program("run", str(folder / "job.toml"), "-n", str(case.ranks), "--overwrite", "--json"))
    trace = analysis.load(folder / "out.trace.h5")
    keep = ("seconds", "wall_seconds", "processor_seconds", "other_cores", "new_tokens", "steps")
    layers = int((trace.load.sum(axis=1) > 0).sum())
    return {**{key: found[key] for key in keep}, "layers": layers, "messages": int(trace.traffic["messages"].sum())}


def write_job(folder: Path, case: Case) -> None:
    """Prompts and job file."""
    lone = case.load == "lone"
    n, new = (1, LONG) if lone else (SEQUENCES * case.ranks, NEW_TOKENS)
    tokens = [np.array([5 + i % 200, 6, 7, 8], dtype=np.int32) for i in range(n)]
    write_inputs(folder / "prompts.h5", Prompts([str(i) for i in range(n)], tokens, None, np.zeros(n, np.int32)), {})
    (folder / "job.toml").write_text(
        f"""
        model.weights = "{case.load}-weights.h5"
        input.file = "prompts.h5"
        output.file = "out.h5"
        generate = {{ max_new_tokens = {new}, stop_at_eos = false }}
        run = {{ capacity = {SEQUENCES}, threads = 1, microbatches = 1 }}
        admission.policy = "{"rank0" if lone else "balanced"}"
        placement.replicas = 0
        trace = {{ file = "out.trace.h5", level = "summary" }}
        """
    )


# ---------------------------------------------------------------- what is told


def render(results: dict[str, Any]) -> str:
    """Everything that docs/performance.md shows of a measurement."""
    runs = results["runs"]
    homes = {n: [one for one in runs if (one["load"], one["ranks"]) == ("homes", n)] for n in counts(runs)}
    head = ["ranks", "messages per layer and microbatch", "processor us per layer and microbatch", "us per message"]
    rows = [[str(n), *line(some, homes.get(1, []))] for n, some in homes.items()]
    return f"{about(results)}\n\n{table(head, rows)}\n\n{NOTE}\n\n{idle([r for r in runs if r['load'] == 'lone'])}"


NOTE = (
    "A message is a dispatch or an answer; us per message: what a layer and microbatch costs more than on one rank, "
    "where there are none, divided by its messages, with both of their ends and with the looks that found nothing."
)


def counts(runs: list[dict[str, Any]]) -> list[int]:
    """Ranks that were measured, ascending."""
    return sorted({one["ranks"] for one in runs if one["load"] == "homes"})


def line(runs: list[dict[str, Any]], alone: list[dict[str, Any]]) -> list[str]:
    """The figures of one number of ranks."""
    messages, cost = median(map(messages_per_step, runs)), median(map(cost_per_step, runs))
    more = (cost - median(map(cost_per_step, alone))) / messages if alone and messages else None
    return [f"{messages:.1f}", f"{1e6 * cost:.0f}", "" if more is None else f"{1e6 * more:.0f}"]


def messages_per_step(one: dict[str, Any]) -> float:
    """Messages per layer and microbatch."""
    return float(one["messages"] / (sum(one["steps"]) * one["layers"]))


def cost_per_step(one: dict[str, Any]) -> float:
    """Processor seconds per layer and microbatch, of all ranks."""
    return float(sum(one["processor_seconds"]) / (sum(one["steps"]) * one["layers"]))


def idle(runs: list[dict[str, Any]]) -> str:
    """What ranks without work use."""
    if not runs:
        return ""
    shares = [[used / one["seconds"] for used in one["processor_seconds"]] for one in runs]
    six = [sum(some[2:]) for some in shares]
    return (
        f"Idle ranks: eight ranks, one sequence at home on rank 0, experts on ranks 0 and 1 only, "
        f"{median(one['seconds'] for one in runs):.1f} s. The six others together use {median(six):.1%} of a core "
        f"({min(six):.1%} to {max(six):.1%}; goal: under {IDLE_GOAL:.0%}); rank 0 {median(s[0] for s in shares):.0%}, "
        f"rank 1 {median(s[1] for s in shares):.0%}."
    )


if __name__ == "__main__":
    main()
