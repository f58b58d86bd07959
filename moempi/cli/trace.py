"""`moempi trace`: summary."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

if TYPE_CHECKING:
    from rich.table import Table

_PATH = click.Path(path_type=Path)
_RANKS_IN_A_TABLE = 16  # more ranks are shown by their extremes
_LINKS_SHOWN = 10


@click.group()
def trace() -> None:
    """Say where every token and every microsecond went."""


@trace.command()
@click.argument("file", type=_PATH)
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object, with every rank and pair of ranks.")
def summary(file: Path, as_json: bool) -> None:
    """Tables of time per stage and rank, load per layer, and traffic between ranks.

    Example: moempi trace summary demo.trace.h5
    """
    from moempi import analysis

    found = analysis.summarize(analysis.load(file))
    if as_json:
        click.echo(json.dumps(found, indent=2))
    else:
        _display(found)


def _display(found: dict[str, Any]) -> None:
    from rich.console import Console

    console = Console(highlight=False)
    console.print(_title(found), style="bold", markup=False)
    for table in (_time(found), _load(found), _traffic(found)):
        console.print()
        console.print(table)


def _title(found: dict[str, Any]) -> str:
    state = "; unfinished, from its parts" if found["unfinished"] else ""
    mode = f", mode {found['mode']}" if found["mode"] else ""
    error = found["clock_error_ns"]
    clocks = "clock errors not known" if error is None else f"clocks agree within {error / 1e3:.1f} us"
    return f"{found['file']}: level {found['level']}{mode}, {found['ranks']} ranks, {clocks}{state}"


def _table(title: str, *columns: str) -> Table:
    from rich.table import Table

    table = Table(title=title, title_justify="left", title_style="bold")
    for column in columns:
        table.add_column(column, justify="right")
    return table


def _time(found: dict[str, Any]) -> Table:
    ranks, rows = found["ranks"], found["time"]
    stages = list(dict.fromkeys(row["stage"] for row in rows))
    seconds = {(row["stage"], row["rank"]): row["seconds"] for row in rows}
    spans = {stage: sum(row["spans"] for row in rows if row["stage"] == stage) for stage in stages}
    shown = range(ranks) if ranks <= _RANKS_IN_A_TABLE else range(0)
    title = "Time per stage in s (stages may lie inside others)"
    table = _table(title, "stage", "spans", "mean", "least", "most", *(f"{rank}" for rank in shown))
    for stage in stages:
        each = [seconds.get((stage, rank), 0.0) for rank in range(ranks)]
        parts = [sum(each) / ranks, min(each), max(each), *(each[rank] for rank in shown)]
        table.add_row(stage, f"{spans[stage]:,}", *(f"{part:.3f}" for part in parts))
    return table


def _load(found: dict[str, Any]) -> Table:
    table = _table("Load per layer", "layer", "tokens x K", "busiest expert", "its share", "max/mean tokens per expert")
    for row in found["load"]:
        share, ratio = f"{row['busiest_expert_share']:.1%}", f"{row['max_over_mean']:.2f}"
        table.add_row(str(row["layer"]), f"{row['tokens']:,}", str(row["busiest_expert"]), share, ratio)
    return table


def _traffic(found: dict[str, Any]) -> Table:
    links = [row for row in found["traffic"] if row["source"] != row["destination"]]
    links.sort(key=lambda row: -row["bytes"])
    table = _table(
        f"Traffic (the {_LINKS_SHOWN} pairs of ranks with most bytes)", "kind", "from", "to", "rows", "MB", "messages"
    )
    for kind in dict.fromkeys(row["kind"] for row in found["traffic"]):
        of_kind = [row for row in found["traffic"] if row["kind"] == kind]
        local = [row for row in of_kind if row["source"] == row["destination"]]
        _add_traffic(table, kind, "all", "others", [row for row in links if row["kind"] == kind])
        _add_traffic(table, kind, "all", "itself", local)
    table.add_section()
    for row in links[:_LINKS_SHOWN]:
        _add_traffic(table, row["kind"], str(row["source"]), str(row["destination"]), [row])
    return table


def _add_traffic(table: Table, kind: str, source: str, destination: str, rows: list[dict[str, Any]]) -> None:
    total = {name: sum(row[name] for row in rows) for name in ("rows", "bytes", "messages")}
    numbers = (f"{total['rows']:,}", f"{total['bytes'] / 1e6:,.3f}", f"{total['messages']:,}")
    table.add_row(kind, source, destination, *numbers)
