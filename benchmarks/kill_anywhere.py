"""Kill -9 of a rank, of all ranks, or of mpirun, at moments drawn over a small job; then a resume, bits compared.

    python benchmarks/kill_anywhere.py                       # 100 kills, half an hour on two cores
    python benchmarks/kill_anywhere.py --at-most 3 --resume  # go on where an interrupted one stopped, with three more
    python benchmarks/kill_anywhere.py --only 17             # one of them again

Nineteen kills of twenty come once a drawn share of the work is committed, and up to two commits later; one of twenty
at a drawn moment of the whole launch, with its start and its end. `tests/launch/kills.py` looks at what is left.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
import time
from collections import Counter
from operator import itemgetter
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1] / "tests" / "launch"))
from kills import count_tokens, draw, prepare, trial
from ranks import run
from small_jobs import SEQUENCES, Tokens, finished, moempi

from moempi.files.schema import environment

RESULTS = Path(__file__).parent / "results" / "kill_anywhere.json"
FOLDER = Path(__file__).parents[1] / "build" / "kill_anywhere"
TRIED_ON = 2  # ranks of the launch whose length the moments are drawn from


def undisturbed(folder: Path, results: dict[str, Any]) -> Tokens:
    """What the job comes to when nothing happens to it; kept in the folder, its seconds in the results."""
    if not results["launch_seconds"] or not (folder / "out.h5").exists():
        folder.mkdir(parents=True, exist_ok=True)
        ended = run(moempi("run", prepare(folder), "-n", str(TRIED_ON), "--overwrite"), timeout=300)
        assert ended.code == 0, ended.err
        results["launch_seconds"] = results["launch_seconds"] or ended.seconds
    found = finished(folder / "out.h5")
    assert len(found) == SEQUENCES
    return found


def one(number: int, results: dict[str, Any], whole: Tokens) -> dict[str, Any]:
    """One kill; a broken promise is a part of what came out, and the files stay."""
    kill = draw(number, results["seed"], count_tokens(whole), results["launch_seconds"])
    folder = Path(tempfile.mkdtemp(prefix=f"kill-{number}-"))
    try:
        found = trial(kill, folder, whole)
    except AssertionError as error:
        return vars(kill) | {"broken": str(error)[-2000:], "folder": str(folder)}
    for path in sorted(folder.rglob("*"), reverse=True):
        path.rmdir() if path.is_dir() else path.unlink()
    folder.rmdir()
    return found


def summary(kills: list[dict[str, Any]]) -> dict[str, Any]:
    """Counts over all kills: how far the job was, who was killed, and promises that were broken."""
    return {
        "kills": len(kills),
        "committed_then": dict(Counter(kill.get("state", "broken") for kill in kills)),
        "whom": dict(Counter(kill["whom"] for kill in kills)),
        "rank": dict(sorted(Counter(kill["rank"] for kill in kills if kill["rank"] >= 0).items())),
        "files_read": sum(kill.get("files", 0) for kill in kills),
        "broken": sum("broken" in kill for kill in kills),
    }


def begin(path: Path, seed: int, resume: bool) -> dict[str, Any]:
    """What an interrupted measurement has, or an empty one."""
    if resume and path.exists():
        return json.loads(path.read_text(encoding="utf-8"))
    machine = {"cores": os.cpu_count(), "date": time.strftime("%Y-%m-%d"), **environment()}
    return {"machine": machine, "seed": seed, "sequences": SEQUENCES, "launch_seconds": 0.0, "kills": []}


def main() -> int:
    """Run the kills that the command line asks for; 1 where a promise was broken."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=100)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--only", type=int, help="this kill alone; its result is printed and not kept")
    parser.add_argument("--at-most", type=int, default=10**6, help="end after so many, to go on with --resume")
    parser.add_argument("--resume", action="store_true", help="go on with what --out has")
    parser.add_argument("--folder", type=Path, default=FOLDER, help="for the undisturbed run, which is made once")
    parser.add_argument("--out", type=Path, default=RESULTS)
    given = parser.parse_args()
    results = begin(given.out, given.seed, given.resume or given.only is not None)
    whole = undisturbed(given.folder, results)
    if given.only is not None:
        print(json.dumps(one(given.only, results, whole), indent=1))
        return 0
    done = {kill["number"] for kill in results["kills"]}
    for number in sorted({*range(given.kills)} - done)[: given.at_most]:
        results["kills"] = sorted([*results["kills"], one(number, results, whole)], key=itemgetter("number"))
        results["summary"] = summary(results["kills"])
        given.out.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
        print(number, flush=True)
    print(json.dumps(results["summary"], indent=1))
    return 1 if results["summary"]["broken"] else 0


if __name__ == "__main__":
    sys.exit(main())
