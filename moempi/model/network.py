"""What every home rank holds of a model: embedding, attention, norms, gates, dense layers and head."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

from moempi.device.seam import Device, ProductShape
from moempi.model.config import ModelConfig
from moempi.model.expert import leaf_range
from moempi.model.gate import Route
from moempi.model.ops import Rotary

Read = Callable[[str], Tensor]  # a tensor of the weights file by name, in its stored dtype


class Layer:
    """The shared part of one layer, stage by stage; rows in, rows out.

    Args:
        read: gives this layer's tensors by name, in the run's dtype.
        dense: the layer has a feed-forward network of its own instead of a gate.
    """

    def __init__(self, number: int, config: ModelConfig, device: Device, read: Read, *, dense: bool):
        self.number, self.config, self.dense, self.device = number, config, dense, device
        self.qkv = device.linear(torch.cat([read("q"), read("k"), read("v")]))
        self.output = device.linear(read("o"))
        norms = [read("q_norm").expand(config.n_heads, -1), read("k_norm").expand(config.n_kv_heads, -1)]
        self.head_norm = device.place(torch.cat(norms).float())  # [heads + kv_heads, head_dim]
        self.attention_norm = device.place(read("attention_norm").float())
        self.mlp_norm = device.place(read("mlp_norm").float())
        if dense:
            self.gate_up, self.down = device.linear(read("mlp_gate_up")), device.linear(read("mlp_down"))
        else:
            self.gate = device.linear(read("gate"), torch.float32)

    def project_rows(self, x: Tensor) -> Tensor:
        """x [R, D] -> queries, keys and values [R, (heads + 2 kv_heads) * head_dim], not normalised or rotated yet."""
        return self.qkv(self.normed(x, self.attention_norm))

    def close_attention(self, x: Tensor, mixed: Tensor) -> Tensor:
        """Residual x [R, D] plus the output projection of mixed values [R, heads * head_dim]."""
        return self.output(mixed, x)

    def dense_mlp(self, x: Tensor) -> Tensor:
        """Residual x [R, D] plus the dense feed-forward network."""
        return self.down(self.device.swiglu(self.gate_up(self.normed(x, self.mlp_norm))), x)

    def route(self, hidden: Tensor) -> Route:
        """The experts of normalised rows [R, D]."""
        return self.device.choose_experts(self.gate(hidden), self.config.top_k, self.config.normalize_gate)

    def normed(self, x: Tensor, weight: Tensor) -> Tensor:
        """RMS norm of x [R, D]."""
        return self.device.normed(x, weight, self.config.norm_eps)


class Network:
    """The shared weights of all layers, with embedding and head.

    Args:
        read: gives any tensor of the weights file by name ("embedding", "layers/3/q") in its stored dtype.
        dtype: that the run computes in.
    """

    def __init__(self, config: ModelConfig, device: Device, read: Read, dtype: torch.dtype):
        self.config, self.dtype, self.device = config, dtype, device
        self.embedding = device.place(read("embedding").to(dtype))
        self.norm = device.place(read("norm").float())
        self.head = device.linear(self.embedding if config.tied_embeddings else read("head").to(dtype))
        self.rotary = Rotary(config.head_dim, config.max_positions, config.rope_theta, device.place)
        self._read = read
        self.layers = [
            Layer(n, config, device, partial(self._of_layer, n), dense=n in config.dense_layers)
            for n in range(config.n_layers)
        ]

    def _of_layer(self, layer: int, name: str) -> Tensor:
        return self._read(f"layers/{layer}/{name}").to(self.dtype)

    def embed(self, tokens: Tensor) -> Tensor:
        """Tokens [T] int64 -> rows [T, D]."""
        return self.embedding[tokens]

    def logits(self, x: Tensor) -> Tensor:
        """Rows [R, D] -> next-token scores [R, vocab] float32."""
        return self.head(self.device.normed(x, self.norm, self.config.norm_eps)).float()


def product_shapes(config: ModelConfig, dtype: torch.dtype, leaves: int) -> list[ProductShape]:
    """Of every product in the model, for the self-test of the device."""
    c, d = config, config.d_model
    found = [
        ((c.n_heads + 2 * c.n_kv_heads) * c.head_dim, d, dtype),
        (d, c.n_heads * c.head_dim, dtype),
        (c.vocab, d, dtype),
    ]
    if c.dense_layers:
        found += [(2 * c.dense_hidden, d, dtype), (d, c.dense_hidden, dtype)]
    shapes = [ProductShape(*one, one[-1]) for one in found]
    if c.moe_layers:
        shapes.append(ProductShape(c.n_experts, d, dtype, torch.float32))
        widths = {b - a for a, b in (leaf_range(leaf, leaves, c.expert_hidden) for leaf in range(leaves))}
        outward = dtype if leaves == 1 else torch.float32
        for w in widths:
            shapes += [ProductShape(2 * w, d, dtype, dtype), ProductShape(d, w, outward, outward)]
    return shapes
