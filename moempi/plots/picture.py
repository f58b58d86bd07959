"""What all pictures share: an empty one, its style, and writing it to a file."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from moempi.errors import JobError

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

FORMATS = (".png", ".svg", ".pdf")
SHADES = "Blues"  # darker is more; luminance falls evenly, so that it survives a grey printer
MOST_LABELS = 16  # cells of a row that get their number written in
_STYLE: Any = {
    "font.size": 9,
    "axes.titlesize": 10,
    "svg.fonttype": "none",
    "hatch.linewidth": 0.6,
    "svg.hashsalt": "moempi",
}


def check_target(path: Path) -> None:
    """Refuse what cannot be written, before anything is read.

    Raises:
        JobError: matplotlib is not there, or the ending is none of `FORMATS`.
    """
    if path.suffix.lower() not in FORMATS:
        raise JobError(f"--out {path}: a picture ends in {', '.join(FORMATS)}; found {path.suffix or 'no ending'!r}")
    if find_spec("matplotlib") is None:
        raise JobError("pictures need matplotlib, which is not installed: pip install 'moempi[plot]'")


def new_figure(width: float, height: float, panels: int = 1) -> tuple[Figure, list[Axes]]:
    """An empty picture of so many inches, with panels side by side; no window is opened."""
    import matplotlib
    from matplotlib.figure import Figure

    matplotlib.rcParams.update(_STYLE)
    figure = Figure(figsize=(width, height), layout="constrained")
    axes = figure.subplots(1, panels, squeeze=False)
    return figure, list(axes[0])


def draw_matrix(figure: Figure, axes: Axes, values: np.ndarray, text: Any, bar_label: str) -> None:
    """A matrix as shades with a scale beside it, and with its numbers where they fit.

    Args:
        values: float [rows, columns]; nan is hatched.
        text: gives the text of a cell from its value.
        bar_label: what the shades mean, with the unit.
    """
    from matplotlib import colormaps

    top = float(np.nanmax(values, initial=0.0)) or 1.0
    shades = colormaps[SHADES]
    image = axes.imshow(np.ma.masked_invalid(values), cmap=shades, vmin=0.0, vmax=top, aspect="auto")
    figure.colorbar(image, ax=axes, label=bar_label, shrink=0.9, pad=0.02)
    axes.tick_params(length=0)
    axes.patch.set(hatch="////", edgecolor="0.75")
    if max(values.shape) > MOST_LABELS:
        return
    for (row, column), value in np.ndenumerate(values):
        if np.isfinite(value) and value > 0:
            colour = "white" if value > 0.65 * top else "black"
            axes.text(column, row, text(value), ha="center", va="center", color=colour, fontsize=7)


def label_ticks(axis: Any, names: list[str]) -> None:
    """Name the rows or columns of a matrix, every second, fourth, ... where all of them would not fit."""
    step = 1
    while len(names) / step > 2 * MOST_LABELS:
        step *= 2
    axis.set_ticks(range(0, len(names), step), names[::step])


def save(figure: Figure, path: Path) -> None:
    """Write a picture; the ending of its name says how.

    Raises:
        JobError: the place cannot be written.
    """
    # The same trace gives the same bytes: no date inside.
    metadata = {"png": {}, "svg": {"Date": None}, "pdf": {"CreationDate": None}}[path.suffix.lower()[1:]]
    try:
        figure.savefig(path, dpi=150, metadata=metadata)
    except OSError as error:
        raise JobError(f"--out {path}: cannot be written: {error.strerror}") from None
