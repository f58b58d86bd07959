"""What lockstep costs: `exchange.lockstep` beside the message-driven way, under skew. Idle experts and wall time.

    python benchmarks/lockstep.py                                  # on this machine
    sudo python benchmarks/lockstep.py --cluster                   # and on an emulated cluster (Linux, iproute2)
    python benchmarks/lockstep.py --doc docs/performance.md        # and put the tables into the page
    python benchmarks/lockstep.py --runs 1 --ranks 2 --sequences 6    # a first look

Two loads, both of prompts and completions of very different lengths: tinymoe with the skew that its gates have, and
random weights whose gates prefer low experts. Both ways take turns, round after round; they give the same bits.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import sys
import tempfile
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from decode_report import put_into
from loads import LOADS, TINYMOE, write_load
from lockstep_report import render
from rounds import Rounds, add_options
from tinymoe_decode import HERE, machine, run

sys.path.insert(0, str(HERE.parent / "tests" / "cluster"))
from emulation import Cluster, missing

from moempi import analysis
from moempi.files.outputs import read_outputs
from moempi.launch import this_program

RESULTS = HERE / "results" / "lockstep.json"
NODES, PER_NODE = 4, 2  # of the emulated cluster
EXPERT = analysis.STAGES.index("expert")

Start = Callable[[list[str]], list[str]]  # from the arguments of moempi to the command line of a launch


@dataclass(frozen=True)
class Case:
    """What is measured in one launch."""

    where: str
    load: str
    lockstep: bool


def main() -> None:
    given = _arguments()
    results = json.loads(given.render.read_text()) if given.render else measure(given)
    print(render(results))
    if given.doc:
        put_into(given.doc, render(results), "lockstep")


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_options(parser, RESULTS, rounds=5)
    parser.add_argument("--ranks", type=int, nargs="+", default=[2, 8], help="on this machine")
    parser.add_argument("--cluster", action="store_true", help=f"also on {NODES} emulated nodes of {PER_NODE} ranks")
    parser.add_argument("--rate", default="1gbit", help="of the cluster's links, as tc writes it")
    parser.add_argument("--loads", nargs="+", default=["uneven", "zipf"], choices=LOADS)
    parser.add_argument("--sequences", type=int, default=48)
    return parser.parse_args()


def measure(given: argparse.Namespace) -> dict[str, Any]:
    """All figures, JSON-ready."""
    settings = {"machine": machine(len(os.sched_getaffinity(0))), "sequences": given.sequences}
    del settings["machine"]["date"]
    rounds = Rounds(given.json, settings, given.resume)
    with tempfile.TemporaryDirectory(prefix="moempi-bench-") as name, ExitStack() as stack:
        starts = {f"1 node, {n} ranks": on_ranks(n) for n in given.ranks}
        if given.cluster:
            if reason := missing():
                raise SystemExit(reason)
            cluster = stack.enter_context(Cluster(NODES, given.rate))
            starts[f"{NODES} nodes x {PER_NODE} ranks, {given.rate}"] = on_nodes(cluster)
        for load in given.loads:
            write_load(Path(name), load, given.sequences)
        cases = [Case(where, load, way) for where in starts for load in given.loads for way in (False, True)]
        rounds.measure(cases, given.runs, lambda case: measure_one(Path(name), starts[case.where], case))
    return rounds.results


def on_ranks(n_ranks: int) -> Start:
    """Launches on this machine."""
    return lambda arguments: this_program(*arguments, "-n", str(n_ranks))


def on_nodes(cluster: Cluster) -> Start:
    """Launches on the emulated cluster."""
    return lambda arguments: cluster.line(this_program(*arguments), PER_NODE)


def measure_one(folder: Path, start: Start, case: Case) -> dict[str, Any]:
    """Seconds of a job, how long each rank's expert computed, how uneven the load was, and what came out."""
    write_job(folder / "job.toml", folder, case)
    found = run(start(["run", str(folder / "job.toml"), "--overwrite", "--json"]))
    trace, outputs = analysis.load(folder / "out.trace.h5"), read_outputs(folder / "out.h5")
    share = [float(one.share) for one in analysis.busiest_per_layer(trace)]
    keep = ("seconds", "wall_seconds", "other_cores", "new_tokens", "steps", "expert_calls", "expert_rows")
    return {
        **{key: found[key] for key in keep},
        "expert_seconds": analysis.time_per_stage(trace)[:, EXPERT].tolist(),
        "busiest_share": max(share, default=0.0),
        "max_over_mean": float(np.nanmax(analysis.max_over_mean(trace))),
        "tokens_digest": hash_of(outputs.tokens),
    }


def hash_of(tokens: np.ndarray) -> str:
    """To see that both ways gave the same."""
    return hashlib.sha256(tokens.tobytes()).hexdigest()[:16]


def write_job(path: Path, folder: Path, case: Case) -> None:
    weights = TINYMOE if LOADS[case.load].config is None else folder / f"{case.load}-weights.h5"
    path.write_text(
        f"""
        model.weights = "{weights}"
        input.file = "{case.load}.h5"
        output.file = "out.h5"
        generate.stop_at_eos = false
        run = {{ capacity = 8, threads = 1 }}
        exchange.lockstep = {str(case.lockstep).lower()}
        trace.file = "out.trace.h5"
        """
    )


if __name__ == "__main__":
    main()
