"""The oracle against `transformers`, and what tests that use it rely on."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from checkpoints import TINYMOE
from qwen import (
    CONFIGS,
    MOST_EXCLUDED,
    TOLERANCE,
    base_seed,
    comparable,
    load_transformers,
    make_model,
    pass_transformers,
    relative_difference,
)

from moempi.files.export_weights import export_checkpoint
from moempi.files.weights import open_weights
from moempi.model.reference import Reference


def reference(path: Path, dtype: torch.dtype = torch.float32) -> Reference:
    with open_weights(path) as weights:
        return Reference(weights, dtype)


def test_ten_random_models_against_transformers(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    base = base_seed()
    with capsys.disabled():
        print(f"\nseeds {base} to {base + CONFIGS - 1} (MOEMPI_TEST_SEED={base})")
    total, excluded = 0, 0
    for seed in range(base, base + CONFIGS):
        model = make_model(tmp_path / str(seed), seed)
        oracle, theirs = reference(model.weights), load_transformers(model.checkpoint)
        config = oracle.config
        for sequence in model.sequences:
            expected, gates = pass_transformers(theirs, sequence, config.moe_layers)
            found = oracle(torch.tensor(sequence))
            keep = comparable(gates, config.top_k, config.n_layers)
            assert relative_difference(found.logits[keep], expected[keep]) <= TOLERANCE, model
            for layer, gate in gates.items():
                assert relative_difference(found.gate_logits[layer][keep], gate[keep]) <= TOLERANCE, model
            total, excluded = total + len(sequence), excluded + int((~keep).sum())
    with capsys.disabled():
        print(f"{total} tokens, {excluded} excluded")
    assert excluded < MOST_EXCLUDED * total, f"MOEMPI_TEST_SEED={base}"


def test_tinymoe_against_transformers(tmp_path: Path) -> None:
    export_checkpoint(TINYMOE, tmp_path / "checkpoint")
    oracle, theirs = reference(TINYMOE), load_transformers(tmp_path / "checkpoint")
    with open_weights(TINYMOE) as weights:
        tokens = weights.tokenizer().encode("KING:\nWho brings me tidings?\n\ndef add(a, b):\n    return a + b\n").ids
    expected, gates = pass_transformers(theirs, tokens, oracle.config.moe_layers)
    assert comparable(gates, oracle.config.top_k, oracle.config.n_layers).all()
    assert relative_difference(oracle(torch.tensor(tokens)).logits, expected) <= TOLERANCE


def test_float32_is_close_to_float64(tmp_path: Path) -> None:
    model = make_model(tmp_path / "model", seed=4)
    for sequence in model.sequences:
        tokens = torch.tensor(sequence)
        exact = reference(model.weights, torch.float64)(tokens)
        single = reference(model.weights)(tokens, forced=exact.experts)
        assert exact.logits.dtype == torch.float64
        assert relative_difference(single.logits.double(), exact.logits) < 1e-5


def test_forced_routes_are_taken_with_the_gates_own_weights(tmp_path: Path) -> None:
    model = make_model(tmp_path / "model", seed=1)
    oracle, tokens = reference(model.weights), torch.tensor(model.sequences[0])
    c = oracle.config
    assert c.top_k < c.n_experts, "take another seed"
    free = oracle(tokens)
    assert torch.equal(oracle(tokens, forced=free.experts).logits, free.logits)
    worst = {layer: gate.topk(c.top_k, largest=False).indices for layer, gate in free.gate_logits.items()}
    forced = oracle(tokens, forced=worst)
    assert all(torch.equal(forced.experts[layer], worst[layer]) for layer in c.moe_layers)
    assert relative_difference(forced.logits, free.logits) > 100 * TOLERANCE
    # The first MoE layer has seen the same rows, so its gate says the same.
    assert torch.equal(forced.gate_logits[c.moe_layers[0]], free.gate_logits[c.moe_layers[0]])


def test_a_token_sees_none_that_follow(tmp_path: Path) -> None:
    model = make_model(tmp_path / "model", seed=2)
    oracle, tokens = reference(model.weights), torch.tensor(model.sequences[0])
    whole, half = oracle(tokens).logits, oracle(tokens[: len(tokens) // 2]).logits
    assert relative_difference(whole[: len(half)], half) < 1e-5


# ---------------------------------------------------------------- which tokens are compared

CLEAR, NEAR = [3.0, 2.0, 1.0], [3.0, 2.0, 2.0 - 5e-6]  # at K = 2
SAME_BEST = [3.0, 3.0, 1.0]  # both are taken


@pytest.mark.parametrize(
    ("gates", "top_k", "n_layers", "expected"),
    [
        ({0: [CLEAR, CLEAR], 1: [CLEAR, SAME_BEST]}, 2, 2, [True, True]),
        ({0: [CLEAR, NEAR, CLEAR], 1: [CLEAR] * 3}, 2, 2, [True, False, False]),  # later tokens attend in layer 1
        ({0: [CLEAR] * 3, 1: [CLEAR, NEAR, CLEAR]}, 2, 2, [True, False, True]),  # no layer follows
        ({1: [CLEAR, NEAR, CLEAR]}, 2, 3, [True, False, False]),  # a dense layer follows, which attends too
        ({0: [NEAR, NEAR]}, 3, 2, [True, True]),  # all experts are taken
        ({0: [CLEAR, NEAR]}, 1, 2, [True, True]),
        ({0: [SAME_BEST, CLEAR]}, 1, 2, [False, False]),
    ],
)
def test_near_ties_and_what_attends_to_them_drop_out(
    gates: dict[int, list[list[float]]], top_k: int, n_layers: int, expected: list[bool]
) -> None:
    logits = {layer: torch.tensor(rows) for layer, rows in gates.items()}
    assert comparable(logits, top_k, n_layers).tolist() == expected
