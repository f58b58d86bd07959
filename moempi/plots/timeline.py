"""What did every rank do, and when? A lane for each rank, over a window of time."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from moempi import analysis
from moempi.analysis.timeline import WAIT, Window, spans_in
from moempi.plots.picture import new_figure

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

MOST_LANES = 32
_HATCHES = ("", "", "xxxx", "////", "....", "")
_SHADES = "cividis_r"
_LEVELS = (0.95, 0.58, 0.45, 0.3, 0.15, 0.0)  # of the shades: neighbours in the legend differ in luminance


def timeline_figure(trace: analysis.Trace, window: Window) -> Figure:
    """What each rank worked on, and as a thin line below it whether one of its microbatches waited for answers.

    Raises:
        DataError: the trace has no spans.
    """
    lanes = min(trace.n_ranks, MOST_LANES)
    spans = {kind: rows[rows[:, 0] < lanes] for kind, rows in spans_in(trace, window).items()}
    figure, (axes,) = new_figure(10.0, 1.6 + 0.28 * max(lanes, 4))
    unit, name = (1e6, "ms") if window.end - window.begin < 5e9 else (1e9, "s")
    _draw_work(axes, {kind: rows for kind, rows in spans.items() if kind != WAIT}, window, unit)
    _draw_waits(axes, spans[WAIT], window, unit)
    axes.set(xlim=(0, (window.end - window.begin) / unit), ylim=(lanes - 0.4, -0.6), ylabel="rank")
    axes.set_yticks(range(lanes))
    axes.set_xlabel(f"{name} since {window.begin / 1e9:.3f} s after the job's start")
    of_all = f" (of {trace.n_ranks})" if lanes < trace.n_ranks else ""
    axes.set_title(f"What {lanes} ranks{of_all} did; white: polling, or waiting for a core", loc="left")
    figure.legend(loc="outside lower center", ncols=7, fontsize=8, frameon=False, handlelength=2.2, handleheight=1.2)
    return figure


def _draw_work(axes: Axes, spans: dict[str, np.ndarray], window: Window, unit: float) -> None:
    from matplotlib import colormaps
    from matplotlib.collections import PolyCollection

    for (kind, rows), hatch, level in zip(spans.items(), _HATCHES, _LEVELS, strict=True):
        colour = colormaps[_SHADES](level) if kind != "idle" else (0.9, 0.9, 0.9, 1.0)
        style: dict[str, Any] = {"facecolor": colour, "edgecolor": "black", "hatch": hatch}
        axes.add_collection(PolyCollection(list(_boxes(rows, window, unit)), linewidth=0.25, label=kind, **style))


def _boxes(rows: np.ndarray, window: Window, unit: float) -> np.ndarray:
    """Corners [n, 4, 2] of a bar for each span."""
    begin, end = (rows[:, 1] - window.begin) / unit, (rows[:, 2] - window.begin) / unit
    top, bottom = rows[:, 0] - 0.38, rows[:, 0] + 0.22
    corners = [(begin, top), (end, top), (end, bottom), (begin, bottom)]
    return np.stack([np.stack(corner, axis=1) for corner in corners], axis=1)


def _draw_waits(axes: Axes, rows: np.ndarray, window: Window, unit: float) -> None:
    begin, end = (rows[:, 1] - window.begin) / unit, (rows[:, 2] - window.begin) / unit
    axes.hlines(rows[:, 0] + 0.36, begin, end, colors="black", linewidth=1.0, label=WAIT)
