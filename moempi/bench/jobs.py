"""A random model of a given shape as whole jobs, for `moempi bench job`: prefill and decode, each by itself.

Prefill: long prompts and one new token each; prompt tokens per second. Decode: prompts of a few tokens and many new
ones each; new tokens per second, the short prefill included. Each phase runs once before it counts.
"""

from __future__ import annotations

import gc
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from moempi.errors import DataError, MoempiError
from moempi.files.init_weights import init_weights
from moempi.files.inputs import Prompts, write_inputs
from moempi.job import load_job
from moempi.mpi import AgreedError, agree, meet
from moempi.report import Outcome
from moempi.run import run

if TYPE_CHECKING:
    from mpi4py import MPI

SHORT = 16  # tokens of a prompt whose decoding counts


@dataclass(frozen=True)
class Phase:
    """What is generated, and which tokens count."""

    name: str
    prompts: int
    length: int
    new_tokens: int

    @property
    def tokens(self) -> int:
        """Tokens that a rate is told of."""
        return self.prompts * (self.length if self.name == "prefill" else self.new_tokens)


def phases_of(prompts: int, prompt_tokens: int, new_tokens: int) -> dict[str, Phase]:
    """By name, in the order in which they run."""
    lengths = {"prefill": (prompt_tokens, 1), "decode": (SHORT, new_tokens)}
    return {name: Phase(name, prompts, length, new) for name, (length, new) in lengths.items()}


def write_files(folder: Path, config: dict[str, Any], phases: dict[str, Phase], dtype: str, seed: int = 1) -> None:
    """Weights, prompts and a job file for every phase. One rank.

    Args:
        config: a config.json.
    """
    (folder / "config.json").write_text(json.dumps(config))
    init_weights(folder / "config.json", folder / "weights.h5", seed, dtype, alike=True)
    random = np.random.default_rng(seed)
    for name, phase in phases.items():
        tokens = list(random.integers(0, config["vocab_size"], (phase.prompts, phase.length), dtype=np.int32))
        ids = [str(i) for i in range(phase.prompts)]
        write_inputs(folder / f"{name}.h5", Prompts(ids, tokens, None, np.zeros(phase.prompts, np.int32)), {})
        (folder / f"{name}.toml").write_text(
            f'model.weights = "weights.h5"\ninput.file = "{name}.h5"\noutput.file = "{name}.out.h5"\n'
            f'generate.max_new_tokens = {phase.new_tokens}\ngenerate.stop_at_eos = false\ntrace.level = "off"\n'
        )


def measure_jobs(
    world: MPI.Intracomm,
    folder: Path,
    phases: dict[str, Phase],
    counts: Sequence[int],
    overrides: Sequence[str],
    rounds: int,
) -> list[dict[str, Any]]:
    """Run every phase on every number of ranks; what came of it, on rank 0. Collective.

    Args:
        folder: with what `write_files` has written; all ranks see it.
        counts: of ranks, at most as many as there are; the others sleep.
        overrides: "section.key=value" for every job.
    """
    found = []
    for number, count in enumerate(sorted(counts, reverse=True)):
        part: Any = world.Split(0 if world.rank < count else 1, world.rank)
        wanted = list(overrides)
        for phase in phases.values():
            # The first job compiles kernels for its shapes; the ranks of later ones have them.
            first = int(number == 0)
            for repeat in range(rounds + first):
                outcome = None
                if world.rank < count:
                    outcome = run_job(part, folder, phase, wanted)
                    wanted = without_trial(part, outcome, wanted)
                meet(world)
                if outcome is not None and world.rank == 0 and repeat >= first:
                    found.append(_told(count, phase, outcome))
        part.Free()
    return found


def run_job(part: MPI.Intracomm, folder: Path, phase: Phase, overrides: Sequence[str]) -> Outcome:
    """Run a phase's job file, every sequence at work from the start. Collective over `part`."""
    each = -(-phase.prompts // part.size)
    job = load_job(folder / f"{phase.name}.toml", [f"run.capacity={each}", *overrides])
    try:
        outcome = run(part, job, overwrite=True)
    except AgreedError as error:
        # Ranks that sleep know nothing of it.
        raise MoempiError(str(error)) from None
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    return outcome


def without_trial(part: MPI.Intracomm, outcome: Outcome, overrides: Sequence[str]) -> list[str]:
    """Overrides for further jobs of these ranks, which need not try again what MPI does with the GPUs' memory.

    Collective over `part`.
    """
    works = part.bcast(outcome.messages.startswith("from GPU to GPU"), root=0)
    if part.size == 1 or not works:
        return list(overrides)
    return [*(word for word in overrides if not word.startswith("exchange.gpu_aware=")), "exchange.gpu_aware=on"]


def _told(ranks: int, phase: Phase, outcome: Outcome) -> dict[str, Any]:
    return {
        "ranks": ranks,
        "phase": phase.name,
        "tokens": phase.tokens,
        "seconds": outcome.seconds,
        "tokens_per_second": phase.tokens / outcome.seconds,
        "steps": outcome.steps,
        "expert_calls": outcome.expert_calls,
        "mode": outcome.mode,
        "device": outcome.device,
        "messages": outcome.messages,
        "memory_planned": outcome.memory_planned,
        "memory_peak": outcome.memory_peak,
    }


def write_together(
    world: MPI.Intracomm, folder: Path, config: dict[str, Any], phases: dict[str, Phase], dtype: str
) -> None:
    """`write_files` on rank 0. Collective.

    Raises:
        AgreedError: on every rank, with rank 0's error.
    """
    error: MoempiError | None = None
    if world.rank == 0:
        try:
            write_files(folder, config, phases, dtype)
        except MoempiError as caught:
            error = caught
        except OSError as caught:
            error = DataError(f"{folder}: the model cannot be written: {caught}")
    agree(world, error)


def rates(found: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Median tokens per second of every phase by number of ranks, beside those of the fewest ranks. Pure."""
    counts = sorted({one["ranks"] for one in found})
    phases = list(dict.fromkeys(one["phase"] for one in found))
    table: list[dict[str, Any]] = []
    for count in counts:
        of = {
            phase: median(one["tokens_per_second"] for one in found if (one["ranks"], one["phase"]) == (count, phase))
            for phase in phases
        }
        first = table[0] if table else {"ranks": count, **of}
        # 1: twice the ranks are twice as fast.
        scaling = {f"{phase}_scaling": of[phase] / first[phase] * first["ranks"] / count for phase in phases}
        table.append({"ranks": count, **of, **scaling})
    return table
