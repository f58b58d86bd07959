"""The tables of the benchmarks, from raw figures that are worked by hand."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))

import cluster_report
import lockstep_report
from rounds import Rounds

SETTINGS = {
    "sequences": 8,
    "machine": {"cpu": "a CPU", "cores_used": 2, "torch": "2.9", "openmpi": "5.0"},
}


def routed(route: str, seconds: float, chosen: str, link: int, turn: int = 0) -> dict[str, Any]:
    """A run on two nodes, of which the first sends `link` bytes, 1000 of them because any job does."""
    return {
        "round": turn,
        "shape": "2x1",
        "rate": "1gbit",
        "load": "decode",
        "route": route,
        "seconds": seconds,
        "other_cores": 0.0,
        "link_bytes": [link, 1500],
        "start_bytes": [1000, 1000],
        "traced_bytes": [2000, 400],
        "traced_messages": [10, 10],
        "chosen": chosen,
    }


def cells(text: str, first: str) -> list[list[str]]:
    """The cells of the rows of all tables that begin with `first`."""
    return [
        [c.strip() for c in line.strip("|").split("|")] for line in text.splitlines() if line.startswith(f"| {first} ")
    ]


def test_routes() -> None:
    runs = [routed("direct", 4.0, "direct", 3200), routed("leader", 5.0, "leader", 3400)]
    runs += [routed("direct", 6.0, "direct", 3200, 1), routed("leader", 5.0, "leader", 3400, 1)]
    runs += [routed("direct", 4.5, "direct", 3200, 2), routed("auto", 4.6, "leader", 3400, 2)]
    text = cluster_report.render({"settings": SETTINGS, "runs": runs})
    times, *counted = cells(text, "2x1")
    # Medians 4.5 and 5.0: direct is best; auto took the other, 11.1 % more.
    shown = ["4.50 (4.00 to 6.00)", "5.00 (5.00 to 5.00)", "direct", "4.60", "leader", "11.1%"]
    assert times == ["2x1", "1gbit", "decode", *shown]
    # 3200 - 1000 bytes on the link for 2000 of rows: 10 % more.
    assert counted[0] == ["2x1", "1gbit", "decode", "direct", "0.00", "10", "0.00", "10.0%"]
    assert counted[1][3] == "leader" and counted[1][-1] == "20.0%"
    assert "Medians of 3 rounds, 8 sequences; a CPU, 2 cores" in text and "the machine was quiet" in text


def test_routes_without_auto() -> None:
    text = cluster_report.render({"settings": SETTINGS, "runs": [routed("direct", 4.0, "direct", 3200)]})
    assert cells(text, "2x1")[0] == ["2x1", "1gbit", "decode", "4.00", "direct", "", "", ""]


def stepped(lockstep: bool, turn: int, seconds: float, experts: list[float], digest: str = "same") -> dict[str, Any]:
    return {
        "round": turn,
        "where": "here",
        "load": "zipf",
        "lockstep": lockstep,
        "seconds": seconds,
        "other_cores": 1.0,
        "expert_seconds": experts,
        "busiest_share": 0.25,
        "max_over_mean": 4.0,
        "tokens_digest": digest,
    }


def test_lockstep() -> None:
    # Ratios by round: 1.5 and 2.5, median 2. Idle: 1 - 6 / (2 x 10) = 70 %, and 1 - 6 / (2 x 15), 1 - 6 / (2 x 25).
    runs = [stepped(False, 0, 10.0, [2.0, 4.0]), stepped(True, 0, 15.0, [2.0, 4.0])]
    runs += [stepped(False, 1, 10.0, [2.0, 4.0]), stepped(True, 1, 25.0, [2.0, 4.0])]
    text = lockstep_report.render({"settings": SETTINGS, "runs": runs})
    assert cells(text, "here") == [["here", "zipf", "25%, 4.0 x", "10.00", "20.00", "2.00", "70%", "84%"]]
    assert "All runs of a load gave the same tokens." in text and "the machine was shared" in text
    other = lockstep_report.render({"settings": SETTINGS, "runs": [*runs, stepped(True, 2, 9.0, [1.0, 1.0], "other")]})
    assert "different tokens" in other


def test_an_interrupted_benchmark_goes_on(tmp_path: Path) -> None:
    from cluster_routes import Case

    cases = [Case("2x1", "1gbit", "decode", route) for route in ("direct", "leader", "rail")]
    measured: list[str] = []

    def one(case: Case) -> dict[str, Any]:
        if len(measured) == 4:
            raise KeyboardInterrupt
        measured.append(case.route)
        return {"seconds": 1.0}

    with pytest.raises(KeyboardInterrupt):
        Rounds(tmp_path / "raw.json", SETTINGS, resume=False).measure(cases, 2, one)
    assert measured == ["direct", "leader", "rail", "leader"], "each round begins with another one"
    rest: list[str] = []
    again = Rounds(tmp_path / "raw.json", SETTINGS, resume=True)
    again.measure(cases, 2, lambda case: rest.append(case.route) or {"seconds": 1.0})  # type: ignore[func-returns-value]
    assert rest == ["rail", "direct"] and len(again.results["runs"]) == 6
    with pytest.raises(SystemExit, match="omit --resume"):
        Rounds(tmp_path / "raw.json", SETTINGS | {"sequences": 9}, resume=True)
