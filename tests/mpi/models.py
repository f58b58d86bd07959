"""Small random models with their prompts, and jobs that run them. No MPI."""

from __future__ import annotations

import json
import random
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from moempi.files.completions import Outputs
from moempi.files.init_weights import init_weights
from moempi.files.inputs import Prompts, read_inputs, write_inputs
from moempi.files.outputs import read_outputs
from moempi.job import Job, job_from_table
from moempi.model.config import ModelConfig, config_from_hf


@dataclass(frozen=True)
class Model:
    """Weights and prompts on disk, with what every job of theirs must have in common."""

    weights: Path
    inputs: Path
    options: Mapping[str, Any]  # {"section.key": value}
    about: str  # for messages: what would make it again

    def job(self, output: Path, options: Mapping[str, Any] | None = None) -> Job:
        """A job of this model; `options` are {"section.key": value}. Without a trace unless they ask for one."""
        table: dict[str, dict[str, Any]] = {
            "model": {"weights": str(self.weights)},
            "input": {"file": str(self.inputs)},
            "output": {"file": str(output)},
            "trace": {"level": "off"},
            "engine": {"stall_timeout": 60.0},
        }
        for name, value in {**self.options, **(options or {})}.items():
            section, key = name.split(".")
            table.setdefault(section, {})[key] = str(value) if isinstance(value, Path) else value
        return job_from_table(table, output)

    def with_inputs(self, path: Path) -> Model:
        """The same weights with other prompts."""
        return replace(self, inputs=path)


def random_config(rng: random.Random, n_experts: int, **fixed: Any) -> dict[str, Any]:
    """A config.json of odd sizes: any head count and group, dense layers or none, tied or not."""
    n_layers, kv_heads = rng.randint(1, 3), rng.randint(1, 3)
    n_moe = rng.randint(1, n_layers)
    config = {
        "model_type": "qwen3_moe",
        "hidden_size": rng.randint(5, 40),
        "num_hidden_layers": n_layers,
        "num_attention_heads": kv_heads * rng.choice([1, 2, 3, 5]),
        "num_key_value_heads": kv_heads,
        "head_dim": 2 * rng.randint(1, 10),
        "vocab_size": rng.randint(20, 90),
        "intermediate_size": rng.randint(3, 30),
        "moe_intermediate_size": rng.randint(8, 30),
        "num_experts": n_experts,
        "num_experts_per_tok": rng.randint(1, n_experts),
        "mlp_only_layers": sorted(rng.sample(range(n_layers), n_layers - n_moe)),
        "norm_topk_prob": rng.random() < 0.7,
        "tie_word_embeddings": rng.random() < 0.5,
        "rope_theta": 1e4,
        "rms_norm_eps": 1e-6,
        "max_position_embeddings": 300,
        "eos_token_id": 0,
    }
    return config | fixed


def write_model(
    folder: Path,
    config: Mapping[str, Any],
    seed: int,
    lengths: Iterable[int],
    new_tokens: int | Iterable[int],
    options: Mapping[str, Any] | None = None,
) -> Model:
    """Write weights and prompts into a folder. The same arguments give the same model.

    Args:
        lengths: tokens of every prompt.
        new_tokens: of every sequence, or of all.
        options: that every job of the model has; the weights are stored in `model.dtype`, else in float32.
    """
    model = Model(folder / "weights.h5", folder / "inputs.h5", options or {}, f"weights seed {seed}")
    dtype = model.options.get("model.dtype", "float32")
    (folder / "config.json").write_text(json.dumps(config))
    # Wide enough that an expert's part of a row is as large as the rest of it: a wrong row shows.
    std = 1.2 / config["hidden_size"] ** 0.5
    init_weights(folder / "config.json", model.weights, seed=seed, dtype=dtype, gate_scale=2.0, std=std)
    rng = np.random.default_rng(seed)
    tokens = [rng.integers(1, config["vocab_size"], n).astype(np.int32) for n in lengths]
    write_prompts(model.inputs, tokens, new_tokens)
    return model


def write_prompts(path: Path, tokens: list[np.ndarray], new_tokens: int | Iterable[int]) -> None:
    """An inputs file of prompts [n] with their numbers of new tokens."""
    new = np.array([new_tokens] * len(tokens) if isinstance(new_tokens, int) else list(new_tokens), dtype=np.int32)
    write_inputs(path, Prompts([f"p{i}" for i in range(len(tokens))], tokens, None, new), {})


def model_config(config: Mapping[str, Any]) -> ModelConfig:
    """A config.json as the model sees it."""
    return config_from_hf(dict(config))


def write_begun(path: Path, inputs: Path, begun: Outputs, kept: list[int]) -> None:
    """Prompts that are those of `inputs` with the first `kept[i]` generated tokens behind them.

    Each has as many new tokens left as were generated after those.
    """
    prompts, tokens, left = read_inputs(inputs), [], []
    for row, (prompt, k) in enumerate(zip(prompts.tokens, kept, strict=True)):
        lo, hi = int(begun.offsets[row]), int(begun.offsets[row + 1])
        tokens.append(np.concatenate([prompt, begun.tokens[lo : lo + k]]).astype(np.int32))
        left.append(hi - lo - k)
    write_prompts(path, tokens, left)


def lengths_of(outputs: Outputs) -> list[int]:
    """New tokens of every sequence."""
    return np.diff(outputs.offsets).tolist()


def difference(expected: Outputs, path: Path, skip: list[int] | None = None) -> str:
    """What differs between completions and those in a file, to the last bit; "" where nothing does.

    Args:
        skip: leave out the first so many tokens of every expected sequence.
    """
    found = read_outputs(path)
    skip = skip or [0] * len(expected)
    if len(found) != len(expected):
        return f"{len(found)} sequences, expected {len(expected)}"
    for row, k in enumerate(skip):
        mine = slice(int(expected.offsets[row]) + k, int(expected.offsets[row + 1]))
        theirs = slice(int(found.offsets[row]), int(found.offsets[row + 1]))
        wanted, got = expected.tokens[mine], found.tokens[theirs]
        if not np.array_equal(wanted, got):
            return f"sequence {row}: tokens {got.tolist()}, expected {wanted.tolist()}"
        bits, their_bits = expected.logprobs[mine].view(np.int32), found.logprobs[theirs].view(np.int32)
        if not np.array_equal(bits, their_bits):
            at = int(np.argmax(bits != their_bits))
            return (
                f"sequence {row}: log-probability {at} is {found.logprobs[theirs][at]!r}, "
                f"expected {expected.logprobs[mine][at]!r}"
            )
        if found.finish_reason[row] != expected.finish_reason[row]:
            return f"sequence {row}: finish reason {found.finish_reason[row]}, expected {expected.finish_reason[row]}"
    return ""
