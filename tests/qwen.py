"""Random Qwen3-MoE models, in our format and in that of `transformers`, and what both are compared by."""

from __future__ import annotations

import json
import os
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file, save_file

from moempi.files.export_weights import export_checkpoint
from moempi.files.import_weights import import_checkpoint
from moempi.files.init_weights import init_weights
from moempi.model.config import PAGE

CONFIGS = 10  # random models per run
TOLERANCE = 1e-4  # of the largest logit
NEAR_TIE = 1e-5  # between the gate's logits at places K and K + 1: rounding decides which expert is taken
MOST_EXCLUDED = 0.1  # of all tokens: a near tie is rare, but spoils what follows it, up to 107 of some 1250

Logits = dict[int, torch.Tensor]  # {MoE layer: [T, E]}


def base_seed() -> int:
    """A new seed every run; MOEMPI_TEST_SEED repeats one that a failure printed."""
    return int(os.environ.get("MOEMPI_TEST_SEED") or int.from_bytes(os.urandom(3), "little"))


# ---------------------------------------------------------------- random models


@dataclass(frozen=True)
class Model:
    """One random model, in both formats, and token sequences for it."""

    seed: int
    config: dict
    weights: Path  # of moempi
    checkpoint: Path  # a folder, of transformers
    sequences: list[list[int]]

    def __str__(self) -> str:
        return f"seed {self.seed}: {json.dumps(self.config)}"


def make_model(folder: Path, seed: int, gate_scale: float = 20.0) -> Model:
    """A random model and sequences, all a function of the seed.

    Gates are wide, so that near ties are rare. Most sequences are short: a near tie spoils all that follow it.
    """
    random = np.random.default_rng(seed)
    config = random_config(random)
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(config))
    init_weights(folder / "config.json", folder / "ones.h5", seed, "float32", gate_scale)
    export_checkpoint(folder / "ones.h5", folder / "checkpoint")
    _make_telling(folder / "checkpoint" / "model.safetensors", seed)
    import_checkpoint(folder / "checkpoint", folder / "weights.h5")
    # One sequence is longer than a block of keys.
    lengths = [int(random.integers(PAGE + 1, PAGE + 40)), *random.integers(1, 25, size=32)]
    sequences = [random.integers(config["vocab_size"], size=n).tolist() for n in lengths]
    return Model(seed, config, folder / "weights.h5", folder / "checkpoint", sequences)


def random_config(random: np.random.Generator) -> dict:
    """A small config.json with odd sizes, in one of the spellings of transformers 4 and 5."""
    n_layers = int(random.integers(2, 5))
    n_experts = int(random.integers(1, 21))
    n_kv_heads = int(random.integers(1, 4))
    theta = float(random.choice([10000.0, 500000.0]))
    newer = bool(random.integers(2))
    dense = [] if n_layers == 2 else random.choice(n_layers, size=random.integers(2), replace=False).tolist()
    return {
        "architectures": ["Qwen3MoeForCausalLM"],
        "model_type": "qwen3_moe",
        "num_hidden_layers": n_layers,
        "hidden_size": int(random.integers(33, 97)),
        "num_attention_heads": n_kv_heads * int(random.integers(1, 4)),
        "num_key_value_heads": n_kv_heads,
        "head_dim": 2 * int(random.integers(4, 20)),
        "vocab_size": int(random.integers(50, 300)),
        "intermediate_size": int(random.integers(20, 90)),
        "moe_intermediate_size": int(random.integers(7, 60)),
        "num_local_experts" if newer else "num_experts": n_experts,
        "num_experts_per_tok": int(random.integers(1, n_experts + 1)),
        "norm_topk_prob": bool(random.integers(2)),
        "decoder_sparse_step": int(random.integers(1, 3)),
        "mlp_only_layers": [layer for layer in dense if layer != 1],  # layer 1 has experts, whatever the step
        "rms_norm_eps": float(random.choice([1e-6, 1e-5])),
        "max_position_embeddings": 256,
        "tie_word_embeddings": bool(random.integers(2)),
        "hidden_act": "silu",
        "eos_token_id": None,
        **({"rope_parameters": {"rope_theta": theta, "rope_type": "default"}} if newer else {"rope_theta": theta}),
    }


def _make_telling(path: Path, seed: int) -> None:
    """Draw norms from 0.5 to 1.5, so that a forgotten one shows; make an expert's share of a row large, too."""
    tensors = load_file(path)
    generator = torch.Generator().manual_seed(seed)
    for name, tensor in tensors.items():
        if tensor.ndim == 1:
            tensors[name] = 0.5 + torch.rand(tensor.shape, generator=generator)
        elif name.endswith("down_proj.weight"):
            tensors[name] = 20 * tensor
    save_file(tensors, path, metadata={"format": "pt"})


# ---------------------------------------------------------------- the other side


def load_transformers(checkpoint: Path) -> torch.nn.Module:
    """The model as `transformers` has it, float32; its other ways to compute experts refuse odd sizes."""
    from transformers import Qwen3MoeForCausalLM
    from transformers.utils import logging

    logging.disable_progress_bar()
    options = {"dtype": torch.float32, "experts_implementation": "eager", "local_files_only": True}
    return Qwen3MoeForCausalLM.from_pretrained(checkpoint, **options).eval()


@torch.inference_mode()
def pass_transformers(model: torch.nn.Module, tokens: list[int], moe_layers: tuple[int, ...]) -> tuple:
    """Logits [T, V] and gate logits of one sequence, batch 1 and unpadded."""
    found = model(torch.tensor([tokens]), output_router_logits=True, use_cache=False)
    gates = [gate.reshape(len(tokens), -1) for gate in found.router_logits]
    return found.logits[0], dict(zip(moe_layers, gates, strict=True))


# ---------------------------------------------------------------- comparing


def comparable(gate_logits: Logits, top_k: int, n_layers: int) -> torch.Tensor:
    """Which of T tokens are compared, bool [T]: those whose routes rounding cannot change.

    A token drops out where its K-th and next gate logit nearly tie in some layer; so do the tokens that attend to
    it in a later layer, which are all that follow it, but where that was the model's last layer.
    """
    n_tokens = len(next(iter(gate_logits.values())))
    tied, spoilt = torch.zeros(n_tokens, dtype=torch.bool), torch.zeros(n_tokens, dtype=torch.bool)
    for layer, logits in gate_logits.items():
        if logits.shape[1] > top_k:
            best = logits.sort(-1, descending=True).values
            near = best[:, top_k - 1] - best[:, top_k] < NEAR_TIE
            tied |= near
            if layer < n_layers - 1:
                spoilt |= near.cumsum(0) > 0
    return ~(tied | spoilt)


def relative_difference(found: torch.Tensor, expected: torch.Tensor) -> float:
    """Largest |difference| of two tables of logits as a share of the largest |logit|; 0 where they are empty."""
    if found.shape != expected.shape:
        raise AssertionError(f"shapes differ: {list(found.shape)} and {list(expected.shape)}")
    if not expected.numel():
        return 0.0
    difference = ((found - expected).abs().max() / expected.abs().max()).item()
    return difference if difference == difference else float("inf")
