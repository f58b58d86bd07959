"""The tables of `moempi trace summary`, a function for each section: summary in, tables for 100 columns out."""

from __future__ import annotations

from typing import Any

from rich.table import Table

from moempi.cli.load_table import load_table, plain_table

Found = dict[str, Any]  # of `moempi.analysis.summarize`

MANY_RANKS = 16  # of more ranks only the extremes are shown
_LINKS_SHOWN = 10


def time(found: Found) -> list[Table]:
    """Leaf stages in the order of the mean, with every rank's share; containers apart."""
    leaves = {stage: each for stage, each in _seconds(found, container=False).items() if sum(each)}
    containers = _seconds(found, container=True)
    wall = [row["wall_seconds"] for row in found["ranks"]]
    return [_leaves(found, leaves, wall), *([_containers(found, containers)] if containers else [])]


def _leaves(found: Found, leaves: dict[str, list[float]], wall: list[float]) -> Table:
    many = found["n_ranks"] > MANY_RANKS
    ranks = ("least", "most") if many else [str(rank) for rank in range(found["n_ranks"])]
    covered = [row["coverage"] for row in found["ranks"] if row["coverage"] is not None]
    cover = f"; at least {min(covered):.2%} accounted for" if covered else ""
    title = f"Time per stage, and its share in % of each rank's wall time{cover}"
    unit, scale = _unit(found)
    table = plain_table(title, "stage", "spans", f"mean {unit}", "%", *ranks)
    spans = _spans(found)
    for stage in sorted(leaves, key=lambda one: -sum(leaves[one])):
        each = leaves[stage]
        shares = [100 * part / whole if whole else 0.0 for part, whole in zip(each, wall, strict=True)]
        mean, share = scale * sum(each) / len(each), 100 * sum(each) / (sum(wall) or 1.0)
        cells = _extremes(shares) if many else [f"{one:.0f}" for one in shares]
        table.add_row(stage, f"{spans[stage]:,}", f"{mean:.3f}", f"{share:.1f}", *cells)
    scaled = [scale * one for one in wall]
    ends = _extremes(scaled, ".2f") if many else [_short(one) for one in scaled]
    table.add_section()
    table.add_row(f"wall {unit}", "", f"{sum(scaled) / len(scaled):.3f}", "100.0", *ends)
    return table


def _containers(found: Found, containers: dict[str, list[float]]) -> Table:
    unit, scale = _unit(found)
    heads = (f"{what} {unit}" for what in ("mean", "least", "most"))
    table = plain_table("Times that lie across these (a rank may have several at once)", "", "times", *heads)
    spans = _spans(found)
    for stage, seconds in containers.items():
        each = [scale * one for one in seconds]
        table.add_row(stage, f"{spans[stage]:,}", f"{sum(each) / len(each):.3f}", *_extremes(each, ".3f"))
    return table


def _unit(found: Found) -> tuple[str, float]:
    """In which times are told, and how many of it a second has: ms, where no rank and no stage took one."""
    times = [row["wall_seconds"] for row in found["ranks"]] + [row["seconds"] for row in found["time"]]
    return ("s", 1.0) if max(times, default=0.0) >= 1 else ("ms", 1e3)


def _seconds(found: Found, *, container: bool) -> dict[str, list[float]]:
    """Seconds of each rank by stage, stages in the order of the first rank that has them."""
    seconds: dict[str, list[float]] = {}
    for row in found["time"]:
        if row["container"] == container:
            seconds.setdefault(row["stage"], [0.0] * found["n_ranks"])[row["rank"]] = row["seconds"]
    return seconds


def _spans(found: Found) -> dict[str, int]:
    spans: dict[str, int] = {}
    for row in found["time"]:
        spans[row["stage"]] = spans.get(row["stage"], 0) + row["spans"]
    return spans


