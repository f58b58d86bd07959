"""Damaged files of every kind, each through the real readers: a clear error or a result, and nothing else.

    python tests/hostile/soak.py --cases 10000 --seed 7 --json found.json
    python tests/hostile/soak.py --cases 10000 --seed 7 --json found.json --at-most 2000     # go on where that ended
    python tests/hostile/soak.py --only 1234 --seed 7      # one case again, in this process, with its traceback

A child runs many cases under a limit of memory and a limit of time for each. Where it dies, the case that it was at
is to blame, its file is kept, and another child goes on with the next one.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import shutil
import signal
import sys
import tempfile
import traceback
from collections import Counter
from pathlib import Path
from random import Random

import damage
import readers
import samples

from moempi.errors import MoempiError
from moempi.files.schema import environment

SECONDS = 20  # of a processor, for one case; a sound one takes a second at most
PATIENCE = 15  # times as long, in all, on a busy machine
OUTCOMES = ("read", "refused", "FAILED", "DIED")
MEMORY = 2**30  # bytes that the child may map beyond what it has at its start


def run_case(number: int, seed: int, sound: Path, folder: Path) -> tuple[str, str, str, str]:
    """Damage a copy of a sound file and read it: (outcome, kind, what was done, what was said)."""
    dice = Random(f"{seed}-{number}")
    kind = dice.choice([*readers.READERS])
    shutil.rmtree(folder, ignore_errors=True)
    shutil.copytree(sound, folder)
    what = "not damaged"
    try:
        what = damage.damage(folder / kind, dice)
        readers.READERS[kind](folder / kind)
    except MoempiError as error:
        fine = error.exit_code in (2, 3) and str(error).strip()
        return ("refused" if fine else "FAILED"), kind, what, str(error)
    except BaseException:
        return "FAILED", kind, what, traceback.format_exc()
    return "read", kind, what, ""


def child(numbers: range, seed: int, sound: Path, folder: Path, pipe: int) -> None:
    """Run cases and write a line for the begin and one for the end of each."""
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    most = pages * os.sysconf("SC_PAGE_SIZE") + MEMORY
    resource.setrlimit(resource.RLIMIT_AS, (most, most))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    # Not handled: a library that hangs never returns to Python.
    for ends in (signal.SIGALRM, signal.SIGPROF):
        signal.signal(ends, signal.SIG_DFL)
    for number in numbers:
        os.write(pipe, f"{number}\n".encode())
        signal.alarm(SECONDS * PATIENCE)
        signal.setitimer(signal.ITIMER_PROF, SECONDS)
        found = run_case(number, seed, sound, folder)
        signal.alarm(0)
        signal.setitimer(signal.ITIMER_PROF, 0)
        os.write(pipe, ("\t".join(repr(one[-3000:]) for one in found) + "\n").encode())


def run_child(numbers: range, seed: int, sound: Path, folder: Path) -> tuple[list[tuple[str, ...]], int]:
    """What came of the cases that a child began, and how it ended."""
    out, into = os.pipe()
    pid = os.fork()
    if pid == 0:
        try:
            os.close(out)
            child(numbers, seed, sound, folder, into)
        finally:
            os._exit(0)
    os.close(into)
    with os.fdopen(out) as stream:
        lines = stream.read().splitlines()
    _, status = os.waitpid(pid, 0)
    ends = [tuple(line.split("\t")) for line in lines[1::2]]
    return [(number, *end) for number, end in zip(lines[::2], ends, strict=False)], len(lines) % 2 and status


def soak(cases: range, seed: int, keep: Path) -> Counter[str]:
    """Run the cases; returns how often each outcome came, and prints every one that failed."""
    tally: Counter[str] = Counter()
    with tempfile.TemporaryDirectory() as scratch:
        sound, folder = Path(scratch) / "sound", Path(scratch) / "case"
        sound.mkdir()
        samples.make_samples(sound)
        next_case = cases.start
        while next_case < cases.stop:
            found, status = run_child(range(next_case, min(cases.stop, next_case + 500)), seed, sound, folder)
            for number, outcome, kind, what, said in found:
                tally[outcome.strip("'")] += 1
                if "FAILED" in outcome:
                    text = said.encode().decode("unicode_escape", errors="replace")
                    print(f"case {number} of seed {seed}, {kind}: {what}\n{text}\n", flush=True)
            next_case += len(found)
            if status:
                tally["DIED"] += 1
                shutil.copytree(folder, keep / f"{seed}-{next_case}", dirs_exist_ok=True)
                ended = signal.Signals(os.WTERMSIG(status)).name if os.WIFSIGNALED(status) else f"status {status}"
                print(f"case {next_case} of seed {seed} ended the process: {ended}; kept in {keep}", flush=True)
                next_case += 1
    return tally


def earlier(path: Path | None, seed: int) -> Counter[str]:
    """Outcomes of the cases that a file has of a seed."""
    if path is None or not path.exists():
        return Counter()
    found = json.loads(path.read_text(encoding="utf-8"))
    return Counter({one: found[one] for one in OUTCOMES if one in found and found["seed"] == seed})


def main() -> int:
    """Run the cases that the command line asks for; 1 where one failed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", type=int, default=300)
    parser.add_argument("--seed", type=int, default=Random().randrange(10**6))
    parser.add_argument("--only", type=int, help="run this case alone")
    parser.add_argument("--json", type=Path, help="keep the counts here, and go on with those of the seed")
    parser.add_argument("--at-most", type=int, default=10**9, help="end after so many")
    parser.add_argument("--keep", type=Path, default=Path(tempfile.gettempdir()) / "moempi-hostile")
    given = parser.parse_args()
    if given.only is not None:
        sound = Path(tempfile.mkdtemp()) / "sound"
        sound.mkdir()
        samples.make_samples(sound)
        print(*run_case(given.only, given.seed, sound, sound.with_name("case")), f"in {sound.parent}", sep="\n")
        return 0
    print(f"seed {given.seed}", flush=True)
    before = earlier(given.json, given.seed)
    cases = range(sum(before.values()), min(given.cases, sum(before.values()) + given.at_most))
    tally = before + soak(cases, given.seed, given.keep)
    if given.json:
        kept = {"seed": given.seed, "cases": sum(tally.values()), **tally, **environment()}
        given.json.write_text(json.dumps(kept, indent=1) + "\n", encoding="utf-8")
    print(", ".join(f"{count} {outcome}" for outcome, count in sorted(tally.items())))
    return 1 if tally["FAILED"] or tally["DIED"] else 0


if __name__ == "__main__":
    sys.exit(main())
