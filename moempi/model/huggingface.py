"""Which tensor of a Qwen3-MoE checkpoint lies where in a weights file: names and shapes, nothing else.

A checkpoint of the Hugging Face format has one tensor per projection of an expert, or all experts of a layer
in one ("fused"). A weights file has the same numbers in fewer datasets; every tensor is one box of a dataset.
Letters: D model dimension, H dense hidden, F expert hidden, E experts, V vocabulary.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any

from moempi.errors import DataError
from moempi.model.config import ModelConfig, config_from_hf, eos_tokens

Shape = tuple[int, ...]

EXPERT_DATASETS = ("experts_gate_up", "experts_down")

# Last part of a dataset's name -> the checkpoint's name inside the layer, for datasets that hold one tensor.
_ONE_TENSOR = {
    "attention_norm": "input_layernorm.weight",
    "q": "self_attn.q_proj.weight",
    "k": "self_attn.k_proj.weight",
    "v": "self_attn.v_proj.weight",
    "o": "self_attn.o_proj.weight",
    "q_norm": "self_attn.q_norm.weight",
    "k_norm": "self_attn.k_norm.weight",
    "mlp_norm": "post_attention_layernorm.weight",
    "mlp_down": "mlp.down_proj.weight",
    "gate": "mlp.gate.weight",
}
_OUTSIDE_LAYERS = {
    "embedding": "model.embed_tokens.weight",
    "norm": "model.norm.weight",
    "head": "lm_head.weight",
}
_FUSED = {"experts_gate_up": "mlp.experts.gate_up_proj", "experts_down": "mlp.experts.down_proj"}

LONG_NAMES = {
    "embedding": "token embedding [V, D]",
    "norm": "weight of the last RMS norm [D]",
    "head": "output projection to the vocabulary [V, D]",
    "attention_norm": "weight of the RMS norm before attention [D]",
    "q": "query projection [heads * head_dim, D]",
    "k": "key projection [kv_heads * head_dim, D]",
    "v": "value projection [kv_heads * head_dim, D]",
    "o": "output projection of attention [D, heads * head_dim]",
    "q_norm": "weight of the RMS norm of every query head [head_dim]",
    "k_norm": "weight of the RMS norm of every key head [head_dim]",
    "mlp_norm": "weight of the RMS norm before the experts or the dense layer [D]",
    "mlp_gate_up": "dense layer: H gate rows, then H up rows [2H, D]",
    "mlp_down": "dense layer: down projection [D, H]",
    "gate": "gate: one row of scores per expert [E, D]",
    "experts_gate_up": "experts: F gate rows, then F up rows of each [E, 2F, D]",
    "experts_down": "experts: down projection of each [E, D, F]",
}


@dataclass(frozen=True)
class Piece:
    """A tensor of the checkpoint and its place in a dataset; it fills whole trailing dimensions there."""

    tensor: str
    shape: Shape  # the tensor's; dimensions that only the dataset has count 1
    start: Shape  # of its first element, in the dataset


def dataset_shapes(config: ModelConfig) -> dict[str, Shape]:
    """Every dataset below /model, like "embedding" or "layers/3/q", with its shape."""
    d, v = config.d_model, config.vocab
    shapes: dict[str, Shape] = {"embedding": (v, d), "norm": (d,)}
    if not config.tied_embeddings:
        shapes["head"] = (v, d)
    dense = frozenset(config.dense_layers)
    for layer in range(config.n_layers):
        rows = _attention_shapes(config) | (_dense_shapes(config) if layer in dense else _moe_shapes(config))
        shapes |= {f"layers/{layer}/{name}": shape for name, shape in rows.items()}
    return shapes


def _attention_shapes(config: ModelConfig) -> dict[str, Shape]:
    d, queries, keys = config.d_model, config.n_heads * config.head_dim, config.n_kv_heads * config.head_dim
    return {
        "attention_norm": (d,),
        "q": (queries, d),
        "k": (keys, d),
        "v": (keys, d),
        "o": (d, queries),
        "q_norm": (config.head_dim,),
        "k_norm": (config.head_dim,),
        "mlp_norm": (d,),
    }


def _dense_shapes(config: ModelConfig) -> dict[str, Shape]:
    return {"mlp_gate_up": (2 * config.dense_hidden, config.d_model), "mlp_down": (config.d_model, config.dense_hidden)}


def _moe_shapes(config: ModelConfig) -> dict[str, Shape]:
    d, f, e = config.d_model, config.expert_hidden, config.n_experts
    return {"gate": (e, d), "experts_gate_up": (e, 2 * f, d), "experts_down": (e, d, f)}


def fused_name(dataset: str) -> str | None:
    """The one tensor that holds all experts of `dataset` in a fused checkpoint; None for other datasets."""
    prefix, last = _split(dataset)
    return prefix + _FUSED[last] if last in _FUSED else None


def pieces(dataset: str, shape: Shape, fused: bool = False) -> list[Piece]:
    """The checkpoint's tensors that fill a dataset of this shape, in the order of its bytes."""
    prefix, last = _split(dataset)
    if last in _OUTSIDE_LAYERS:
        return [_whole(_OUTSIDE_LAYERS[last], shape)]
    if last in _ONE_TENSOR:
        return [_whole(prefix + _ONE_TENSOR[last], shape)]
    if last == "mlp_gate_up":
        return _gate_then_up(f"{prefix}mlp.", (), shape)
    if fused:
        return [_whole(prefix + _FUSED[last], shape)]
    if last == "experts_gate_up":
        return [p for e in range(shape[0]) for p in _gate_then_up(f"{prefix}mlp.experts.{e}.", (e,), shape[1:])]
    return [Piece(f"{prefix}mlp.experts.{e}.down_proj.weight", shape[1:], (e, 0, 0)) for e in range(shape[0])]


