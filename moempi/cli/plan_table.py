"""What each rank will hold, as a table; ranks that hold the same stand in one line."""

from __future__ import annotations

from itertools import groupby

from moempi.layout import Layout
from moempi.planning.memory import RankMemory, show_bytes

COLUMNS = ("ranks", "slots", "shared", "experts", "KV cache", "messages", "steps", "total")


def memory_table(layout: Layout) -> list[str]:
    """The memory plan of a layout, as lines of at most 80 characters.

    slots: of all layers; shared: weights that every rank holds; messages: arrivals, their answers, and rows on the
    way; steps: activations, at most.
    """
    rows: list[tuple[str, ...]] = [COLUMNS]
    for _, alike in groupby(layout.memory, key=_parts):
        same = list(alike)
        ranks = str(same[0].rank) if len(same) == 1 else f"{same[0].rank}-{same[-1].rank}"
        sizes = [show_bytes(size) for size in (*_parts(same[0])[1:], same[0].total)]
        rows.append((ranks, str(same[0].slots), *sizes))
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    count = "1 microbatch" if layout.n_microbatches == 1 else f"{layout.n_microbatches} microbatches"
    lines = ["  ".join(cell.rjust(width) for cell, width in zip(row, widths, strict=True)) for row in rows]
    own = layout.memory[0].context_bytes
    lines += [f"The totals hold {show_bytes(own)} of CUDA's own."] if own else []
    notes = layout.memory[0].trace_bytes
    lines += [f"The totals hold {show_bytes(notes)} for the trace on its way to the disk."] if notes else []
    if layout.kv_tokens < layout.kv_wanted:
        lines += [f"KV cache: {layout.kv_tokens} of {layout.kv_wanted} positions; sequences wait for room."]
    steps = f"steps of {layout.step_tokens} tokens"
    whose = "GPU memory" if layout.device == "cuda" else "Memory"
    return [f"{whose} per rank on {layout.n_ranks} ranks, {layout.dtype}, {count}, {steps}:", *lines]


def route_lines(layout: Layout) -> list[str]:
    """Nodes and route of a layout, as lines."""
    nodes = layout.nodes.describe()
    return [f"Route of rows between nodes: {layout.route.name} on {nodes} ({layout.route.reason})."]


def _parts(plan: RankMemory) -> tuple[int, ...]:
    return (
        plan.slots,
        plan.shared_bytes,
        plan.expert_bytes,
        plan.kv_bytes,
        plan.message_bytes,
        plan.step_bytes,
    )
