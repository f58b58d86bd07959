"""The parts of the model: what they compute, and that a row's bits depend on the row alone."""

from __future__ import annotations

import pytest
import torch
from heads import turn

from moempi.device.cpu import Cpu
from moempi.device.seam import ProductShape
from moempi.errors import DataError, MoempiError
from moempi.model.config import config_from_hf
from moempi.model.expert import Expert, leaf_range, tree_sum
from moempi.model.gate import choose_experts, greedy
from moempi.model.ops import Rotary, rms_norm, swiglu

COUNTS = (1, 2, 3, 5, 8, 17, 64, 129)


def random(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("width", [1, 7, 16, 33, 128, 1000])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_row_operations_see_only_their_row(width: int, dtype: torch.dtype, threads: int) -> None:
    torch.set_num_threads(threads)
    weight, row = random(width, seed=1), random(2 * width, seed=2).to(dtype)
    operations = {
        "norm": lambda x: rms_norm(x[:, :width], weight, 1e-6),
        "swiglu": swiglu,
        "softmax": lambda x: torch.softmax(x.float(), dim=-1),
        "log_softmax": lambda x: torch.log_softmax(x.float(), dim=-1),
    }
    for name, operation in operations.items():
        expected = operation(row.unsqueeze(0))[0]
        for n in COUNTS:
            for place in {0, n // 2, n - 1}:
                x = random(n, 2 * width, seed=n).to(dtype)
                x[place] = row
                assert torch.equal(operation(x)[place], expected), (name, n, place)
    torch.set_num_threads(1)


def test_norm_and_activation_against_float64() -> None:
    x, weight = random(5, 12), random(12, seed=1)
    wide = x.double()
    norm = wide / (wide.pow(2).mean(-1, keepdim=True) + 1e-6).sqrt() * weight.double()
    assert torch.allclose(rms_norm(x, weight, 1e-6).double(), norm, rtol=1e-6)
    gate, up = wide.chunk(2, dim=-1)
    assert torch.allclose(swiglu(x).double(), gate * torch.sigmoid(gate) * up, rtol=1e-5, atol=1e-7)


def test_rotation_keeps_lengths_and_depends_on_distance_only() -> None:
    rotary = Rotary(8, 100, 10000.0)
    query, key = random(1, 1, 8), random(1, 1, 8, seed=1)

    def product(at: int, other: int) -> float:
        turned = [turn(v, rotary, torch.tensor([p])) for v, p in ((query, at), (key, other))]
        return float((turned[0] * turned[1]).sum())

    assert torch.equal(turn(query, rotary, torch.tensor([0])), query)
    assert product(7, 3) == pytest.approx(product(50, 46), rel=1e-4)
    assert product(7, 3) != pytest.approx(product(7, 4), rel=1e-2)


def test_equal_scores_go_to_the_lowest_expert() -> None:
    route = choose_experts(torch.tensor([[1.0, 3.0, 3.0, 3.0, 0.0], [0.0, 0.0, 0.0, 0.0, 0.0]]), 2, True)
    assert route.experts.tolist() == [[1, 2], [0, 1]]
    assert route.weights.tolist() == [[0.5, 0.5], [0.5, 0.5]]


def test_weights_of_a_token_sum_to_one_only_where_asked() -> None:
    logits = random(6, 5)
    scores = torch.softmax(logits, dim=-1)
    plain, scaled = choose_experts(logits, 3, False), choose_experts(logits, 3, True)
    assert torch.equal(plain.weights, scores.gather(1, plain.experts))
    assert torch.allclose(scaled.weights.sum(-1), torch.ones(6))
    assert torch.equal(plain.experts, scaled.experts)


@pytest.mark.parametrize("hidden,leaves", [(16, 4), (7, 4), (9, 8), (5, 1)])
def test_leaves_cover_the_hidden_range_once(hidden: int, leaves: int) -> None:
    ranges = [leaf_range(leaf, leaves, hidden) for leaf in range(leaves)]
    assert [unit for lo, hi in ranges for unit in range(lo, hi)] == list(range(hidden))


def test_tree_sum_adds_pairs_of_pairs() -> None:
    shown = tree_sum_of_names({})
    assert shown == "((0+1)+(2+3))"
    assert tree_sum_of_names({(0, 2): "L"}) == "(L+(2+3))"


def tree_sum_of_names(known: dict[tuple[int, int], str]) -> str:
    class Name(str):
        def __add__(self, other: str) -> Name:
            return Name(f"({self:s}+{other:s})")

    def term(lo: int, hi: int) -> Name | None:
        return Name(known[lo, hi]) if (lo, hi) in known else Name(lo) if hi - lo == 1 else None

    return str(tree_sum(term, 0, 4))  # type: ignore[arg-type]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("hidden,leaves", [(12, 2), (13, 4), (8, 8)])
def test_pieces_of_an_expert_add_up_to_the_bits_of_the_whole(hidden: int, leaves: int, dtype: torch.dtype) -> None:
    device, d_model = Cpu(1), 10
    gate_up, down = random(2 * hidden, d_model).to(dtype), random(d_model, hidden, seed=1).to(dtype)
    x = random(9, d_model, seed=2).to(dtype)
    # Tiled where this processor has no packed products of the type.
    shapes = (2 * hidden, d_model), (d_model, hidden)
    device.choose_products(ProductShape(*shape, dtype, dtype) for shape in shapes)
    whole = Expert(device, gate_up, down, 0, leaves, leaves, hidden)(x)

    def piece(lo: int, hi: int) -> torch.Tensor:
        a, b = leaf_range(lo, leaves, hidden)[0], leaf_range(hi - 1, leaves, hidden)[1]
        rows = torch.cat([gate_up[a:b], gate_up[hidden + a : hidden + b]])
        return Expert(device, rows, down[:, a:b], lo, hi, leaves, hidden)(x)

    half = leaves // 2
    assert torch.equal((piece(0, half) + piece(half, leaves)).to(dtype), whole)
    parts = [piece(leaf, leaf + 1) for leaf in range(leaves)]
    total = tree_sum(lambda lo, hi: parts[lo] if hi - lo == 1 else None, 0, leaves)
    assert torch.equal(total.to(dtype), whole)


def test_an_expert_computes_swiglu() -> None:
    gate_up, down, x = random(12, 5), random(5, 6, seed=1), random(3, 5, seed=2)
    gate, up = (x.double() @ gate_up.double().T).chunk(2, dim=-1)
    expected = (gate * torch.sigmoid(gate) * up) @ down.double().T
    for leaves in (1, 2, 4):
        found = Expert(Cpu(1), gate_up, down, 0, leaves, leaves, 6)(x)
        assert torch.allclose(found.double(), expected, rtol=1e-4, atol=1e-5)


def test_greedy_takes_the_lowest_of_equals() -> None:
    tokens, logprobs = greedy(torch.tensor([[0.0, 2.0, 2.0], [5.0, 1.0, 5.0]]))
    assert tokens.tolist() == [1, 0]
    assert logprobs[0] == torch.log_softmax(torch.tensor([0.0, 2.0, 2.0]), 0)[1]


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_greedy_refuses_scores_that_are_no_numbers(bad: float) -> None:
    with pytest.raises(MoempiError, match="not finite"):
        greedy(torch.tensor([[0.0, bad, 1.0]]))


BASE = {
    "model_type": "qwen3_moe",
    "num_hidden_layers": 4,
    "hidden_size": 8,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "vocab_size": 11,
    "intermediate_size": 12,
    "moe_intermediate_size": 6,
    "num_experts": 5,
    "num_experts_per_tok": 2,
    "max_position_embeddings": 32,
}


def test_config_reads_both_spellings() -> None:
    four = config_from_hf({**BASE, "rope_theta": 5000.0})
    renamed = {key: value for key, value in BASE.items() if key != "num_experts"}
    five = config_from_hf({**renamed, "num_local_experts": 5, "rope_parameters": {"rope_theta": 5000.0}})
    assert four == five
    assert four.head_dim == 4 and four.rope_theta == 5000.0


def test_config_knows_its_dense_layers() -> None:
    assert config_from_hf({**BASE, "mlp_only_layers": [0, 2]}).dense_layers == (0, 2)
    assert config_from_hf({**BASE, "decoder_sparse_step": 2}).moe_layers == (1, 3)


@pytest.mark.parametrize(
    "change,said",
    [
        ({"num_experts_per_tok": 6}, "K = 6.*E = 5"),
        ({"num_hidden_layers": 10**9}, "num_hidden_layers"),
        ({"num_experts": None}, "num_experts or num_local_experts is missing"),
        ({"hidden_size": "8"}, "hidden_size = '8'"),
        ({"num_key_value_heads": 3}, "2 heads"),
        ({"hidden_act": "gelu"}, "hidden_act = 'gelu'"),
        ({"use_sliding_window": True}, "use_sliding_window"),
        ({"rope_scaling": {"type": "yarn"}}, "rope_type = 'yarn'"),
        ({"model_type": "mixtral"}, "model_type = 'mixtral'"),
        ({"head_dim": 5}, "head_dim = 5"),
    ],
)
def test_config_refuses_what_cannot_run(change: dict[str, object], said: str) -> None:
    with pytest.raises(DataError, match=said):
        config_from_hf({**BASE, **change})
