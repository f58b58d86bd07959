"""Small random checkpoints for the tests of weights files."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from safetensors.torch import save_file

from moempi.model.huggingface import dataset_shapes, parse_config, pieces

TINYMOE = Path(__file__).parents[2] / "inputs" / "tinymoe.h5"

# Odd sizes on purpose; layer 0 is dense. D = 10, H = 14, F = 6, E = 5, V = 23.
CONFIG = {
    "model_type": "qwen3_moe",
    "num_hidden_layers": 3,
    "hidden_size": 10,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 6,
    "vocab_size": 23,
    "intermediate_size": 14,
    "moe_intermediate_size": 6,
    "num_experts": 5,
    "num_experts_per_tok": 2,
    "mlp_only_layers": [0],
    "max_position_embeddings": 64,
    "tie_word_embeddings": False,
    "eos_token_id": 3,
}
LAYER1 = "model.layers.1.mlp.experts."

Tensors = dict[str, torch.Tensor]


def make_checkpoint(folder: Path, tensors: Tensors, config: dict | None = None) -> Path:
    """A checkpoint folder with these tensors and three small files; merges.txt is no text."""
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config or CONFIG, indent=1))
    (folder / "generation_config.json").write_text('{"eos_token_id": [7, 9]}')
    (folder / "merges.txt").write_bytes(b"\x00\xff not text")
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    return folder


def random_tensors(dtype: torch.dtype = torch.float32, fused: bool = False, config: dict | None = None) -> Tensors:
    """Every tensor that the config asks for, by its name in a checkpoint; the same ones at every call."""
    generator = torch.Generator().manual_seed(1)
    shapes = dataset_shapes(parse_config(json.dumps(config or CONFIG), "config"))
    return {
        piece.tensor: torch.randn(piece.shape, generator=generator).to(dtype)
        for name, shape in shapes.items()
        for piece in pieces(name, shape, fused)
    }


def assert_same_bits(found: Tensors, expected: Tensors) -> None:
    """Same names, dtypes, shapes and bits (NaN and -0.0 included)."""
    assert sorted(found) == sorted(expected)
    for name, tensor in expected.items():
        assert found[name].dtype == tensor.dtype and found[name].shape == tensor.shape, name
        assert torch.equal(found[name].view(torch.uint8), tensor.view(torch.uint8)), name


def cut(path: Path) -> None:
    """Take the last bytes of a file away."""
    path.write_bytes(path.read_bytes()[:-5])
