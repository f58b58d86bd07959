"""Small jobs for the tests: inputs, job files, what they come to, and moempi as a user of the cluster calls it."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
from local_slurm import Cluster

from moempi.files.completions import FINISH_REASONS
from moempi.files.inputs import Prompts, write_inputs
from moempi.files.outputs import read_outputs

ROOT = Path(__file__).parents[2]
SEQUENCES = 12
LONG = 250  # new tokens: seconds of work on two ranks, so that a signal finds them at it
# sbatch's options that make the scripts of slurm/ fit the nodes of the tests.
SMALL = ["--mem=0", "--cpus-per-task=1"]

Tokens = dict[str, tuple[bytes, bytes, str]]  # (tokens, logprobs, finish reason) of each sequence


def write_job(
    folder: Path, new_tokens: int = 8, name: str = "job.toml", output: str = "out.h5", sequences: int = SEQUENCES
) -> Path:
    """Prompts and a job file; commits come several times a second, the first one soon."""
    chance = np.random.default_rng(6)
    tokens = [chance.integers(5, 500, n, dtype=np.int32) for n in chance.integers(1, 20, sequences)]
    new = np.array([4, 4, 4, *[new_tokens] * (sequences - 3)], dtype=np.int32)
    write_inputs(folder / "prompts.h5", Prompts([f"p{i}" for i in range(sequences)], tokens, None, new), {})
    weights, target = json.dumps(str(ROOT / "inputs/tinymoe.h5")), json.dumps(output, ensure_ascii=False)
    (folder / name).write_text(
        f"""
        model.weights = {weights}
        input.file = "prompts.h5"
        output = {{ file = {target}, commit_every = 0.2 }}
        generate.stop_at_eos = false
        run = {{ capacity = 3, threads = 1 }}
        """
    )
    return folder / name


def finished(path: Path) -> Tokens:
    """Every finished sequence of an output or of its commits."""
    out = read_outputs(path)
    reasons = [FINISH_REASONS[reason] for reason in out.finish_reason]
    return {
        out.ids[row]: (out.tokens[begin:end].tobytes(), out.logprobs[begin:end].tobytes(), reason)
        for row, (begin, end, reason) in enumerate(zip(out.offsets[:-1], out.offsets[1:], reasons, strict=True))
        if reason != "partial"
    }


def alone(job: Path) -> Tokens:
    """What a job comes to on one rank, without Slurm."""
    output = job.parent / "alone.h5"
    command = [sys.executable, "-m", "moempi", "run", str(job), "--set", f"output.file={output}"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    return finished(output)


def moempi(cluster: Cluster, *words: str | Path, check: bool = True, cwd: Path | None = None) -> str:
    """What a moempi command of a user of the cluster prints."""
    return cluster.command(sys.executable, "-m", "moempi", *words, check=check, cwd=cwd)


def wait_until(condition: Callable[[], object], what: Callable[[], str], timeout: float = 60) -> None:
    """Wait; fails, and says what there is instead, when it takes too long."""
    end = time.monotonic() + timeout
    while not condition():
        assert time.monotonic() < end, f"not within {timeout} s: {what()}"
        time.sleep(0.1)


def text_of(path: Path) -> str:
    """What a log holds so far."""
    return path.read_text(errors="replace") if path.exists() else ""
