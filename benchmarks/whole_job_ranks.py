"""Started under mpirun: a random model as whole jobs, prefill and all of it, on the first so many ranks. Writes JSON.

python whole_job_ranks.py FOLDER NEW_TOKENS DEVICE OUT COUNT [COUNT ...] [OPTION=VALUE ...]
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import numpy as np

from moempi import mpi
from moempi.cli.measuring import start_mpi
from moempi.files.init_weights import init_weights
from moempi.files.inputs import Prompts, write_inputs

WARM_UP = 16  # prompts of a first job, for which kernels are compiled


def main() -> None:
    folder, new_tokens, device, out = Path(sys.argv[1]), int(sys.argv[2]), sys.argv[3], Path(sys.argv[4])
    counts = [int(one) for one in sys.argv[5:] if "=" not in one]
    options_given = [one for one in sys.argv[5:] if "=" in one]
    world = start_mpi(device)
    from moempi.bench.jobs import Phase, run_job, without_trial  # which load MPI

    prompts = [np.array(tokens, dtype=np.int32) for tokens in json.loads((folder / "prompts.json").read_text())]
    # name: prompts and new tokens
    jobs = {"warm": (prompts[:WARM_UP], 4), "prefill": (prompts, 1), "whole": (prompts, new_tokens)}
    if world.rank == 0:
        init_weights(folder / "config.json", folder / "weights.h5", 1, "bfloat16", alike=True)
        for name, (some, new) in jobs.items():
            write_job(folder, name, some, new)
    mpi.meet(world)
    found: list[dict[str, Any]] = []
    # Prefill twice: the first job of a size compiles kernels for it.
    for ranks in dict.fromkeys(counts):
        part = world.Split(0 if world.rank < ranks else 1, world.rank)
        options = [f"run.device={device}"]
        if device == "cuda":
            options += ["model.mode=fast"]
        options += options_given
        for name in ("warm", "prefill", "prefill", "whole"):
            outcome = None
            if world.rank < ranks:
                some, new = jobs[name]
                phase = Phase(name, len(some), 0, new)
                outcome = run_job(part, folder, phase, options)
                options = without_trial(part, outcome, options)
            mpi.meet(world)
            host = world.gather(memory_of_host(), root=0)
            if world.rank == 0:
                assert outcome is not None
                tokens = sum(map(len, some)) if name == "prefill" else outcome.new_tokens
                told = {"tokens": tokens, "seconds": outcome.seconds, "rate": tokens / outcome.seconds}
                memory = {"memory_planned": outcome.memory_planned, "memory_peak": outcome.memory_peak}
                about = {"steps": outcome.steps, **memory, "memory_of_hosts": host[:ranks]}
                found.append({"ranks": ranks, "job": name, **told, **about})
                temporary = out.with_suffix(".tmp")
                temporary.write_text(json.dumps(found))
                temporary.replace(out)
        part.Free()


def memory_of_host() -> dict[str, int]:
    """Bytes of this process: the most so far, and now by what stands behind them."""
    lines = (line.split() for line in Path("/proc/self/status").read_text().splitlines())
    names = {"VmHWM:": "most", "RssAnon:": "anonymous", "RssShmem:": "shared", "RssFile:": "files"}
    return {names[words[0]]: 1024 * int(words[1]) for words in lines if words and words[0] in names}


def write_job(folder: Path, name: str, prompts: list[np.ndarray], new_tokens: int) -> None:
    """Prompts and job file."""
    ids = [str(i) for i in range(len(prompts))]
    write_inputs(folder / f"{name}.h5", Prompts(ids, prompts, None, np.zeros(len(prompts), np.int32)), {})
    (folder / f"{name}.toml").write_text(
        f'model.weights = "weights.h5"\ninput.file = "{name}.h5"\noutput.file = "{name}.out.h5"\n'
        f'generate = {{ max_new_tokens = {new_tokens}, stop_at_eos = false }}\ntrace.level = "off"\n'
    )


if __name__ == "__main__":
    sys.exit(mpi.guard(main))
