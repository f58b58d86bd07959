"""What `moempi bench layer` measures, and what its times come to. No MPI, no torch."""

from __future__ import annotations

from dataclasses import dataclass
from statistics import median
from typing import Any

from moempi.errors import JobError
from moempi.model.config import ModelConfig


@dataclass(frozen=True)
class Stack:
    """MoE layers one after the other, without attention.

    Args:
        skew: exponent of how often experts are chosen: the e-th busiest as often as 1 / e ** skew; 0: all alike.
        gpu_aware: as `exchange.gpu_aware`; on GPUs only.
    """

    layers: int
    d_model: int
    hidden: int
    experts: int
    top_k: int
    microbatches: int
    dtype: str = "bfloat16"
    mode: str = "exact"
    skew: float = 0.0
    gpu_aware: str = "auto"

    def check(self, device: str) -> None:
        """Refuse what cannot be measured.

        Raises:
            JobError: naming the option.
        """
        if self.top_k > self.experts:
            raise JobError(f"--top-k {self.top_k}: there are only {self.experts} experts (--experts)")
        if self.mode == "fast" and device == "cpu":
            raise JobError("--mode fast: on the CPU it is what relays do; products are exact there. Use --mode exact")

    def config(self) -> ModelConfig:
        """A model of these layers; what lies between them is as small as can be."""
        return ModelConfig(
            n_layers=self.layers,
            d_model=self.d_model,
            n_heads=1,
            n_kv_heads=1,
            head_dim=2,
            vocab=1,
            dense_hidden=1,
            expert_hidden=self.hidden,
            n_experts=self.experts,
            top_k=self.top_k,
            dense_layers=(),
            normalize_gate=True,
            rope_theta=1e4,
            norm_eps=1e-6,
            tied_embeddings=True,
            max_positions=1,
            eos_tokens=(),
        )


def sum_up(stack: Stack, n_ranks: int, tokens: int, times: dict[str, list[float]]) -> dict[str, Any]:
    """One line of the results.

    Args:
        tokens: of a microbatch.
        times: s per layer and microbatch of every round, the slowest rank's, by what was done.

    Returns:
        Medians in ms; the share of the rate of the experts alone that the stack keeps (`of_<name>` for all that is
        not the stack itself); and what it comes to in tokens/s through a layer, and TFLOP/s of every rank.
    """
    middle = {name: median(rounds) for name, rounds in times.items()}
    flops = 6 * stack.d_model * stack.hidden * tokens * stack.top_k  # of a rank's tokens, wherever they are computed
    return {
        "tokens": tokens,
        "ms": {name: 1e3 * seconds for name, seconds in middle.items()},
        **{f"of_{name}": seconds / middle["stack"] for name, seconds in middle.items() if name != "stack"},
        "tokens_per_second": n_ranks * tokens / middle["stack"],
        "tflops_per_rank": flops / middle["stack"] / 1e12,
        "rounds": {name: [1e3 * seconds for seconds in rounds] for name, rounds in times.items()},
    }
