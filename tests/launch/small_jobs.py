"""Small jobs for real runs: prompts of very different lengths for inputs/tinymoe.h5, and what their outputs hold."""

from __future__ import annotations

import re
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
from ranks import Running

from moempi.files.completions import FINISH_REASONS
from moempi.files.inputs import Prompts, write_inputs
from moempi.files.outputs import read_outputs
from moempi.launch import session_members

SEQUENCES = 40
TINYMOE = Path(__file__).parents[2] / "inputs" / "tinymoe.h5"

Tokens = dict[str, tuple[bytes, bytes, str]]  # (tokens, logprobs, finish reason) of each sequence


def write_job(folder: Path, **changes: str) -> Path:
    """Prompts and a job file; commits come several times a second.

    Args:
        changes: `stall_timeout`, `microbatches`, `commit_every` (s), and `longest`, new tokens of a sequence.
    """
    options = {"stall_timeout": "60.0", "microbatches": "1", "commit_every": "0.2", "longest": "400", **changes}
    chance = np.random.default_rng(20)
    tokens = [chance.integers(5, 500, n, dtype=np.int32) for n in chance.integers(1, 40, SEQUENCES)]
    new = chance.integers(4, int(options["longest"]), SEQUENCES, dtype=np.int32)  # by default some seconds of work
    write_inputs(folder / "prompts.h5", Prompts([f"p{i}" for i in range(SEQUENCES)], tokens, None, new), {})
    (folder / "job.toml").write_text(
        f"""
        model.weights = "{TINYMOE}"
        input.file = "prompts.h5"
        output = {{ file = "out.h5", commit_every = {options["commit_every"]} }}
        generate.stop_at_eos = false
        run = {{ capacity = 3, threads = 1, microbatches = {options["microbatches"]} }}
        engine.stall_timeout = {options["stall_timeout"]}
        """
    )
    return folder / "job.toml"


def moempi(*arguments: str | Path) -> list[str]:
    return [sys.executable, "-m", "moempi", *map(str, arguments)]


def finished(path: Path) -> Tokens:
    """Every finished sequence of an output or of its commits."""
    out = read_outputs(path)
    reasons = [FINISH_REASONS[reason] for reason in out.finish_reason]
    return {
        out.ids[row]: (out.tokens[begin:end].tobytes(), out.logprobs[begin:end].tobytes(), reason)
        for row, (begin, end, reason) in enumerate(zip(out.offsets[:-1], out.offsets[1:], reasons, strict=True))
        if reason != "partial"
    }


def wait_until(condition: Callable[[], bool], what: str, timeout: float = 240) -> None:
    end = time.monotonic() + timeout
    while not condition():
        assert time.monotonic() < end, f"{what}: not within {timeout} s"
        time.sleep(0.02)


def commits(job: Path) -> int:
    return len(list((job.parent / "out.h5.parts").glob("part-*.h5")))


def wait_for_commit(running: Running, job: Path, more_than: int = 0) -> None:
    def there() -> bool:
        assert running.process.poll() is None, f"ended:\n{running.out}\n{running.err}"
        return commits(job) > more_than

    wait_until(there, "a commit")


def causes(text: str) -> list[str]:
    return [line for line in text.splitlines() if "moempi: error:" in line]


def rank_pids(session: int) -> dict[int, int]:
    """Process id of every rank in a session."""
    pids = {}
    for pid in session_members(session):
        environ = Path(f"/proc/{pid}/environ").read_bytes()
        found = re.search(rb"(?:^|\0)OMPI_COMM_WORLD_RANK=(\d+)", environ)
        if found:
            pids[int(found[1])] = pid
    return pids


def mpirun_of(running: Running) -> int:
    """Process id, which is the session too, of the mpirun that `moempi run -n` started."""
    pid = running.process.pid
    return int(Path(f"/proc/{pid}/task/{pid}/children").read_text().split()[0])
