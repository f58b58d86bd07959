"""A long job of short sequences, and by how much what its ranks hold grows with the sequences that are done."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from ranks import mpirun_line, program, run

from moempi.files.init_weights import init_weights
from moempi.files.inputs import Prompts, write_inputs

HELD = ("memory", "files", "requests")  # resident bytes, open files, fewest pending requests of a while
LIMIT = 0.01  # growth per 1000 sequences
WARM_UP = 0.4  # share of the sequences that is not looked at
FEW = 2  # requests, which are pending so often that the fewest of a while are none or these, as it happens

SMALL = {
    "model_type": "qwen3_moe",
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "vocab_size": 64,
    "intermediate_size": 32,
    "moe_intermediate_size": 32,
    "num_experts": 4,
    "num_experts_per_tok": 2,
    "norm_topk_prob": True,
    "tie_word_embeddings": True,
    "rope_theta": 1e4,
    "rms_norm_eps": 1e-6,
    "max_position_embeddings": 256,
    "eos_token_id": 0,
}


def write_job(folder: Path, sequences: int) -> Path:
    """Prompts of 1 to 15 tokens, 1 to 7 new tokens each, a small model, and the job file."""
    chance = np.random.default_rng(4)
    tokens = [chance.integers(1, 64, n, dtype=np.int32) for n in chance.integers(1, 16, sequences)]
    new = chance.integers(1, 8, sequences, dtype=np.int32)
    write_inputs(folder / "prompts.h5", Prompts([f"p{i}" for i in range(sequences)], tokens, None, new), {})
    (folder / "config.json").write_text(json.dumps(SMALL))
    init_weights(folder / "config.json", folder / "weights.h5", seed=1, dtype="float32")
    (folder / "job.toml").write_text(
        """
        model.weights = "weights.h5"
        input.file = "prompts.h5"
        output = { file = "out.h5", commit_every = 0.5 }
        generate.stop_at_eos = false
        run = { capacity = 16, threads = 1 }
        engine.stall_timeout = 60.0
        """
    )
    return folder / "job.toml"


def soak(job: Path, ranks: int, leak: str = "nothing", timeout: float = 170) -> list[dict[str, np.ndarray]]:
    """Run a job on so many ranks; for each rank its notes, by name, with `sequences`, those done by then in all."""
    ended = run(mpirun_line(ranks, program("soaks", str(job), str(job.parent), leak)), timeout=timeout)
    assert ended.code == 0, ended.err
    notes = [_read(job.parent / f"rank-{rank}.jsonl") for rank in range(ranks)]
    # Rank 0 counts; all share a machine and with it the clock.
    for one in notes:
        one["sequences"] = np.interp(one["time"], notes[0]["time"], notes[0]["finished"])
    return notes


def _read(path: Path) -> dict[str, np.ndarray]:
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    return {name: np.array([row[name] for row in rows], dtype=float) for name in rows[0]}


def growth(sequences: Sequence[float], held: Sequence[float]) -> float:
    """By which part of itself something grows per 1000 sequences, after the warm-up, along a fitted line.

    Less than one piece counts as one, so that what begins at nothing can be told.
    """
    x, y = np.asarray(sequences, dtype=float) / 1000, np.asarray(held, dtype=float)
    warm = x >= WARM_UP * x.max()
    slope, start = np.polyfit(x[warm], y[warm], 1)
    return float(slope / max(1.0, start + slope * x[warm].min()))


def growth_of_fewest(sequences: Sequence[float], held: Sequence[float]) -> float:
    """The same of a small count that comes and goes: the fewest after half of the warm part, against those before.

    Up to `FEW` count as none.
    """
    x, y = np.asarray(sequences, dtype=float) / 1000, np.maximum(0, np.asarray(held, dtype=float) - FEW)
    half = (WARM_UP + 1) / 2 * x.max()
    before, after = y[(x >= WARM_UP * x.max()) & (x < half)].min(), y[x >= half].min()
    return float((after - before) / max(1.0, before) / (half - WARM_UP * x.max()))


def growths(notes: Sequence[dict[str, np.ndarray]]) -> list[dict[str, float]]:
    """Growth per 1000 sequences of what each rank holds."""
    how = {"memory": growth, "files": growth, "requests": growth_of_fewest}
    return [{name: how[name](one["sequences"], one[name]) for name in HELD} for one in notes]
