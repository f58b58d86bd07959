"""What the trace costs: decode of a model of 441 M parameters at each level of the trace, beside the same without one.

    python benchmarks/trace_cost.py                             # measure, print, keep the raw figures
    python benchmarks/trace_cost.py --resume                    # go on with a measurement that was interrupted
    python benchmarks/trace_cost.py --doc docs/performance.md   # and put the table into the page
    python benchmarks/trace_cost.py --render benchmarks/results/trace_cost.json     # print it again

A pair is two runs one after the other, with a level and off; every other pair begins with the other one. What is told
is the median over the pairs of (seconds with the level) / (seconds without) - 1.
"""

from __future__ import annotations

import argparse
import json
import os
import tempfile
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
from decode_report import QUIET, put_into, table
from tinymoe_decode import HERE, machine, run, say

from moempi.files.init_weights import init_weights
from moempi.files.inputs import Prompts, write_inputs
from moempi.launch import this_program
from moempi.recorder import LEVELS

RESULTS = HERE / "results" / "trace_cost.json"
NAME = "trace_cost"
KEEP = ("seconds", "wall_seconds", "other_cores", "new_tokens", "steps")
SETTINGS = ("model", "dtype", "ranks", "prompts", "prompt_tokens", "new_tokens", "cores")
GOALS = {"summary": 0.03, "full": 0.05, "routes": 0.08}

Pair = dict[str, Any]


def main() -> None:
    given = _arguments()
    if given.render:
        results = json.loads(given.render.read_text())
    else:
        os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[: given.cores])
        results = begin(given)
        with tempfile.TemporaryDirectory(prefix="moempi-bench-") as folder:
            write_files(Path(folder), results)
            measure(Path(folder), results, given.levels, given.pairs, given.json)
    print(render(results))
    if given.doc:
        put_into(given.doc, render(results), NAME)


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pairs", type=int, default=9, help="of runs, for every level")
    parser.add_argument("--levels", nargs="+", default=list(LEVELS[1:]), choices=LEVELS[1:])
    parser.add_argument("--model", type=Path, default=HERE / "model-441m.json", help="config.json of random weights")
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--prompts", type=int, default=32)
    parser.add_argument("--prompt-tokens", type=int, default=4, help="of each prompt: few, so that decode is measured")
    parser.add_argument("--new-tokens", type=int, default=64)
    parser.add_argument("--cores", type=int, default=2, help="of this machine that everything runs on")
    parser.add_argument("--json", type=Path, default=RESULTS, help="where the raw figures go")
    parser.add_argument("--resume", action="store_true", help="keep the pairs that are in the raw figures already")
    parser.add_argument("--doc", type=Path, help="a page whose table is replaced")
    parser.add_argument("--render", type=Path, help="measure nothing, show these raw figures")
    return parser.parse_args()


def begin(given: argparse.Namespace) -> dict[str, Any]:
    """Results without figures, or with those of a measurement that is gone on with."""
    settings = {name: getattr(given, name) for name in SETTINGS} | {"model": given.model.name}
    results = {"machine": machine(given.cores), **settings, "config": json.loads(given.model.read_text()), "pairs": []}
    if given.resume and given.json.exists():
        before = json.loads(given.json.read_text())
        for name in (*SETTINGS, "config"):
            if before[name] != results[name]:
                raise SystemExit(f"{given.json}: measured with {name} = {before[name]}, not {results[name]}")
        results["pairs"] = before["pairs"]
    return results


def write_files(folder: Path, results: dict[str, Any]) -> None:
    """Random weights, and prompts of random tokens."""
    (folder / "config.json").write_text(json.dumps(results["config"]))
    init_weights(folder / "config.json", folder / "weights.h5", seed=1, dtype=results["dtype"])
    n, random = results["prompts"], np.random.default_rng(1)
    vocabulary = results["config"]["vocab_size"]
    tokens = [random.integers(1, vocabulary, results["prompt_tokens"], dtype=np.int32) for _ in range(n)]
    write_inputs(folder / "prompts.h5", Prompts([str(i) for i in range(n)], tokens, None, np.zeros(n, np.int32)), {})


def measure(folder: Path, results: dict[str, Any], levels: list[str], pairs: int, raw: Path) -> None:
    """Add the pairs that are missing, and keep the raw figures after each."""
    done = {(pair["level"], pair["number"]) for pair in results["pairs"]}
    for number in range(pairs):
        for level in levels:
            if (level, number) in done:
                continue
            pair = measure_pair(folder, results, level, number)
            results["pairs"].append(pair)
            say(f"pair {number + 1} of {pairs}, {level}: {cost(pair):+.1%}")
            raw.parent.mkdir(parents=True, exist_ok=True)
            raw.write_text(json.dumps(results, indent=1) + "\n")


def measure_pair(folder: Path, results: dict[str, Any], level: str, number: int) -> Pair:
    """One run with a level and one without, the first of them by turns."""
    pair: Pair = {"level": level, "number": number}
    for one in ("off", level) if number % 2 == 0 else (level, "off"):
        pair["off" if one == "off" else "on"] = run_once(folder, results, one)
    return pair


def run_once(folder: Path, results: dict[str, Any], level: str) -> dict[str, Any]:
    job = folder / "job.toml"
    job.write_text(
        f"""
        [model]
        weights = "weights.h5"
        [input]
        file = "prompts.h5"
        [output]
        file = "out.h5"
        [generate]
        max_new_tokens = {results["new_tokens"]}
        stop_at_eos = false
        [run]
        capacity = {-(-results["prompts"] // results["ranks"])}
        [trace]
        level = "{level}"
        """
    )
    found = run(this_program("run", str(job), "-n", str(results["ranks"]), "--overwrite", "--json"))
    return {name: found[name] for name in KEEP}


# ---------------------------------------------------------------- what is told


def cost(pair: Pair) -> float:
    """What the level of a pair took longer than off, as a share."""
    return float(pair["on"]["seconds"] / pair["off"]["seconds"] - 1)


def render(results: dict[str, Any]) -> str:
    """What docs/performance.md shows of a measurement."""
    pairs, m = results["pairs"], results["machine"]
    runs = [pair[side] for pair in pairs for side in ("off", "on")]
    others = median(one["other_cores"] for one in runs)
    state = "the machine was quiet" if others <= QUIET else "**the machine was shared**"
    off = median(pair["off"]["seconds"] for pair in pairs)
    head = (
        f"{m['date']}, {m['cpu']}, {results['cores']} cores ({m['processor_capability']}), torch {m['torch']}: "
        f"{results['model']}, {results['dtype']}, {results['ranks']} ranks, {results['prompts']} sequences x "
        f"{results['new_tokens']} new tokens ({off:.1f} s without a trace); {state} (other programs used {others:.2f} "
        "cores)."
    )
    rows = [row(level, [pair for pair in pairs if pair["level"] == level]) for level in LEVELS[1:]]
    columns = ["trace.level", "pairs", "costs, median", "least to most", "goal", "with start and end, median"]
    return f"{head}\n\n{table(columns, [one for one in rows if one])}"


def row(level: str, pairs: list[Pair]) -> list[str]:
    """A line of the table; empty where nothing was measured."""
    if not pairs:
        return []
    costs = [cost(pair) for pair in pairs]
    whole = median(pair["on"]["wall_seconds"] / pair["off"]["wall_seconds"] - 1 for pair in pairs)
    spread = f"{min(costs):+.1%} to {max(costs):+.1%}"
    return [level, str(len(pairs)), f"{median(costs):+.1%}", spread, f"{GOALS[level]:.0%}", f"{whole:+.1%}"]


if __name__ == "__main__":
    main()
