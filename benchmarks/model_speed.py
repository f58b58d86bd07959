"""Prefill and decode of a larger model with random weights, each by itself, beside `transformers` in the same run.

    python benchmarks/model_speed.py                     # 441 M parameters, 2 ranks on two cores
    python benchmarks/model_speed.py --phases decode --dtypes bfloat16

llama.cpp stands beside them where it is installed: pip install 'xllamacpp>=2026.10' 'gguf>=0.19,<1'.

Prefill: 8 prompts of 256 tokens and one new token each; prompt tokens per second. Decode: 32 prompts of 16 tokens and
33 new tokens each; new tokens per second, the short prefill included. Otherwise as in tinymoe_decode.py.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
from decode_report import put_into, table
from tinymoe_decode import DTYPES, HERE, machine, run, say, this_program

from moempi.files.export_weights import export_checkpoint
from moempi.files.init_weights import init_weights
from moempi.files.inputs import Prompts, write_inputs

RESULTS = HERE / "results" / "model_speed.json"


@dataclass(frozen=True)
class Phase:
    """What is generated, and which tokens count."""

    name: str
    prompts: int
    length: int
    new_tokens: int

    @property
    def tokens(self) -> int:
        """Tokens that a rate is told of."""
        return self.prompts * (self.length if self.new_tokens == 1 else self.new_tokens)


PHASES = {phase.name: phase for phase in (Phase("prefill", 8, 256, 1), Phase("decode", 32, 16, 33))}


def main() -> None:
    given = _arguments()
    if given.render:
        tell(json.loads(given.render.read_text()), given.doc)
        return
    if "moempi" not in given.systems:
        raise SystemExit("--systems: moempi is what the others are compared with")
    os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[: given.cores])
    with tempfile.TemporaryDirectory(prefix="moempi-bench-") as name:
        folder = Path(name)
        write_files(folder, given)
        runs = [
            {"round": r, "phase": phase, "dtype": dtype, "system": system, **found}
            for r in range(given.runs)
            for phase in given.phases
            for dtype in given.dtypes
            for system, found in measure(folder, PHASES[phase], dtype, given)
        ]
    results = {"machine": machine(given.cores), "config": json.loads(given.config.read_text()), "runs": runs}
    given.json.parent.mkdir(parents=True, exist_ok=True)
    given.json.write_text(json.dumps(results, indent=1) + "\n")
    tell(results, given.doc)


def tell(results: dict[str, Any], page: Path | None) -> None:
    """Print the table, and put it into a page."""
    print(report(results))
    if page:
        put_into(page, report(results), "model_speed")


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", type=Path, default=HERE / "model-441m.json", help="config.json of the model")
    parser.add_argument("--runs", type=int, default=3, help="rounds; each measures every system once")
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--cores", type=int, default=2, help="of this machine that everything runs on")
    parser.add_argument("--phases", nargs="+", default=list(PHASES), choices=list(PHASES))
    parser.add_argument("--dtypes", nargs="+", default=list(DTYPES), choices=DTYPES)
    parser.add_argument("--experts", default="grouped_mm", help="implementation of transformers")
    parser.add_argument("--systems", nargs="+", default=present(), choices=list(SYSTEMS))
    parser.add_argument("--json", type=Path, default=RESULTS, help="where the raw figures go")
    parser.add_argument("--doc", type=Path, help="a page whose table is replaced")
    parser.add_argument("--render", type=Path, help="measure nothing, show these raw figures")
    return parser.parse_args()


def present() -> list[str]:
    """The systems that are installed here."""
    llama = all(map(find_spec, ("xllamacpp", "gguf")))
    return [system for system in SYSTEMS if llama or system != "llama.cpp"]


def write_files(folder: Path, given: argparse.Namespace) -> None:
    """Random weights, the same as a checkpoint and for llama.cpp, and prompts."""
    config: Path = given.config
    init_weights(config, folder / "weights.h5", 1, "bfloat16", 1.0, 0.02)
    export_checkpoint(folder / "weights.h5", folder / "checkpoint")
    if "llama.cpp" in given.systems:
        from llama_cpp_decode import gguf_of, write_gguf

        for dtype in given.dtypes:
            write_gguf(folder / "checkpoint", gguf_of(folder / "checkpoint", dtype), dtype)
    random, vocab = np.random.default_rng(1), json.loads(config.read_text())["vocab_size"]
    for phase in PHASES.values():
        tokens = list(random.integers(1, vocab, (phase.prompts, phase.length), dtype=np.int32))
        ids = [str(i) for i in range(phase.prompts)]
        write_inputs(folder / f"{phase.name}.h5", Prompts(ids, tokens, None, np.zeros(phase.prompts, np.int32)), {})


def measure(folder: Path, phase: Phase, dtype: str, given: argparse.Namespace) -> list[tuple[str, dict[str, Any]]]:
    """One run of each system: its seconds, tokens per second and start-up."""
    found = {}
    for system, line_of in SYSTEMS.items():
        if system not in given.systems:
            continue
        one = run(line_of(folder, phase, dtype, given))
        rate = phase.tokens / one["seconds"]
        start = one["wall_seconds"] - one["seconds"] - one.get("warm_up_seconds", 0.0)
        say(f"{phase.name} {dtype} {system}: {rate:.0f} tokens/s, start-up {start:.1f} s")
        keep = {"seconds": one["seconds"], "other_cores": one["other_cores"]}
        found[system] = {"tokens_per_second": rate, "start_seconds": start, **keep}
    return list(found.items())


def transformers(folder: Path, phase: Phase, dtype: str, given: argparse.Namespace) -> list[str]:
    """Its command line."""
    program, model = HERE / "transformers_decode.py", folder / "checkpoint"
    options = {"dtype": dtype, "experts": given.experts, "new-tokens": phase.new_tokens, "threads": given.cores}
    line = [sys.executable, str(program), str(model), str(folder / f"{phase.name}.h5")]
    return line + [f"--{name}={value}" for name, value in options.items()]


def moempi(folder: Path, phase: Phase, dtype: str, given: argparse.Namespace) -> list[str]:
    """Its command line, and the job that it names."""
    job = folder / "job.toml"
    job.write_text(
        f"""
        [model]
        weights = "weights.h5"
        dtype = "{dtype}"
        [input]
        file = "{phase.name}.h5"
        [output]
        file = "out.h5"
        [generate]
        max_new_tokens = {phase.new_tokens}
        stop_at_eos = false
        [run]
        capacity = {-(-phase.prompts // given.ranks)}
        """
    )
    return this_program("run", str(job), "-n", str(given.ranks), "--overwrite", "--json")


def llama_cpp(folder: Path, phase: Phase, dtype: str, given: argparse.Namespace) -> list[str]:
    """Its command line."""
    program, model = HERE / "llama_cpp_decode.py", folder / "checkpoint"
    options = {"dtype": dtype, "new-tokens": phase.new_tokens, "threads": given.cores}
    line = [sys.executable, str(program), str(model), str(folder / f"{phase.name}.h5")]
    return line + [f"--{name}={value}" for name, value in options.items()]


SYSTEMS = {"transformers": transformers, "llama.cpp": llama_cpp, "moempi": moempi}


def report(results: dict[str, Any]) -> str:
    """Markdown: on what, medians with the smallest and largest, and how moempi stands to the others."""
    runs, m = results["runs"], results["machine"]
    systems = list(dict.fromkeys(one["system"] for one in runs))
    others = [system for system in systems if system != "moempi"]
    rows = []
    for phase, dtype in dict.fromkeys((one["phase"], one["dtype"]) for one in runs):
        of = {system: rates_of(runs, phase, dtype, system) for system in systems}
        cells = [f"{median(some):.0f} ({min(some):.0f} to {max(some):.0f})" for some in of.values()]
        ratios = [f"{median(of['moempi']) / median(of[other]):.2f} x" for other in others]
        rows.append([f"{phase}, {dtype}", *cells, *ratios])
    starts = ", ".join(
        f"{system} {median(one['start_seconds'] for one in runs if one['system'] == system):.1f} s"
        for system in systems
    )
    config, rounds = results["config"], 1 + max(one["round"] for one in runs)
    about = (
        f"Medians of {rounds} rounds, {config['num_hidden_layers']} layers of {config['num_experts']} experts; "
        f"{m['cpu']}, {m['cores_used']} cores for each; torch {m['torch']}, transformers {m['transformers']}; "
        f"other programs used {median(one['other_cores'] for one in runs):.2f} cores. Start-up apart: {starts}."
    )
    return f"{about}\n\n{table(['tokens/s', *systems, *(f'moempi to {other}' for other in others)], rows)}"


def rates_of(runs: list[dict[str, Any]], phase: str, dtype: str, system: str) -> list[float]:
    """Tokens per second of all rounds of a case."""
    case = phase, dtype, system
    return [one["tokens_per_second"] for one in runs if (one["phase"], one["dtype"], one["system"]) == case]


if __name__ == "__main__":
    main()
