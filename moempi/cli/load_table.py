"""The load of every expert, layer by layer, as a table for a terminal of 80 characters."""

from __future__ import annotations

from typing import Any

from rich.box import SIMPLE_HEAD
from rich.table import Table
from rich.text import Text

MOST_COLUMNS = 16  # experts that get a column each
MOST_MARKS = 40  # of a bar
MARKS = " .:-=+*#%@"


def plain_table(title: str, *columns: str) -> Table:
    """A table without frames, so that sixteen narrow columns fit a terminal of 80 characters."""
    # A title may be longer than its table is wide: it stays in its line.
    heading = Text(title, style="bold", no_wrap=True, overflow="ignore")
    table = Table(title=heading, title_justify="left", title_style="", box=SIMPLE_HEAD)
    table.show_edge, table.pad_edge, table.padding = False, False, (0, 0, 0, 1)
    for column in columns:
        table.add_column(column, justify="right")
    return table


def load_table(rows: list[dict[str, Any]], n_experts: int) -> Table:
    """Share of each layer's tokens that its experts got, and how far the busiest stands out.

    Args:
        rows: `load` of `moempi.analysis.summarize`, a layer each.
    """
    few = n_experts <= MOST_COLUMNS
    experts = [str(expert) for expert in range(n_experts)] if few else [_bar_heading(n_experts)]
    table = plain_table(_title(rows, n_experts), "layer", *experts, "busiest", "share", "max over mean")
    table.padding = 0
    for row in rows:
        load = row["tokens_per_expert"]
        shown = percents(load) if few else [Text(bar(load))]
        ends = (str(row["busiest_expert"]), f"{row['busiest_expert_share']:.1%}", f"{row['max_over_mean']:.2f}")
        table.add_row(str(row["layer"]), *shown, *ends)
    return table


def _title(rows: list[dict[str, Any]], n_experts: int) -> str:
    tokens = sorted({row["tokens"] for row in rows}) or [0]
    total = " to ".join(f"{count:,}" for count in (tokens if len(tokens) == 1 else (tokens[0], tokens[-1])))
    even = f"; even would be {100 / n_experts:.1f}" if n_experts else ""
    return f"Load per expert in % of {total} rows (tokens x K){even}"


def _bar_heading(n_experts: int) -> str:
    per_mark = experts_per_mark(n_experts)
    return "experts" if per_mark == 1 else f"a mark is the busiest of {per_mark} experts"


def percents(load: list[int]) -> list[Text]:
    """Percent of the tokens that each expert got; the busiest is bold, those below half the mean are dim."""
    total, most = sum(load), max(load)
    mean = total / len(load)
    styles = ["bold" if tokens == most else "dim" if tokens < mean / 2 else "" for tokens in load]
    return [Text(f"{100 * tokens / total:.0f}", style=style) for tokens, style in zip(load, styles, strict=True)]


def experts_per_mark(n_experts: int) -> int:
    """How many neighbouring experts share a mark of a bar."""
    return -(-n_experts // MOST_MARKS)


def bar(load: list[int]) -> str:
    """A mark for every expert, or for the busiest of a few neighbours; `@` is the busiest of the layer."""
    step, most = experts_per_mark(len(load)), max(load)
    peaks = [max(load[at : at + step]) for at in range(0, len(load), step)]
    return "".join(MARKS[-(-peak * (len(MARKS) - 1) // most)] for peak in peaks)
