"""What each rank will hold, as a table; ranks that hold the same stand in one line."""

from __future__ import annotations

from itertools import groupby

from rich.console import Console
from rich.table import Table

from moempi.layout import Layout
from moempi.planning.memory import RankMemory, show_bytes

COLUMNS = ("ranks", "slots", "shared weights", "experts", "KV cache", "messages", "activations", "total")


def show_memory(layout: Layout) -> None:
    """Print the memory plan of a layout."""
    table = Table(title=f"memory per rank, {layout.dtype}, {layout.n_microbatches} microbatches", title_justify="left")
    for name in COLUMNS:
        table.add_column(name, justify="right")
    for _, alike in groupby(layout.memory, key=_parts):
        same = list(alike)
        ranks = str(same[0].rank) if len(same) == 1 else f"{same[0].rank}-{same[-1].rank}"
        sizes = [show_bytes(size) for size in (*_parts(same[0])[1:], same[0].total)]
        table.add_row(ranks, str(same[0].slots), *sizes)
    Console().print(table)


def _parts(plan: RankMemory) -> tuple[int, ...]:
    return (
        plan.slots,
        plan.shared_bytes,
        plan.expert_bytes,
        plan.kv_bytes,
        plan.message_bytes,
        plan.step_bytes,
    )
