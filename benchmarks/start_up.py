"""From the start of a process to the first token, beside `transformers`; imports; and weights read with a cold cache.

    python benchmarks/start_up.py                              # measure, print, keep the raw figures
    python benchmarks/start_up.py --doc docs/performance.md    # and put the tables into the page
    python benchmarks/start_up.py --render benchmarks/results/start_up.json        # print them again

First token: one prompt of 16 tokens, one new token, the whole command from start to end. Cold: the kernel is told to
forget the file (posix_fadvise), then all bytes are read once plainly and once as the tensors of a rank.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
from decode_report import put_into, table
from tinymoe_decode import HERE, INPUTS, machine, run, say

from moempi.files.export_weights import export_checkpoint
from moempi.files.init_weights import init_weights
from moempi.files.inputs import Prompts, write_inputs
from moempi.launch import this_program

RESULTS = HERE / "results" / "start_up.json"
HOW = ("plain", "tensors")
GOALS = {"first": 1.5, "cold": 0.8}
IMPORTS = {"torch": "import torch", "transformers": "from transformers import Qwen3MoeForCausalLM"}
IMPORTS |= {"moempi": "import moempi.mpi; moempi.mpi.start(); import moempi.run"}


def main() -> None:
    given = _arguments()
    if given.render:
        results = json.loads(given.render.read_text())
    else:
        os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[: given.cores])
        with tempfile.TemporaryDirectory(prefix="moempi-bench-", dir=given.folder) as name:
            results = {"machine": machine(given.cores), **measure(Path(name), given)}
        given.json.parent.mkdir(parents=True, exist_ok=True)
        given.json.write_text(json.dumps(results, indent=1) + "\n")
    print(render(results))
    if given.doc:
        put_into(given.doc, render(results), "start_up")


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=int, default=5)
    parser.add_argument("--cores", type=int, default=2, help="of this machine that everything runs on")
    parser.add_argument("--folder", type=Path, help="on the disk that is read from; not one that lies in memory")
    parser.add_argument("--json", type=Path, default=RESULTS, help="where the raw figures go")
    parser.add_argument("--doc", type=Path, help="a page whose tables are replaced")
    parser.add_argument("--render", type=Path, help="measure nothing, show these raw figures")
    return parser.parse_args()


def measure(folder: Path, given: argparse.Namespace) -> dict[str, Any]:
    """All figures, JSON-ready; every kind of measurement takes its turn in every round."""
    big = folder / "441m.h5"
    init_weights(HERE / "model-441m.json", big, 1, "bfloat16")
    models = {"tinymoe": INPUTS / "tinymoe.h5", "441 M": big}
    prompt = Prompts(["p"], [np.arange(5, 21, dtype=np.int32)], None, np.zeros(1, np.int32))
    write_inputs(folder / "prompts.h5", prompt, {})
    for name, weights in models.items():
        export_checkpoint(weights, folder / f"checkpoint {name}")
    results: dict[str, Any] = {"imports": [], "first": [], "cold": []}
    for r in range(given.runs):
        say(f"round {r + 1} of {given.runs}")
        for what, code in IMPORTS.items():
            results["imports"].append({"what": what, "seconds": seconds_of([sys.executable, "-c", code])})
        for name, weights in models.items():
            for system, line in first_lines(folder, name, weights, given.cores).items():
                results["first"].append({"model": name, "system": system, "seconds": run(line)["wall_seconds"]})
        for how in HOW:
            results["cold"].append({"how": how, **run([sys.executable, str(HERE / "cold_read.py"), str(big), how])})
    return results


def seconds_of(line: list[str]) -> float:
    """Wall time of a command."""
    begin = time.perf_counter()
    subprocess.run(line, check=True, capture_output=True)
    return time.perf_counter() - begin


def first_lines(folder: Path, name: str, weights: Path, cores: int) -> dict[str, list[str]]:
    """The commands that end with the first token."""
    job = folder / f"{name}.toml"
    job.write_text(
        f"""
        model.weights = "{weights}"
        input.file = "prompts.h5"
        output.file = "{name}-out.h5"
        generate.max_new_tokens = 1
        """
    )
    program, checkpoint = str(HERE / "transformers_decode.py"), str(folder / f"checkpoint {name}")
    peer = [sys.executable, program, checkpoint, str(folder / "prompts.h5"), "--dtype=bfloat16", "--experts=grouped_mm"]
    lines = {"transformers": [*peer, "--new-tokens=1", f"--threads={cores}", "--warm-up=0"]}
    for n in (1, 2):
        lines[f"moempi, {n} rank{'s' * (n > 1)}"] = this_program("run", str(job), "-n", str(n), "--overwrite", "--json")
    return lines


# ---------------------------------------------------------------- what is told


def render(results: dict[str, Any]) -> str:
    """Everything that docs/performance.md shows of a measurement."""
    m = results["machine"]
    n = len(results["imports"]) // len(IMPORTS)
    head = f"Medians of {n} rounds; {m['cpu']}, {m['cores_used']} cores, torch {m['torch']}, {m['date']}."
    return "\n\n".join([head, first(results["first"]), imports(results["imports"]), cold(results["cold"])])


def first(runs: list[dict[str, Any]]) -> str:
    """Seconds to the first token."""
    rows = []
    for model in dict.fromkeys(one["model"] for one in runs):
        of = {
            system: median(one["seconds"] for one in runs if (one["model"], one["system"]) == (model, system))
            for system in dict.fromkeys(one["system"] for one in runs)
        }
        peer = of["transformers"]
        rows.append([model, *(f"{s:.1f}" + f" ({s / peer:.2f} x)" * (k != "transformers") for k, s in of.items())])
    systems = list(dict.fromkeys(one["system"] for one in runs))
    return table([f"s to the first token (goal {GOALS['first']} x)", *systems], rows)


def imports(runs: list[dict[str, Any]]) -> str:
    """What importing takes."""
    of = {what: median(one["seconds"] for one in runs if one["what"] == what) for what in IMPORTS}
    return "Importing alone: " + ", ".join(f"{what} {seconds:.1f} s" for what, seconds in of.items()) + "."


def cold(runs: list[dict[str, Any]]) -> str:
    """Bytes per second from the disk."""
    rates = {
        how: median(one["bytes"] / one["seconds"] for one in runs if one["how"] == how) for how in ("plain", "tensors")
    }
    share, size = rates["tensors"] / rates["plain"], runs[0]["bytes"]
    return (
        f"Weights of {size / 1e6:.0f} MB with a cold cache: plainly {rates['plain'] / 1e9:.2f} GB/s, as tensors "
        f"{rates['tensors'] / 1e9:.2f} GB/s, {share:.0%} of it (goal {GOALS['cold']:.0%})."
    )


if __name__ == "__main__":
    main()
