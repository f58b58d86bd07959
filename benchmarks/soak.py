"""Whether a long job holds more and more: resident memory, open files and pending requests of every rank.

    python benchmarks/soak.py                                  # 20 000 short sequences on 3 ranks
    python benchmarks/soak.py --sequences 200000 --ranks 4     # an hour

Each rank notes what it holds four times a second (`tests/launch/programs/soaks.py`). What is told is the growth per
1000 sequences along a fitted line, after the warm-up; 1 where it is more than the limit.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np

sys.path.insert(0, str(Path(__file__).parents[1] / "tests" / "launch"))
from soaks import HELD, LIMIT, WARM_UP, growths, soak, write_job

from moempi.files.schema import environment

RESULTS = Path(__file__).parent / "results" / "soak.json"


def measure(sequences: int, ranks: int, hours: float) -> dict[str, Any]:
    """Run the job; growth and the largest value of what each rank held, and how long it took."""
    with tempfile.TemporaryDirectory() as folder:
        notes = soak(write_job(Path(folder), sequences), ranks, timeout=3600 * hours)
    return {
        "machine": {"cores": os.cpu_count(), "date": time.strftime("%Y-%m-%d"), **environment()},
        "sequences": sequences,
        "seconds": float(np.ptp(notes[0]["time"])),
        "notes_per_rank": [len(one["time"]) for one in notes],
        "warm_up": WARM_UP,
        "limit": LIMIT,
        "growth_per_1000": growths(notes),
        "largest": [{name: float(one[name].max()) for name in HELD} for one in notes],
    }


def main() -> int:
    """Measure, print, keep."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sequences", type=int, default=20_000)
    parser.add_argument("--ranks", type=int, default=3)
    parser.add_argument("--hours", type=float, default=2, help="time limit")
    parser.add_argument("--out", type=Path, default=RESULTS)
    given = parser.parse_args()
    found = measure(given.sequences, given.ranks, given.hours)
    given.out.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    print(json.dumps(found, indent=1))
    return 1 if any(one[name] >= LIMIT for one in found["growth_per_1000"] for name in HELD) else 0


if __name__ == "__main__":
    sys.exit(main())