def _extremes(values: list[float], form: str = ".0f") -> list[str]:
    ends = (values.index(min(values)), values.index(max(values)))
    return [f"{values[rank]:{form}} (rank {rank})" for rank in ends]


def _short(value: float) -> str:
    """Three characters or so."""
    return f"{value:.1f}" if value < 9.95 else f"{value:.0f}"


def phases(found: Found) -> list[Table]:
    """Steps, tokens and time of prefill and decode."""
    stages = sorted(
        {stage for row in found["phases"] for stage in row["stage_seconds"]},
        key=lambda one: -sum(row["stage_seconds"].get(one, 0.0) for row in found["phases"]),
    )
    table = plain_table("Steps of all homes, by phase", "", *(row["phase"] for row in found["phases"]))
    lines = {
        "steps": [f"{row['steps']:,}" for row in found["phases"]],
        "tokens": [f"{row['tokens']:,}" for row in found["phases"]],
        "tokens per step": [f"{row['tokens'] / max(1, row['steps']):.1f}" for row in found["phases"]],
        "ms per step": [f"{1e3 * row['step_seconds'] / max(1, row['steps']):.2f}" for row in found["phases"]],
    }
    for name, cells in lines.items():
        table.add_row(name, *cells)
    table.add_section()
    for stage in stages:
        cells = [1e3 * row["stage_seconds"].get(stage, 0.0) / max(1, row["steps"]) for row in found["phases"]]
        table.add_row(f"{stage}, ms per step", *(f"{cell:.2f}" for cell in cells))
    return [table]


def waits(found: Found) -> list[Table]:
    """Who waited for whom: a matrix for few ranks, else the longest ones; and what was exposed."""
    if not found["waits"]:
        return []
    if found["n_ranks"] > MANY_RANKS:
        return [_longest_waits(found)]
    return [
        _wait_matrix(
            found, "wait_seconds", "Waits of microbatches for their last rows, in {}, by the rank these were on"
        ),
        _wait_matrix(found, "exposed_seconds", "Exposed: nothing to do but wait, in {}, by the rank waited for"),
    ]


def _wait_matrix(found: Found, name: str, title: str) -> Table:
    n, (unit, scale) = found["n_ranks"], _unit(found)
    times = [[0.0] * n for _ in range(n)]
    for row in found["waits"]:
        times[row["rank"]][row["peer"]] = scale * row[name]
    table = plain_table(title.format(unit), "rank", *map(str, range(n)), "sum")
    for rank, each in enumerate(times):
        table.add_row(str(rank), *(_short(one) if one else "" for one in each), f"{sum(each):.2f}")
    table.add_section()
    table.add_row("sum", *(_short(sum(column)) for column in zip(*times, strict=True)), f"{sum(map(sum, times)):.2f}")
    return table


def _longest_waits(found: Found) -> Table:
    unit, scale = _unit(found)
    table = plain_table(
        f"Waits (the {_LINKS_SHOWN} longest)",
        "rank",
        "for rank",
        "answers",
        "mean ms",
        "last rows",
        f"wait {unit}",
        f"exposed {unit}",
    )
    for row in sorted(found["waits"], key=lambda one: -one["wait_seconds"])[:_LINKS_SHOWN]:
        mean = 1e3 * row["answer_seconds"] / max(1, row["answers"])
        counts = (f"{row['answers']:,}", f"{mean:.2f}", f"{row['waits']:,}")
        ends = (f"{scale * row['wait_seconds']:.3f}", f"{scale * row['exposed_seconds']:.3f}")
        table.add_row(str(row["rank"]), str(row["peer"]), *counts, *ends)
    return table