def _gate_then_up(prefix: str, expert: Shape, shape: Shape) -> list[Piece]:
    rows, d = shape
    half = (rows // 2, d)
    return [
        Piece(f"{prefix}gate_proj.weight", half, (*expert, 0, 0)),
        Piece(f"{prefix}up_proj.weight", half, (*expert, rows // 2, 0)),
    ]


def _whole(tensor: str, shape: Shape) -> Piece:
    return Piece(tensor, shape, (0,) * len(shape))


def _split(dataset: str) -> tuple[str, str]:
    head, _, last = dataset.rpartition("/")
    return (f"model.{head.replace('/', '.')}." if head else ""), last


def count_parameters(config: ModelConfig) -> tuple[int, int]:
    """(all parameters, those that one token uses: everything but the experts that it is not sent to)."""
    total = active = 0
    for name, shape in dataset_shapes(config).items():
        size = 1
        for length in shape:
            size *= length
        total += size
        active += size * config.top_k // config.n_experts if name.endswith(EXPERT_DATASETS) else size
    return total, active


def json_object(text: str | bytes, where: str) -> dict[str, Any]:
    """The JSON object in `text`.

    Raises:
        DataError: naming `where`, if there is none.
    """
    try:
        # UTF-8 and nothing else: json would guess another encoding from bytes.
        value = json.loads(text.decode() if isinstance(text, bytes) else text)
    except (ValueError, RecursionError) as error:
        raise DataError(f"{where}: not valid JSON: {error}") from None
    if not isinstance(value, dict):
        raise DataError(f"{where}: holds a JSON {type(value).__name__}; expected an object")
    return value


def parse_config(text: str | bytes, where: str) -> ModelConfig:
    """The model's shape from the text of a config.json.

    Raises:
        DataError: naming `where` and the key that is missing, has a wrong value or is not supported.
    """
    raw = json_object(text, where)
    try:
        return config_from_hf(raw, where)
    except (TypeError, ValueError, AttributeError, ArithmeticError) as error:
        raise DataError(f"{where}: a key has a value of another type than expected: {error}") from None


def parse_generation_config(text: str | bytes, where: str) -> tuple[int, ...] | None:
    """The end-of-sequence tokens that a generation_config.json names; None where it leaves them to the config.

    Raises:
        DataError: naming `where` and what was found.
    """
    raw = json_object(text, where)
    if raw.get("eos_token_id") is None:
        return None
    try:
        return eos_tokens(raw)
    except (TypeError, ValueError, OverflowError):
        found = raw["eos_token_id"]
        raise DataError(f"{where}: eos_token_id = {found!r}; expected a token or a list of them") from None
