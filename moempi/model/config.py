"""The model's shape, read from a Hugging Face `config.json` of transformers 4 or 5."""

from __future__ import annotations

from dataclasses import dataclass
from math import inf
from typing import Any

from moempi.errors import DataError

PAGE = 64  # positions of a page of the KV cache, which is also a block of keys in attention
MOST = 10_000  # layers, or experts of a layer: a damaged file may claim anything
SMALL = 2**17  # weights of a product that fits a core's cache


def padded_head(head_dim: int) -> int:
    """Head dimension as it is stored: a multiple of 16, so that products of every model keep their bits."""
    return -(-head_dim // 16) * 16


def is_small(outputs: int, inputs: int) -> bool:
    """Whether a weight [O, I] fits a core's cache. Its shape alone decides who multiplies, never the rows."""
    return outputs * inputs <= SMALL


def is_small_expert(hidden: int, d_model: int) -> bool:
    """Whether an expert, or a leaf of one, of so many hidden units is small as a whole."""
    return is_small(2 * hidden, d_model)


@dataclass(frozen=True)
class ModelConfig:
    """The shape of a Qwen3-MoE model; the letters are those of docs/glossary.md."""

    n_layers: int
    d_model: int  # D
    n_heads: int
    n_kv_heads: int
    head_dim: int
    vocab: int
    dense_hidden: int  # hidden size of a dense layer
    expert_hidden: int  # F
    n_experts: int  # E
    top_k: int  # K
    dense_layers: tuple[int, ...]  # the layers without experts
    normalize_gate: bool  # the K gate weights of a token are scaled to sum to one
    rope_theta: float
    norm_eps: float
    tied_embeddings: bool
    max_positions: int
    eos_tokens: tuple[int, ...]

    @property
    def moe_layers(self) -> tuple[int, ...]:
        """The layers with experts, ascending."""
        return tuple(layer for layer in range(self.n_layers) if layer not in self.dense_layers)


def config_from_hf(raw: dict[str, Any], where: str = "config.json") -> ModelConfig:
    """Translate a `config.json`; both spellings of transformers 4 and 5 are read.

    Raises:
        DataError: for a key that is missing or a feature that the model code here does not have.
    """
    get = _Reader(raw, where)
    _refuse_what_is_missing_here(raw, where)
    n_layers = get.positive("num_hidden_layers", most=MOST)
    n_experts = get.positive("num_experts", "num_local_experts", most=MOST)
    top_k = get.positive("num_experts_per_tok")
    if top_k > n_experts:
        raise DataError(f"{where}: num_experts_per_tok is K = {top_k}, but there are only E = {n_experts} experts")
    n_heads = get.positive("num_attention_heads")
    n_kv_heads = get.positive("num_key_value_heads", default=n_heads)
    if n_heads % n_kv_heads:
        raise DataError(f"{where}: {n_heads} heads cannot share {n_kv_heads} key-value heads evenly")
    d_model = get.positive("hidden_size")
    head_dim = get.positive("head_dim", default=d_model // n_heads)
    if head_dim % 2:
        raise DataError(f"{where}: head_dim = {head_dim}; rotary embedding needs an even number")
    rope = raw.get("rope_parameters") or raw.get("rope_scaling") or {}
    return ModelConfig(
        n_layers=n_layers,
        d_model=d_model,
        n_heads=n_heads,
        n_kv_heads=n_kv_heads,
        head_dim=head_dim,
        vocab=get.positive("vocab_size"),
        dense_hidden=get.positive("intermediate_size"),
        expert_hidden=get.positive("moe_intermediate_size"),
        n_experts=n_experts,
        top_k=top_k,
        dense_layers=_dense_layers(raw, n_layers),
        normalize_gate=bool(raw.get("norm_topk_prob", False)),
        rope_theta=_Reader({**raw, **rope}, where).number("rope_theta", default=10000.0),
        norm_eps=get.number("rms_norm_eps", default=1e-6),
        tied_embeddings=bool(raw.get("tie_word_embeddings", False)),
        max_positions=get.positive("max_position_embeddings"),
        eos_tokens=eos_tokens(raw),
    )


def eos_tokens(raw: dict[str, Any]) -> tuple[int, ...]:
    """The end-of-sequence tokens that a config.json or generation_config.json names: none, one or several."""
    eos = raw.get("eos_token_id")
    if eos is None:
        return ()
    return tuple(int(token) for token in eos) if isinstance(eos, list) else (int(eos),)


@dataclass(frozen=True)
class _Reader:
    raw: dict[str, Any]
    where: str

    def positive(self, *names: str, default: int | None = None, most: int = 2**31 - 1) -> int:
        for name in names:
            value = self.raw.get(name)
            if value is not None:
                if not isinstance(value, int) or isinstance(value, bool) or not 1 <= value <= most:
                    raise DataError(f"{self.where}: {name} = {value!r}; expected a whole number from 1 to {most}")
                return value
        if default is None:
            raise DataError(f"{self.where}: {' or '.join(names)} is missing")
        return default

    def number(self, name: str, default: float) -> float:
        value = self.raw.get(name, default)
        if not isinstance(value, int | float) or isinstance(value, bool) or not 0 < value < inf:
            raise DataError(f"{self.where}: {name} = {value!r}; expected a number above 0")
        return float(value)


def _dense_layers(raw: dict[str, Any], n_layers: int) -> tuple[int, ...]:
    step = int(raw.get("decoder_sparse_step", 1))
    named = set(raw.get("mlp_only_layers") or [])
    return tuple(layer for layer in range(n_layers) if layer in named or (layer + 1) % step)


def _refuse_what_is_missing_here(raw: dict[str, Any], where: str) -> None:
    rope = raw.get("rope_parameters") or raw.get("rope_scaling") or {}
    expected = {
        "model_type": (raw.get("model_type"), "qwen3_moe"),
        "hidden_act": (raw.get("hidden_act", "silu"), "silu"),
        "attention_bias": (bool(raw.get("attention_bias", False)), False),
        "use_sliding_window": (bool(raw.get("use_sliding_window", False)), False),
        "rope_type": (rope.get("rope_type", rope.get("type", "default")), "default"),
    }
    for name, (found, wanted) in expected.items():
        if found != wanted:
            raise DataError(f"{where}: {name} = {found!r}; only {wanted!r} is supported")