def experts(found: Found) -> list[Table]:
    """How busy each rank's experts were, and what hid nothing."""
    names = {
        "experts_computed": "experts computed",
        "experts_had_rows": "experts had rows",
        "exposed_share": "exposed communication",
        "barrier_share": "waiting for all ranks",
        "idle_share": "no work",
    }
    many = found["n_ranks"] > MANY_RANKS
    ranks = ("least", "most") if many else [str(rank) for rank in range(found["n_ranks"])]
    table = plain_table("Expert utilisation, and time without work, in % of each rank's wall time", "", "mean", *ranks)
    for name, words in names.items():
        shares = [100 * (row[name] or 0.0) for row in found["ranks"]]
        if any(shares) or name == "experts_computed":
            cells = _extremes(shares) if many else [f"{one:.0f}" for one in shares]
            table.add_row(words, f"{sum(shares) / len(shares):.1f}", *cells)
    return [table]


def load(found: Found) -> list[Table]:
    """Load per layer and expert."""
    return [load_table(found["load"], found["experts"])]


def traffic(found: Found) -> list[Table]:
    """Totals, the heaviest pairs of ranks, and pairs of nodes where there are several."""
    links = [row for row in found["traffic"] if row["source"] != row["destination"]]
    links.sort(key=lambda row: -row["bytes"])
    title = f"Traffic (the {_LINKS_SHOWN} pairs of ranks with most bytes)"
    table = plain_table(title, "kind", "from", "to", "rows", "MB", "messages")
    for kind in dict.fromkeys(row["kind"] for row in found["traffic"]):
        of_kind = [row for row in found["traffic"] if row["kind"] == kind]
        local = [row for row in of_kind if row["source"] == row["destination"]]
        _add_traffic(table, kind, "all", "others", [row for row in links if row["kind"] == kind])
        _add_traffic(table, kind, "all", "itself", local)
    table.add_section()
    for row in links[:_LINKS_SHOWN]:
        _add_traffic(table, row["kind"], str(row["source"]), str(row["destination"]), [row])
    return [table, *_nodes(found)]


def _nodes(found: Found) -> list[Table]:
    crossing = [row for row in found["nodes"] if row["source"] != row["destination"]]
    if not crossing:
        return []
    crossing.sort(key=lambda row: -row["bytes"])
    shown = crossing[: 2 * _LINKS_SHOWN]
    table = plain_table("Traffic between nodes", "kind", "from", "to", "rows", "MB", "messages")
    for row in shown:
        _add_traffic(table, row["kind"], f"node {row['source']}", f"node {row['destination']}", [row])
    return [table]


def _add_traffic(table: Table, kind: str, source: str, destination: str, rows: list[dict[str, Any]]) -> None:
    total = {name: sum(row[name] for row in rows) for name in ("rows", "bytes", "messages")}
    numbers = (f"{total['rows']:,}", f"{total['bytes'] / 1e6:,.3f}", f"{total['messages']:,}")
    table.add_row(kind, source, destination, *numbers)


def messages(found: Found) -> list[Table]:
    """Messages by size, in classes of a power of two."""
    kinds = list(dict.fromkeys(row["kind"] for row in found["sizes"]))
    if not kinds:
        return []
    counts = {(row["kind"], row["least_bytes"]): row["messages"] for row in found["sizes"]}
    table = plain_table("Messages by size", "from B", *kinds)
    for least in sorted({row["least_bytes"] for row in found["sizes"]}):
        table.add_row(f"{least:,}", *(f"{counts.get((kind, least), 0):,}" for kind in kinds))
    table.add_section()
    away = [row for row in found["traffic"] if row["source"] != row["destination"]]
    for name, column in (("messages", "messages"), ("MB", "bytes"), ("mean B", "mean")):
        table.add_row(name, *(_of_messages([row for row in away if row["kind"] == kind], column) for kind in kinds))
    return [table]


def _of_messages(rows: list[dict[str, Any]], column: str) -> str:
    number, size = (sum(row[name] for row in rows) for name in ("messages", "bytes"))
    return {"messages": f"{number:,}", "bytes": f"{size / 1e6:,.3f}", "mean": f"{size / max(1, number):,.0f}"}[column]
