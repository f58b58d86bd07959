"""What a batch's attention on the GPU is divided into, and what a steady step is padded to. On the host."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor

from moempi.batch import Step
from moempi.model.attention import AttentionPlan, Span, plan_attention
from moempi.model.config import PAGE
from moempi.planning.gpu_memory import ROUND, STEADY

TILE = 16  # query rows; the least that a product on the GPU takes
COLUMNS = 8  # to a multiple of which the pages of the longest sequence are padded in a steady step


@dataclass(frozen=True)
class TilePlan(AttentionPlan):
    """Which rows meet which pages, for the T new positions of a batch; the same for every layer.

    A *query row* is a (position, head of the group) pair of one sequence, as in `moempi.model.attention`. The kernels
    read what `tensors` gives them; `lines` stay on the host.
    """

    tiles: Tensor  # [A, 4] int32: first query row, rows, pages, line of `pages`
    row_positions: Tensor  # [A, TILE] int32; -1 for padding
    group: int  # query heads per key-value head
    steady: bool = False  # one new position of every sequence, and padding behind them: shapes that come again

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


def plan_step(spans: Sequence[Span], group: int, spare: int) -> TilePlan:
    """The plan of a step. With one new position of each of a few sequences it is padded to one of few shapes.

    Args:
        spans: as of `plan_tiles`.
        spare: page that padding writes to and reads.
    """
    n = len(spans)
    if n > STEADY or any(span.end - span.begin != 1 for span in spans):
        return plan_tiles(spans, group)
    plan = plan_tiles([*spans, *[Span(0, 1, (spare,))] * (-n % ROUND)], group)
    columns = plan.pages.shape[1]
    return replace(plan, pages=F.pad(plan.pages, (0, -columns % COLUMNS)), steady=True)


def plan_tiles(spans: Sequence[Span], group: int) -> TilePlan:
    """Tiles and pages for the new positions of several sequences.

    Args:
        spans: one per sequence, in the order of their rows in the batch.
        group: query heads per key-value head.
    """
    plan = plan_attention(spans, group)
    begins, ends = np.array([(span.begin, span.end) for span in spans]).T
    n_rows = (ends - begins) * group
    n_tiles = -(-n_rows // TILE)
    owner = np.repeat(np.arange(len(spans)), n_tiles)
    tile = np.arange(len(owner)) - (n_tiles.cumsum() - n_tiles)[owner]  # of its sequence
    rows = tile[:, None] * TILE + np.arange(TILE)
    row_positions = np.where(rows < n_rows[owner, None], begins[owner, None] + rows // group, -1)
    n_pages = row_positions.max(1) // PAGE + 1
    first = (n_rows.cumsum() - n_rows)[owner] + tile * TILE
    tiles = np.array([first, np.minimum(TILE, n_rows[owner] - tile * TILE), n_pages, owner], dtype=np.int32).T
    return TilePlan(
        **vars(plan),
        tiles=torch.from_numpy(np.ascontiguousarray(tiles)),
        row_positions=torch.from_numpy(row_positions.astype(np.int32)),
        group=group,
    )
