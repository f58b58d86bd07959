"""Wall time, and bytes on every link, of the exchange's routes on an emulated cluster (Linux, root, iproute2).

    python benchmarks/cluster_routes.py                                # measure, print, keep the raw figures
    python benchmarks/cluster_routes.py --resume                       # go on where an interrupted one stopped
    python benchmarks/cluster_routes.py --doc docs/performance.md      # and put the tables into the page
    python benchmarks/cluster_routes.py --shapes 4x2 --loads decode --runs 1 --sequences 8    # a first look

A case is a shape (nodes x ranks on each), a rate of the links, a load and a route. One launch runs all loads and
routes of a shape and rate (cluster_jobs.py), round after round. For `auto` the
links of each shape and rate are measured first, by `moempi bench links`.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
from cluster_report import render
from decode_report import put_into
from loads import LOADS, TINYMOE, write_load
from rounds import Rounds, add_options
from tinymoe_decode import HERE, TIME_LIMIT, machine, run, say

sys.path.insert(0, str(HERE.parent / "tests" / "cluster"))
from emulation import Cluster, missing

from moempi import analysis
from moempi.files.inputs import Prompts, write_inputs
from moempi.files.links import read_links
from moempi.launch import this_program

RESULTS = HERE / "results" / "cluster_routes.json"
ROUTES = ("direct", "leader", "rail", "auto")


@dataclass(frozen=True)
class Case:
    """One job."""

    shape: str
    rate: str
    load: str
    route: str


@dataclass(frozen=True)
class Bench:
    """Where the files are, and the cluster of the present shape and rate."""

    folder: Path
    cluster: Cluster
    per_node: int


def main() -> None:
    given = _arguments()
    results = json.loads(given.render.read_text()) if given.render else measure(given)
    print(render(results))
    if given.doc:
        put_into(given.doc, render(results), given.mark)


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_options(parser, RESULTS, rounds=3)
    parser.add_argument("--shapes", nargs="+", default=["4x2", "4x4"], help="nodes x ranks on each")
    parser.add_argument("--rates", nargs="+", default=["1gbit", "200mbit"], help="of every link, as tc writes it")
    parser.add_argument("--loads", nargs="+", default=["prefill", "decode", "wide"], choices=LOADS)
    parser.add_argument("--routes", nargs="+", default=list(ROUTES), choices=ROUTES)
    parser.add_argument("--sequences", type=int, default=32)
    parser.add_argument("--mark", default="cluster_routes", help="which of the page's marked places --doc fills")
    return parser.parse_args()


def measure(given: argparse.Namespace) -> dict[str, Any]:
    """All figures, JSON-ready; ends where nothing can be measured, with the reason."""
    if reason := missing():
        raise SystemExit(reason)
    settings = {"machine": machine(len(os.sched_getaffinity(0))), "sequences": given.sequences}
    del settings["machine"]["date"]
    rounds = Rounds(given.json, settings, given.resume)
    rounds.results.setdefault("links", {})
    with tempfile.TemporaryDirectory(prefix="moempi-bench-") as name:
        folder = Path(name)
        for load in given.loads:
            write_load(folder, load, given.sequences)
            write_load_of_one(folder, load)
        for shape, rate in product(given.shapes, given.rates):
            nodes, per_node = map(int, shape.split("x"))
            with Cluster(nodes, rate) as cluster:
                bench = Bench(folder, cluster, per_node)
                if "auto" in given.routes:
                    rounds.results["links"][f"{shape} {rate}"] = measure_links(bench)
                cases = [Case(shape, rate, load, route) for load in given.loads for route in given.routes]
                rounds.measure_at_once(cases, given.runs, lambda left: measure_all(bench, left))  # noqa: B023
    rounds.keep()
    return rounds.results


def write_load_of_one(folder: Path, load: str) -> None:
    """One sequence of one new token: what its job sends is the start and the end of any job."""
    one = Prompts(["p"], [np.array([5, 6], dtype=np.int32)], None, np.ones(1, dtype=np.int32))
    write_inputs(folder / f"{load}-start.h5", one, {})


def measure_links(bench: Bench) -> dict[str, float]:
    """Write links.h5; medians of latency (s) and bandwidth (bytes/s), inside nodes and between them."""
    out = bench.folder / "links.h5"
    command = this_program("bench", "links", str(out), "--overwrite", "--largest", "2 MiB", "--limit", "0.3")
    done = bench.cluster.run(command, bench.per_node, TIME_LIMIT)
    if done.code:
        raise SystemExit(done.err)
    links = read_links(out)
    medians = {}
    for where, chosen in (("inside", ~links.between), ("between", links.between)):
        for name in ("latency", "bandwidth"):
            medians[f"{where} {name}"] = float(np.median(getattr(links, name)[chosen])) if chosen.any() else 0.0
    say(f"links: {medians}")
    return medians


def measure_all(bench: Bench, cases: Sequence[Case]) -> list[dict[str, Any]]:
    """Seconds of every job, bytes on the links with and without what any job sends, and what the trace counted."""
    jobs = [write_job(bench, case, which) for case in cases for which in (f"{case.load}-start", case.load)]
    program = [sys.executable, "-m", "mpi4py", str(HERE / "cluster_jobs.py"), *map(str, jobs)]
    found = run(bench.cluster.line(program, bench.per_node))
    # Ranks on emulated nodes are no children of this process, and no other programs either.
    others = max(0.0, found["other_cores"] - found["rank_seconds"] / found["wall_seconds"])
    told = []
    for start, job, path in zip(found["jobs"][::2], found["jobs"][1::2], jobs[1::2], strict=True):
        keep = ("seconds", "new_tokens", "link_bytes", "link_received")
        told.append(
            {
                **{key: job[key] for key in keep},
                "other_cores": others,
                "start_bytes": start["link_bytes"],
                "chosen": job["route"],
                "reason": job["route_reason"],
                **between_nodes(path.with_suffix(".trace.h5")),
            }
        )
    return told


def between_nodes(path: Path) -> dict[str, list[int]]:
    """Rows with headers in bytes, and messages, that the trace says have left each node."""
    trace = analysis.load(path)
    node = np.array([rank["node"] for rank in trace.ranks])
    source, traffic = node[trace.traffic["source"]], trace.traffic
    away = source != node[traffic["destination"]]
    return {
        f"traced_{name}": [int(traffic[name][away & (source == n)].sum()) for n in range(node.max() + 1)]
        for name in ("bytes", "messages")
    }


def write_job(bench: Bench, case: Case, inputs: str) -> Path:
    """The job file of a case; its output and trace lie beside it."""
    path = bench.folder / f"{inputs}-{case.route}.toml"
    weights = TINYMOE if LOADS[case.load].config is None else bench.folder / f"{case.load}-weights.h5"
    links = f'exchange.links = "{bench.folder / "links.h5"}"' if case.route == "auto" else ""
    path.write_text(
        f"""
        model.weights = "{weights}"
        input.file = "{inputs}.h5"
        output.file = "{path.stem}.h5"
        generate.stop_at_eos = false
        run = {{ capacity = 8, threads = 1, device = "cpu" }}
        exchange.route = "{case.route}"
        trace.file = "{path.stem}.trace.h5"
        {links}
        """
    )
    return path


if __name__ == "__main__":
    main()
