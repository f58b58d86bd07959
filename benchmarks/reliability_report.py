"""The figures of docs/reliability.md, from what kill_anywhere.py, soak.py and `make fuzz` have kept.

python benchmarks/reliability_report.py        # measures nothing
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from decode_report import put_into

HERE = Path(__file__).parent
PAGE = HERE.parent / "docs" / "reliability.md"


def kills(found: dict[str, Any]) -> str:
    """Who was killed, how far the job was, what came of it."""
    total, then = found["summary"], found["summary"]["committed_then"]
    whom = ", ".join(f"{count} x {who}" for who, count in sorted(total["whom"].items()))
    ranks = sorted({kill["ranks"] for kill in found["kills"]})
    return (
        f"| `benchmarks/kill_anywhere.py`, seed {found['seed']}, {found['machine']['date']} | {total['kills']} kills: "
        f"{whom}; {ranks[0]} to {ranks[-1]} ranks, {found['sequences']} sequences, of which some but not all were "
        f"committed {then.get('some', 0)} times, none {then.get('none', 0)}, all {then.get('all', 0)} times | "
        f"{total['files_read']} files that were left read to the last number; {total['broken']} promises broken |"
    )


def soak(found: dict[str, Any]) -> str:
    """What grows in a long job."""
    most = {name: max(one[name] for one in found["growth_per_1000"]) for name in found["growth_per_1000"][0]}
    grown = ", ".join(f"{name} {100 * value:+.2f} %" for name, value in most.items())
    largest = max(one["memory"] for one in found["largest"]) / 2**20
    return (
        f"| `benchmarks/soak.py`, {found['machine']['date']} | {found['sequences']:,} sequences on "
        f"{len(found['largest'])} ranks in {found['seconds']:.0f} s | growth per 1000 sequences after the warm-up, of "
        f"the rank that grows most: {grown}; limit {100 * found['limit']:.0f} %; at most {largest:.0f} MiB a rank |"
    )


def fuzz(found: dict[str, Any]) -> str:
    """What came of damaged files."""
    bad = found.get("FAILED", 0) + found.get("DIED", 0)
    return (
        f"| `make fuzz`, seed {found['seed']} | {found['cases']:,} damaged files | {found['refused']:,} refused with "
        f"one message, {found['read']:,} read (the damage was harmless), {bad} tracebacks, crashes or hangs |"
    )


def render() -> str:
    """The table of all that was measured and kept."""
    rows = ["| measured by | what was done | what came of it |", "| --- | --- | --- |"]
    for name, row in (("kill_anywhere", kills), ("soak", soak), ("fuzz", fuzz)):
        kept = HERE / "results" / f"{name}.json"
        if kept.exists():
            rows.append(row(json.loads(kept.read_text(encoding="utf-8"))))
    return "\n".join(rows)


if __name__ == "__main__":
    put_into(PAGE, render(), "reliability")
