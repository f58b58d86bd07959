"""Causal attention whose bits are the same in prefill, in chunks, in decode and after a restart: what meets what.

Every new position goes through the pages of its sequence in order, counted from position 0, with an online softmax
(Milakov and Gimelshein, 2018), on its own: a position's arithmetic depends on its place alone. The device does it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from moempi.model.config import PAGE


class Span(NamedTuple):
    """New positions [begin, end) of one sequence, whose keys and values lie in `pages`."""

    begin: int
    end: int
    pages: Sequence[int]


class Planner(NamedTuple):
    """A device's plans of attention; the two belong together."""

    make: Callable[[Sequence[Span], int], Any]  # of a step's spans, and query heads per key-value head
    go_on: Callable[[Any, int], Any]  # of the next step of the same sequences, and how many they are; or None


@dataclass(frozen=True)
class AttentionPlan:
    """Which pages the T new positions of a batch of S sequences meet; the same for every layer. All int64."""

    positions: Tensor  # [T] position in its sequence
    write_pages: Tensor  # [T] page of each new position
    write_offsets: Tensor  # [T] place in the page
    lines: Tensor  # [T] line of `pages`
    pages: Tensor  # [S, most] pages of every sequence, as many as its positions fill; padding 0


def plan_attention(spans: Sequence[Span], group: int) -> AttentionPlan:
    """The plan for the new positions of several sequences.

    Args:
        spans: one per sequence, in the order of their rows in the batch.
        group: query heads per key-value head; here it does not matter.
    """
    begins, ends = (np.array(edge) for edge in list(zip(*spans, strict=True))[:2])
    lengths = ends - begins
    lines = np.repeat(np.arange(len(spans)), lengths)
    first = np.cumsum(lengths) - lengths
    positions = np.arange(len(lines)) + (begins - first)[lines]
    most = int(ends.max() - 1) // PAGE + 1
    # A sequence's later pages hold nothing yet, and a short one's line is padded: neither is read.
    pages = np.array([(*span.pages[:most], *[0] * (most - len(span.pages))) for span in spans])
    blocks, offsets = np.divmod(positions, PAGE)
    return AttentionPlan(
        positions=torch.from_numpy(positions),
        write_pages=torch.from_numpy(pages[lines, blocks]),
        write_offsets=torch.from_numpy(offsets),
        lines=torch.from_numpy(lines),
        pages=torch.from_numpy(pages),
    )


def next_plan(plan: AttentionPlan, n: int) -> AttentionPlan | None:
    """The plan for the next position of each of n sequences, out of that for one position each; n does not matter here.

    None where a position lies on a page that the plan does not know.
    """
    positions = plan.positions + 1
    blocks = positions // PAGE
    if int(blocks.max()) >= plan.pages.shape[1]:
        return None
    return replace(
        plan,
        positions=positions,
        write_pages=plan.pages[plan.lines, blocks],
        write_offsets=positions - PAGE * blocks,
    )


ON_CPU = Planner(plan_attention, next_plan)
