"""The oracle: the model as a textbook writes it, dense, in one process, a whole sequence at a time.

It shares nothing with the code that a run computes with but the weights file and the model's shape: no pages, no
tiles, no packed products, no messages. Where both say the same, the same is meant. Slow, and made for tests.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Protocol

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor

from moempi.model.config import ModelConfig


class Weights(Protocol):
    """An open weights file, as far as it is needed here."""

    config: ModelConfig
    shapes: Mapping[str, tuple[int, ...]]

    def tensor(self, name: str) -> Tensor:
        """A tensor of `shapes` by name ("embedding", "layers/3/q"), in its stored dtype."""


@dataclass(frozen=True)
class Pass:
    """What one sequence of T tokens comes to."""

    logits: Tensor  # [T, V] scores of the token that follows each position
    gate_logits: dict[int, Tensor]  # {MoE layer: [T, E]}
    experts: dict[int, Tensor]  # {MoE layer: [T, K] int64}, best first; the forced ones where routes were forced


class Reference:
    """The whole model in memory, in one dtype.

    Args:
        weights: every tensor of it is read.
        dtype: that everything is computed in; float64 says what float32 should have come to.
    """

    def __init__(self, weights: Weights, dtype: torch.dtype = torch.float32):
        self.config, self.dtype = weights.config, dtype
        self._tensors = {name: weights.tensor(name).to(dtype) for name in weights.shapes}

    @torch.inference_mode()
    def __call__(self, tokens: Tensor, forced: Mapping[int, Tensor] | None = None) -> Pass:
        """One forward pass over a sequence from its first token on.

        Args:
            tokens: [T] int64.
            forced: {MoE layer: [T, K]} experts to take in place of the gate's; their weights are still the gate's.
        """
        gate_logits: dict[int, Tensor] = {}
        experts: dict[int, Tensor] = {}
        x = self._tensors["embedding"][tokens]  # [T, D]
        for layer in range(self.config.n_layers):
            x = x + self._attention(layer, self._norm(x, f"layers/{layer}/attention_norm"))
            hidden = self._norm(x, f"layers/{layer}/mlp_norm")
            if layer in self.config.dense_layers:
                x = x + self._dense(layer, hidden)
                continue
            gate_logits[layer] = F.linear(hidden, self._of(layer, "gate"))
            chosen = gate_logits[layer].topk(self.config.top_k, dim=-1).indices
            experts[layer] = chosen if forced is None else forced[layer]
            x = x + self._mixture(layer, hidden, gate_logits[layer], experts[layer])
        head = self._tensors["embedding" if self.config.tied_embeddings else "head"]
        return Pass(F.linear(self._norm(x, "norm"), head), gate_logits, experts)

    def _of(self, layer: int, name: str) -> Tensor:
        return self._tensors[f"layers/{layer}/{name}"]

    def _norm(self, x: Tensor, name: str) -> Tensor:
        return F.rms_norm(x, x.shape[-1:], self._tensors[name], self.config.norm_eps)

    def _attention(self, layer: int, x: Tensor) -> Tensor:
        """Full causal attention of normalised rows [T, D]."""
        c, n = self.config, len(x)
        queries = F.linear(x, self._of(layer, "q")).view(n, c.n_heads, c.head_dim)
        keys = F.linear(x, self._of(layer, "k")).view(n, c.n_kv_heads, c.head_dim)
        values = F.linear(x, self._of(layer, "v")).view(n, c.n_kv_heads, c.head_dim)
        queries = self._rotated(self._norm(queries, f"layers/{layer}/q_norm"))
        keys = self._rotated(self._norm(keys, f"layers/{layer}/k_norm"))
        group = c.n_heads // c.n_kv_heads
        keys, values = (each.repeat_interleave(group, dim=1) for each in (keys, values))  # [T, heads, head_dim]
        scores = torch.einsum("qhd,khd->hqk", queries, keys) / c.head_dim**0.5
        future = torch.ones(n, n, dtype=torch.bool).triu(1)
        weights = scores.masked_fill(future, -torch.inf).softmax(-1)
        mixed = torch.einsum("hqk,khd->qhd", weights, values).reshape(n, -1)
        return F.linear(mixed, self._of(layer, "o"))

    def _rotated(self, x: Tensor) -> Tensor:
        """Rotary embedding of x [T, heads, head_dim]: component i turns together with i + head_dim / 2."""
        half = x.shape[-1] // 2
        frequencies = self.config.rope_theta ** (-torch.arange(half, dtype=torch.float64) / half)
        angles = torch.arange(len(x), dtype=torch.float64).outer(frequencies).unsqueeze(1)  # [T, 1, half]
        cos, sin = angles.cos().to(self.dtype), angles.sin().to(self.dtype)
        low, high = x[..., :half], x[..., half:]
        return torch.cat([low * cos - high * sin, high * cos + low * sin], dim=-1)

    def _dense(self, layer: int, x: Tensor) -> Tensor:
        gate, up = F.linear(x, self._of(layer, "mlp_gate_up")).chunk(2, dim=-1)
        return F.linear(F.silu(gate) * up, self._of(layer, "mlp_down"))

    def _mixture(self, layer: int, x: Tensor, gate_logits: Tensor, experts: Tensor) -> Tensor:
        """The weighted outputs of the experts [T, K] of normalised rows [T, D], one expert after the other."""
        weights = gate_logits.softmax(-1).gather(-1, experts)  # [T, K]
        if self.config.normalize_gate:
            weights = weights / weights.sum(-1, keepdim=True)
        output = torch.zeros_like(x)
        for expert in range(self.config.n_experts):
            rows, k = torch.nonzero(experts == expert, as_tuple=True)
            gate, up = F.linear(x[rows], self._of(layer, "experts_gate_up")[expert]).chunk(2, dim=-1)
            answer = F.linear(F.silu(gate) * up, self._of(layer, "experts_down")[expert])
            output.index_add_(0, rows, answer * weights[rows, k].unsqueeze(1))
        return output
