"""What a batch's attention on the GPU is divided into, and what a steady step is padded to. On the host."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property

import numpy as np
import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor

from moempi.batch import Step
from moempi.model.attention import AttentionPlan, Span, plan_attention
from moempi.model.config import PAGE
from moempi.planning.gpu_memory import ROUND, STEADY

TILE = 16  # query rows; the least that a product on the GPU takes
WIDE_TILE = 64  # of a chunk in bfloat16: as many rows read a page at once
COLUMNS = 32  # to a multiple of which the pages of the longest sequence are padded in a steady step


@dataclass(frozen=True)
class TilePlan(AttentionPlan):
    """Which rows meet which pages, for the T new positions of a batch; the same for every layer.

    A *query row* is a (position, head of the group) pair of one sequence, as in `moempi.model.attention`. The kernels
    read what `tensors` gives them; `lines` stay on the host.
    """

    tiles: Tensor  # [A, 4] int32: first query row, rows, pages, line of `pages`
    row_positions: Tensor  # [A, rows of a tile] int32; -1 for padding
    group: int  # query heads per key-value head
    n_steady: int = 0  # sequences of a steady step, with padding behind their new positions; 0 of any other step

    @property
    def steady(self) -> bool:
        """Whether there is one new position of every sequence, and padding behind them: shapes that come again."""
        return self.n_steady > 0

    @cached_property
    def following(self) -> TilePlan | None:
        """The plan of the step of the same sequences that follows, as `next_plan` makes it; made once."""
        return next_plan(self)

    def tensors(self) -> dict[str, Tensor]:
        """What kernels read, by name."""
        return {name: getattr(self, name) for name in _READ}


_READ = "positions", "write_pages", "write_offsets", "pages", "tiles", "row_positions"


def for_kernels(step: Step) -> dict[str, Tensor]:
    """What a step with a TilePlan tells the kernels, in the order in which it lies in memory.

    What recordings read comes first: where it lies depends on nothing that is not padded.
    """
    plan, n = step.plan, step.n_tokens
    turns = F.pad(step.owners + plan.positions[:n], (0, len(plan.positions) - n), value=-1)
    return {**plan.tensors(), "turns": turns, "tokens": step.tokens, "last": step.last}


def plan_step(spans: Sequence[Span], group: int, spare: int, wide: int = TILE) -> TilePlan:
    """The plan of a step. With one new position of each of a few sequences it is padded to one of few shapes.

    Args:
        spans: as of `plan_tiles`.
        spare: page that padding writes to and reads.
        wide: rows of a tile where a sequence has more of them than fit `TILE`.
    """
    n, most = len(spans), max(span.end - span.begin for span in spans)
    if n > STEADY or most > 1:
        return plan_tiles(spans, group, wide if most * group > TILE else TILE)
    plan = plan_tiles([*spans, *[Span(0, 1, (spare,))] * (-n % ROUND)], group)
    columns = plan.pages.shape[1]
    return replace(plan, pages=F.pad(plan.pages, (0, -columns % COLUMNS)), n_steady=n)


def next_plan(plan: TilePlan) -> TilePlan | None:
    """The plan of the step that follows a steady one of the same sequences, as `plan_step` would make it.

    None where one is not steady, or a position lies on a page that the plan does not know.
    """
    if not plan.steady:
        return None
    n = plan.n_steady
    # Arrays: so small, they take half of the time that tensors do, once a step for all layers.
    tiles, rows, lines, pages = (t.numpy() for t in (plan.tiles, plan.row_positions, plan.lines, plan.pages))
    mine = tiles[:, 3:] < n  # tiles that are not of padding
    rows = rows + ((rows >= 0) & mine)
    n_pages = rows.max(1) // PAGE + 1
    if n_pages.max() > tiles[:, 2].max():
        return None
    tiles = tiles.copy()
    tiles[:, 2] = n_pages
    positions = plan.positions.numpy() + (lines < n)
    blocks = positions // PAGE
    fresh = {
        "positions": positions,
        "write_pages": pages[lines, blocks],
        "write_offsets": positions - PAGE * blocks,
        "tiles": tiles,
        "row_positions": rows,
    }
    return replace(plan, **{name: torch.from_numpy(array) for name, array in fresh.items()})  # type: ignore[arg-type]


def plan_tiles(spans: Sequence[Span], group: int, size: int = TILE) -> TilePlan:
    """Tiles and pages for the new positions of several sequences.

    Args:
        spans: one per sequence, in the order of their rows in the batch.
        group: query heads per key-value head.
        size: rows of a tile, at most.
    """
    plan = plan_attention(spans, group)
    begins, ends = np.array([(span.begin, span.end) for span in spans]).T
    n_rows = (ends - begins) * group
    n_tiles = -(-n_rows // size)
    owner = np.repeat(np.arange(len(spans)), n_tiles)
    tile = np.arange(len(owner)) - (n_tiles.cumsum() - n_tiles)[owner]  # of its sequence
    rows = tile[:, None] * size + np.arange(size)
    row_positions = np.where(rows < n_rows[owner, None], begins[owner, None] + rows // group, -1)
    n_pages = row_positions.max(1) // PAGE + 1
    first = (n_rows.cumsum() - n_rows)[owner] + tile * size
    tiles = np.array([first, np.minimum(size, n_rows[owner] - tile * size), n_pages, owner], dtype=np.int32).T
    return TilePlan(
        **vars(plan),
        tiles=torch.from_numpy(np.ascontiguousarray(tiles)),
        row_positions=torch.from_numpy(row_positions.astype(np.int32)),
        group=group,
    )
