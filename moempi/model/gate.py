"""The gate: which experts a token goes to, and with what weights."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from moempi.errors import MoempiError


@dataclass(frozen=True)
class Route:
    """The experts of T tokens in one layer."""

    experts: Tensor  # [T, K] int64, best first
    weights: Tensor  # [T, K] float32


def choose_experts(logits: Tensor, top_k: int, normalize: bool) -> Route:
    """Softmax over all experts, then the K best; equal scores go to the lowest index.

    Args:
        logits: [T, E] float32.
        normalize: scale the K weights of a token to sum to one.
    """
    scores, order = torch.softmax(logits, dim=-1).sort(dim=-1, descending=True, stable=True)
    weights = scores[:, :top_k]
    if normalize:
        # Added in the order of k: a reduction's own order may depend on the number of rows.
        total = weights[:, 0].clone()
        for k in range(1, top_k):
            total += weights[:, k]
        weights = weights / total.unsqueeze(1)
    return Route(order[:, :top_k], weights.contiguous())


def greedy(logits: Tensor) -> tuple[Tensor, Tensor]:
    """Best token [S] int64, lowest id among equals, and its log-probability [S] float32, of scores [S, vocab].

    Raises:
        MoempiError: a score is not a number.
    """
    best = logits.amax(-1, keepdim=True)
    if not bool(torch.isfinite(best).all()):
        raise MoempiError("the scores of the next token are not finite: the weights overflow in this dtype")
    ids = torch.arange(logits.shape[-1])
    tokens = torch.where(logits == best, ids, logits.shape[-1]).amin(-1)
    return tokens, torch.log_softmax(logits, dim=-1).gather(1, tokens.unsqueeze(1)).squeeze(1)
