"""What a microbatch takes through the layers in one step: the next tokens of its sequences."""

from __future__ import annotations

from collections.abc import Callable
from collections.abc import Sequence as Many
from dataclasses import dataclass, field, replace
from functools import cached_property
from operator import is_not
from typing import Any

import numpy as np
import torch
from torch import Tensor

from moempi.model.attention import Span, plan_attention
from moempi.stages import DECODE, PREFILL, StepKey


@dataclass
class Sequence:
    """One prompt and what has been generated for it, at its home rank."""

    index: int  # row of the input file
    tokens: list[int]  # prompt, then generated tokens
    n_prompt: int
    max_new_tokens: int
    logprobs: list[float] = field(default_factory=list)  # of the generated tokens
    pages: list[int] = field(default_factory=list)
    cached: int = 0  # positions whose keys and values are in the cache

    @property
    def most_positions(self) -> int:
        """Positions that its keys and values can come to fill; the last token's are never needed."""
        return self.n_prompt + self.max_new_tokens - 1

    @property
    def remaining(self) -> int:
        """New tokens that it may still get."""
        return self.n_prompt + self.max_new_tokens - len(self.tokens)


@dataclass(frozen=True)
class Step:
    """T tokens of S sequences; the rows of a sequence are neighbours."""

    microbatch: int
    number: int
    sequences: tuple[Sequence, ...]
    chunks: tuple[int, ...]  # tokens of each sequence
    tokens: Tensor  # [T] int64
    owners: Tensor  # [T] int64, row of the input that each token belongs to
    plan: Any  # AttentionPlan, or TilePlan on a GPU
    last: Tensor  # rows whose next token is wanted
    choosing: tuple[Sequence, ...]  # the sequences of those rows

    @cached_property
    def n_tokens(self) -> int:
        """T."""
        return len(self.tokens)

    @cached_property
    def key(self) -> StepKey:
        """What the trace knows the step by. It is prefill if it holds a token whose next token is not asked for."""
        return self.microbatch, self.number, PREFILL if self.n_tokens > len(self.choosing) else DECODE


def chunk_sizes(uncached: Many[int], budget: int) -> list[int]:
    """Tokens that each sequence gets in a step: first all that need one only, then the others in order.

    Args:
        uncached: tokens of each sequence that are not in the cache yet, at least 1.
        budget: most tokens of a step; every sequence that needs a single token gets it nevertheless.
    """
    left = budget - uncached.count(1)
    chunks: list[int] = []
    for n in uncached:
        if n == 1:
            chunks.append(1)
            continue
        chunks.append(max(0, min(n, left)))
        left -= chunks[-1]
    if not any(chunks) and chunks:
        chunks[0] = 1
    return chunks


def compose(
    microbatch: int,
    number: int,
    sequences: Many[Sequence],
    budget: int,
    group: int,
    plan: Callable[[Many[Span], int], Any] = plan_attention,
) -> Step:
    """The next step of a microbatch's sequences, which are all unfinished; none of them may be empty of work.

    Args:
        plan: the device's plan of attention.
    """
    chunks = chunk_sizes([len(s.tokens) - s.cached for s in sequences], budget)
    taking = [(s, n) for s, n in zip(sequences, chunks, strict=True) if n]
    spans = [Span(s.cached, s.cached + n, s.pages) for s, n in taking]
    tokens = [token for s, n in taking for token in s.tokens[s.cached : s.cached + n]]
    choosing = [s.cached + n == len(s.tokens) for s, n in taking]
    lengths = [n for _, n in taking]
    return Step(
        microbatch=microbatch,
        number=number,
        sequences=tuple(s for s, _ in taking),
        chunks=tuple(lengths),
        tokens=torch.from_numpy(np.array(tokens, dtype=np.int64)),
        owners=torch.from_numpy(np.repeat([s.index for s, _ in taking], lengths)),
        plan=plan(spans, group),
        last=torch.from_numpy(np.cumsum(lengths)[choosing] - 1),
        choosing=tuple(s for (s, _), chosen in zip(taking, choosing, strict=True) if chosen),
    )


def go_on(last: Step, number: int, sequences: Many[Sequence], plan_next: Callable[[Any, int], Any]) -> Step | None:
    """What `compose` makes where the last step had one token of each of these sequences, and each has one more now.

    None where it is not so, or the plan has to be made anew.

    Args:
        plan_next: the device's plan of attention for the same sequences, one position on, or None.
    """
    n = len(sequences)
    if not n == last.n_tokens == len(last.choosing) or any(map(is_not, last.sequences, sequences)):
        return None
    plan = plan_next(last.plan, n)
    if plan is None:
        return None
    tokens = torch.from_numpy(np.array([sequence.tokens[-1] for sequence in sequences], dtype=np.int64))
    return replace(last, number=number, tokens=tokens, plan=plan)
