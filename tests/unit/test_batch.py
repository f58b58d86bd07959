"""What a step takes, and who gets which sequence, by hand."""

from __future__ import annotations

from functools import partial
from typing import Any

import pytest
import torch

from moempi.batch import Sequence, Step, chunk_sizes, compose, go_on
from moempi.device.tile_plan import plan_step
from moempi.errors import JobError
from moempi.model.attention import next_plan, plan_attention
from moempi.router.admission import first_deal, home_ranks, largest_first


@pytest.mark.parametrize(
    "uncached,budget,expected",
    [
        ([1, 1, 1], 2, [1, 1, 1]),  # decode always goes on
        ([10, 1, 7], 12, [10, 1, 1]),
        ([10, 1, 7], 6, [5, 1, 0]),
        ([4, 4], 8, [4, 4]),
        ([9, 9], 4, [4, 0]),
        ([5, 1], 1, [0, 1]),
        ([5], 0, [1]),
        ([], 5, []),
    ],
)
def test_chunks_of_a_step(uncached: list[int], budget: int, expected: list[int]) -> None:
    assert chunk_sizes(uncached, budget) == expected


def test_only_whole_prefills_choose_a_token() -> None:
    half = Sequence(index=7, tokens=[1, 2, 3, 4], n_prompt=4, max_new_tokens=5, pages=[3])
    decode = Sequence(index=2, tokens=[9, 8, 5], n_prompt=2, max_new_tokens=5, logprobs=[-1.0], pages=[0], cached=2)
    step = compose(0, 1, [half, decode], budget=4, group=1)
    assert step.tokens.tolist() == [1, 2, 3, 5]
    assert step.owners.tolist() == [7, 7, 7, 2]
    assert step.plan.positions.tolist() == [0, 1, 2, 2]
    assert step.last.tolist() == [3] and step.choosing == (decode,)
    assert step.plan.write_pages.tolist() == [3, 3, 3, 0]
    half.cached = 3
    assert compose(0, 2, [half], budget=4, group=1).choosing == (half,)


def same(found: Step, expected: Step) -> bool:
    """Of two steps, with their plans."""
    tensors = [(vars(one), vars(one.plan)) for one in (found, expected)]
    pairs = [(a[name], b[name]) for a, b in zip(*tensors, strict=True) for name in b if name not in ("plan", "key")]
    return all(torch.equal(a, b) if isinstance(a, torch.Tensor) else a == b for a, b in pairs)


@pytest.mark.parametrize(
    "plan,then", [(plan_attention, next_plan), (partial(plan_step, spare=99), lambda plan, _: plan.following)]
)
def test_a_step_goes_on_with_the_last_one(plan: Any, then: Any) -> None:
    """As long as its sequences are the same, of which each had one token, and known pages are enough."""
    made = [Sequence(i, [1] * n, n, 200, pages=[i, 10 + i, 20 + i], cached=n - 1) for i, n in enumerate((3, 60, 9))]
    last, went_on = compose(0, 1, made, 512, 2, plan), []
    for number in range(2, 80):
        for sequence in made:
            sequence.cached += 1
            sequence.tokens.append(number)
        step = go_on(last, number, made, then)
        expected = compose(0, number, made, 512, 2, plan)
        went_on.append(step is not None)
        assert step is None or (same(step, expected) and step.key == expected.key)
        last = step or expected
    anew = [number for number, one in enumerate(went_on, start=2) if not one]
    assert anew == [6, 70], "where the longest comes to a new page"
    assert go_on(last, 80, made[:2], then) is None
    assert go_on(last, 80, [*made[:2], Sequence(7, [1], 1, 5, pages=[9])], then) is None
    longer = Sequence(7, [1, 2, 3], 3, 5, pages=[9])
    assert go_on(compose(0, 1, [longer], 512, 2, plan), 2, [longer], then) is None, "it had more than one token"


def test_what_remains_of_a_sequence() -> None:
    sequence = Sequence(index=0, tokens=[1, 2, 3], n_prompt=2, max_new_tokens=4)
    assert sequence.remaining == 3 and sequence.most_positions == 5


def test_largest_first_and_ties_in_input_order() -> None:
    assert largest_first({0: 5, 1: 9, 2: 5, 4: 9}) == [1, 4, 0, 2]


def test_the_first_deal_evens_out_work_and_keeps_to_capacity() -> None:
    work = {0: 9, 1: 6, 2: 5, 3: 4, 4: 1}
    deal = first_deal(largest_first(work), work, homes=[0, 1], capacity=2)
    assert deal == [(0, 0), (1, 1), (1, 2), (0, 3)]


def test_fewer_sequences_than_homes() -> None:
    assert first_deal([3], {3: 1}, homes=[0, 1, 2], capacity=8) == [(0, 3)]
    assert first_deal([], {}, homes=[0, 1], capacity=8) == []


def test_homes() -> None:
    assert home_ranks("balanced", "all", 3) == [0, 1, 2]
    assert home_ranks("balanced", 5, 3) == [0, 1, 2]
    assert home_ranks("balanced", 3, 8) == [0, 2, 5]
    assert home_ranks("balanced", 1, 8) == [0]
    assert home_ranks("rank0", "all", 3) == [0]
    with pytest.raises(JobError, match=r"one home, rank 0, and admission\.homes = 2: leave homes out"):
        home_ranks("rank0", 2, 3)
