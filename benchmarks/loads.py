"""What the benchmarks of the exchange run: models with prompts, and a job for them."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import h5py
import numpy as np

from moempi.files.init_weights import init_weights
from moempi.files.inputs import Prompts, write_inputs

TINYMOE = Path(__file__).resolve().parents[1] / "inputs" / "tinymoe.h5"
SEED = 11
ZIPF = 0.5  # the gate's row e is scaled by (e + 1) ** -ZIPF: its scores spread less, and it is chosen less

# 16 experts in two MoE layers, top-4, 1024 numbers a row: rows are eight times as long as tinymoe's.
WIDE = {
    "model_type": "qwen3_moe",
    "hidden_size": 1024,
    "num_hidden_layers": 2,
    "num_attention_heads": 8,
    "num_key_value_heads": 8,
    "head_dim": 128,
    "vocab_size": 1024,
    "intermediate_size": 1024,
    "moe_intermediate_size": 256,
    "num_experts": 16,
    "num_experts_per_tok": 4,
    "norm_topk_prob": True,
    "tie_word_embeddings": True,
    "rope_theta": 1e4,
    "rms_norm_eps": 1e-6,
    "max_position_embeddings": 1024,
    "eos_token_id": 0,
}
SKEWED = WIDE | {"hidden_size": 256, "num_attention_heads": 4, "num_key_value_heads": 4, "head_dim": 64}
SKEWED |= {"num_hidden_layers": 4, "num_experts_per_tok": 2}


@dataclass(frozen=True)
class Load:
    """A model and its prompts; lengths lie evenly between the two bounds (both included).

    Args:
        config: of random weights; None: tinymoe.
        prompt, new: bounds of the tokens of a prompt, and of the new ones.
        share: of the benchmark's number of sequences.
        zipf: exponent of the gates' skew.
    """

    config: dict[str, Any] | None
    prompt: tuple[int, int]
    new: tuple[int, int]
    share: float = 1.0
    zipf: float = 0.0


LOADS = {
    "prefill": Load(None, (192, 256), (2, 2)),
    "decode": Load(None, (4, 12), (32, 32)),
    "wide": Load(WIDE, (48, 64), (8, 8), share=0.5),
    "uneven": Load(None, (4, 240), (4, 64)),
    "zipf": Load(SKEWED, (4, 240), (4, 64), zipf=ZIPF),
}


def write_load(folder: Path, name: str, sequences: int) -> None:
    """Write NAME.h5 (prompts) and, where the model is not tinymoe, NAME-weights.h5 into a folder."""
    load, rng = LOADS[name], np.random.default_rng(SEED)
    n = max(1, round(load.share * sequences))
    lengths = rng.integers(load.prompt[0], load.prompt[1], n, endpoint=True)
    tokens = [rng.integers(5, 1000, length, dtype=np.int32) for length in lengths]
    new = rng.integers(load.new[0], load.new[1], n, endpoint=True, dtype=np.int32)
    write_inputs(folder / f"{name}.h5", Prompts([f"p{i}" for i in range(n)], tokens, None, new), {})
    if load.config is not None:
        (folder / "config.json").write_text(json.dumps(load.config))
        init_weights(folder / "config.json", folder / f"{name}-weights.h5", SEED, "bfloat16", gate_scale=10.0)
        skew_gates(folder / f"{name}-weights.h5", load.zipf)


def skew_gates(path: Path, zipf: float) -> None:
    """Scale the rows of every gate, so that low experts are chosen more often. Their digests are then old."""
    with h5py.File(path, "r+") as file:
        for layer in file["model/layers"].values():
            if zipf and "gate" in layer:
                gate = layer["gate"]
                scale = (1.0 + np.arange(len(gate))) ** -zipf
                gate[...] = gate.astype("float32")[...] * scale[:, None].astype(np.float32)
