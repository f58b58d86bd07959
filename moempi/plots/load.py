"""How evenly are the experts used? Layers x experts."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from moempi import analysis
from moempi.errors import DataError
from moempi.plots.picture import MOST_LABELS, draw_matrix, label_ticks, new_figure

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure


def load_figure(trace: analysis.Trace) -> Figure:
    """Each expert's share of its layer's tokens as a shade; the busiest of a layer is framed.

    Raises:
        DataError: no token went through an expert.
    """
    ranked = analysis.busiest_per_layer(trace)
    if not ranked:
        raise DataError(f"{trace.path}: no token went through an expert: there is no load to plot")
    load = analysis.load_per_expert(trace)[[one.layer for one in ranked]].astype(np.float64)
    shares = 100 * load / load.sum(axis=1, keepdims=True)
    n_layers, n_experts = shares.shape
    width = min(14.0, max(6.0, 2.5 + 0.45 * min(n_experts, 2 * MOST_LABELS)))
    figure, (axes,) = new_figure(width, min(12.0, 1.6 + max(0.32 * min(n_layers, 32), 1.2)))
    draw_matrix(figure, axes, shares, lambda share: f"{share:.0f}", "% of the layer's tokens x K")
    if n_experts <= 4 * MOST_LABELS:
        _frame(axes, [one.expert for one in ranked])
    label_ticks(axes.yaxis, [str(one.layer) for one in ranked])
    label_ticks(axes.xaxis, [str(expert) for expert in range(n_experts)])
    axes.set(xlabel="expert", ylabel="layer")
    axes.set_title(
        f"Load per expert, even would be {100 / n_experts:.1f} %; framed: the busiest of a layer", loc="left"
    )
    return figure


def _frame(axes: Axes, columns: list[int]) -> None:
    from matplotlib.patches import Rectangle

    for row, column in enumerate(columns):
        axes.add_patch(Rectangle((column - 0.5, row - 0.5), 1, 1, fill=False, linewidth=1.4))
