"""What went from which rank to which? A matrix for each kind of message."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from moempi import analysis
from moempi.errors import DataError
from moempi.plots.picture import MOST_LABELS, draw_matrix, label_ticks, new_figure

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_UNITS = ((1e9, "GB"), (1e6, "MB"), (1e3, "kB"), (1.0, "bytes"))


def traffic_figure(trace: analysis.Trace) -> Figure:
    """Bytes from every rank to every other one; what stayed on its rank took no message and is hatched.

    Raises:
        DataError: nothing went from one rank to another.
    """
    matrices = {kind: _between_ranks(trace, kind) for kind in analysis.KINDS}
    matrices = {kind: matrix for kind, matrix in matrices.items() if np.nansum(matrix) > 0}
    if not matrices:
        raise DataError(
            f"{trace.path}: nothing went from one rank to another ({trace.n_ranks} ranks): there is no traffic to plot"
        )
    top = max(float(np.nanmax(matrix)) for matrix in matrices.values())
    scale, unit = _unit(top)
    side = max(3.6, 1.2 + 0.38 * min(trace.n_ranks, MOST_LABELS))
    figure, panels = new_figure((side + 1.0) * len(matrices), side + 0.4, len(matrices))
    names = [str(rank) for rank in range(trace.n_ranks)]
    for axes, (kind, matrix) in zip(panels, matrices.items(), strict=True):
        draw_matrix(figure, axes, matrix / scale, _short, unit)
        label_ticks(axes.xaxis, names)
        label_ticks(axes.yaxis, names)
        axes.set(xlabel="to rank", ylabel="from rank")
        whole, of_whole = _unit(np.nansum(matrix))
        axes.set_title(f"{kind}: {np.nansum(matrix) / whole:.3g} {of_whole} between ranks", loc="left")
    return figure


def _unit(size: float) -> tuple[float, str]:
    return next((scale, unit) for scale, unit in _UNITS if size >= scale)


def _between_ranks(trace: analysis.Trace, kind: str) -> np.ndarray:
    matrix = analysis.traffic_matrix(trace, kind, "bytes").astype(np.float64)
    np.fill_diagonal(matrix, np.nan)
    return matrix


def _short(value: float) -> str:
    """At most three digits and a point, so that sixteen cells of a row hold their numbers."""
    return f"{value:.0f}" if value >= 10 else f"{value:.1f}" if value >= 1 else f"{value:.2f}".removeprefix("0")
