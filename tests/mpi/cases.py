"""Random models and the layouts that they run in, all drawn from one seed."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from layouts import Cut, Layout
from models import Model, random_config, write_model

# Dealt to the models; with the reference each fits into sixteen ranks at once, or nearly.
SIZES = ((16, 2), (8, 4, 3), (8, 3, 2, 1), (8, 4, 2, 1))
REFERENCE = Layout(1, {"run.threads": 1, "run.microbatches": 1, "run.prefill_tokens": 512, "run.capacity": 8})

# What must not matter to the bits.
FREE: dict[str, list[Any]] = {
    "run.threads": [1, 2],
    "run.microbatches": [1, 2, 3, 4],
    "placement.strategy": ["linear", "balanced", "random"],
    "placement.seed": list(range(7)),
    "placement.replicas": ["auto", 0, "few", "many"],
    "exchange.route": ["direct", "leader", "rail"],
    "exchange.relay_budget": [2**26, 0],
    "exchange.lockstep": [False, False, False, True],
    "exchange.piece_bytes": [2**28, 2**28, 1, 600],
    "exchange.arrival_budget": [2**28, 0],
    "engine.slice": [0.002, 1e-6],
    "admission.homes": ["all", "all", 1, 3],
    "prefill": [(512, 8), (1, 1), (3, 2), (16, 8), (50, 3), (8, 5)],  # tokens of a step, sequences at a time
    "pieces": [2, 4, 2],  # of two experts, where the model has leaves for them
}


class Dealer:
    """Deals values so that none comes twice before all have come once: one launch tries each of them often."""

    def __init__(self, rng: random.Random) -> None:
        self._rng = rng
        self._decks: dict[str, list[Any]] = {}

    def deal(self, name: str, values: Sequence[Any]) -> Any:
        """The next value of the deck `name`."""
        deck = self._decks.setdefault(name, [])
        if not deck:
            deck.extend(self._rng.sample(list(values), len(values)))
        return deck.pop()

    def layout(self, ranks: int, config: dict[str, Any], leaves: int) -> Layout:
        """A layout on so many ranks."""
        options = {name: self.deal(name, values) for name, values in FREE.items()}
        options["exchange.ranks_per_node"] = self._nodes(ranks)
        options["run.prefill_tokens"], options["run.capacity"] = options.pop("prefill")
        pieces = options.pop("pieces")
        cuts = self._cuts(config, pieces) if pieces <= min(leaves, ranks) else ()
        most = config["num_experts"] * (ranks - 1)
        extra = {"few": min(most, 2), "many": min(most, 2 * ranks)}
        wanted = 0 if cuts else options["placement.replicas"]  # so that there are ranks for the pieces
        options["placement.replicas"] = extra.get(wanted, wanted)
        return Layout(ranks, options, cuts)

    def _nodes(self, ranks: int) -> list[int]:
        """Nodes of any sizes."""
        sizes = []
        while (left := ranks - sum(sizes)) > 0:
            sizes.append(self._rng.randint(1, left))
        return sizes

    def _cuts(self, config: dict[str, Any], pieces: int) -> tuple[Cut, ...]:
        layers = sorted(set(range(config["num_hidden_layers"])) - set(config["mlp_only_layers"]))
        experts = self._rng.sample(range(config["num_experts"]), min(2, config["num_experts"]))
        return tuple((self._rng.choice(layers), expert, pieces) for expert in experts)


@dataclass(frozen=True)
class Case:
    """A random model and its layouts."""

    config: dict[str, Any]
    seed: int
    options: dict[str, Any]  # that every job of the model has
    lengths: list[int]  # of the prompts
    new_tokens: list[int]
    layouts: list[Layout]
    continued: Layout  # for completions that go on where others were stopped

    def write(self, folder: Path) -> None:
        """Weights and prompts."""
        write_model(folder, self.config, self.seed, self.lengths, self.new_tokens, self.options)

    def model(self, folder: Path) -> Model:
        """The model that `write` has written."""
        return Model(folder / "weights.h5", folder / "inputs.h5", self.options, str(self))

    def __str__(self) -> str:
        c = self.config
        return (
            f"E={c['num_experts']} K={c['num_experts_per_tok']} layers={c['num_hidden_layers']} d={c['hidden_size']} "
            f"heads={c['num_attention_heads']}/{c['num_key_value_heads']}x{c['head_dim']} "
            f"{self.options['model.dtype']} leaves={self.options['model.leaves']} (weights {self.seed})"
        )


def draw_cases(seed: int, n: int) -> list[Case]:
    """`n` random models, with E = 1, 2, ... n."""
    rng = random.Random(seed)
    dealer = Dealer(rng)
    return [_draw_case(rng, dealer, experts) for experts in range(1, n + 1)]


def _draw_case(rng: random.Random, dealer: Dealer, experts: int) -> Case:
    config = random_config(rng, experts)
    leaves = dealer.deal("leaves", [1, 2, 4, 8])
    # Around the pages of 64 positions, and one token alone.
    lengths = [1, rng.randint(2, 40), 64, rng.randint(65, 90)]
    return Case(
        config=config,
        seed=rng.randrange(2**31),
        options={"model.dtype": dealer.deal("dtype", ["float32", "bfloat16"]), "model.leaves": leaves},
        lengths=lengths,
        new_tokens=[rng.randint(2, 5) for _ in lengths],
        layouts=[dealer.layout(size, config, leaves) for size in dealer.deal("sizes", SIZES)],
        continued=dealer.layout(dealer.deal("continued", [1, 2, 3, 4, 8]), config, leaves),
    )
