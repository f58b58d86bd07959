"""`moempi trace`: summary, specialists, plot."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from moempi.cli.groups import Group
from moempi.cli.specialists import specialists
from moempi.errors import JobError

if TYPE_CHECKING:
    from matplotlib.figure import Figure
    from rich.table import Table

TABLES = ("time", "load", "traffic")
PICTURES = ("load", "traffic", "timeline")

_PATH = click.Path(path_type=Path)
_RANKS_IN_A_TABLE = 16  # of more ranks only the extremes are shown
_LINKS_SHOWN = 10


@click.group(cls=Group)
def trace() -> None:
    """Say where every token and every microsecond went.

    Example: moempi trace summary out/demo.trace.h5
    """


@trace.command()
@click.argument("file", type=_PATH)
@click.option("--only", multiple=True, type=click.Choice(TABLES), help="Print this table; may be given again.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object, with every rank and pair of ranks.")
def summary(file: Path, only: tuple[str, ...], as_json: bool) -> None:
    """Tables of time, load and traffic.

    Time per stage and rank, load per layer and expert, traffic between ranks.

    Example: moempi trace summary out/demo.trace.h5 --only load
    """
    from moempi import analysis

    found = analysis.summarize(analysis.load(file))
    if as_json:
        click.echo(json.dumps(found, indent=2))
    else:
        _display(found, only or TABLES)


def _display(found: dict[str, Any], wanted: tuple[str, ...]) -> None:
    from rich.console import Console

    from moempi.cli.load_table import load_table

    console = Console(highlight=False)
    console.print(_title(found), style="bold", markup=False, soft_wrap=True)
    tables = {
        "time": lambda: [_time(found), *_time_by_rank(found)],
        "load": lambda: [load_table(found["load"], found["experts"])],
        "traffic": lambda: [_traffic(found)],
    }
    for table in (table for name in TABLES if name in wanted for table in tables[name]()):
        console.print()
        console.print(table)


def _title(found: dict[str, Any]) -> str:
    state = "; unfinished, from its parts" if found["unfinished"] else ""
    mode = f", mode {found['mode']}" if found["mode"] else ""
    error = found["clock_error_ns"]
    clocks = "clock errors not known" if error is None else f"clocks agree within {error / 1e3:.1f} us"
    return f"{found['file']}: level {found['level']}{mode}, {found['ranks']} ranks, {clocks}{state}"


def _table(title: str, *columns: str) -> Table:
    from moempi.cli.load_table import plain_table

    return plain_table(title, *columns)


def _time(found: dict[str, Any]) -> Table:
    table = _table("Time per stage in s (stages may lie inside others)", "stage", "spans", "mean", "least", "most")
    for stage, each in _seconds(found).items():
        spans = sum(row["spans"] for row in found["time"] if row["stage"] == stage)
        ends = [f"{each[rank]:.3f} (rank {rank})" for rank in (each.index(min(each)), each.index(max(each)))]
        table.add_row(stage, f"{spans:,}", f"{sum(each) / len(each):.3f}", *ends)
    return table


def _time_by_rank(found: dict[str, Any]) -> list[Table]:
    if found["ranks"] > _RANKS_IN_A_TABLE:
        return []
    seconds = _seconds(found)
    table = _table("Time per rank and stage in s", "rank", *seconds)
    for rank in range(found["ranks"]):
        table.add_row(str(rank), *(f"{each[rank]:.2f}" for each in seconds.values()))
    return [table]


def _seconds(found: dict[str, Any]) -> dict[str, list[float]]:
    """Seconds of each rank by stage, stages in the order of the first rank that has them."""
    seconds: dict[str, list[float]] = {}
    for row in found["time"]:
        seconds.setdefault(row["stage"], [0.0] * found["ranks"])[row["rank"]] = row["seconds"]
    return seconds


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


trace.add_command(specialists)


@trace.command()
@click.argument("file", type=_PATH)
@click.option("--what", type=click.Choice(PICTURES), default="load", show_default=True, help="Which picture.")
@click.option("--out", type=_PATH, required=True, help="Where it goes; .png, .svg or .pdf.")
@click.option("--begin", type=click.FloatRange(0), help="timeline: begin of the window, in s since the job's start.")
@click.option("--length", type=click.FloatRange(0, min_open=True), help="timeline: length of the window in s.")
def plot(file: Path, what: str, out: Path, begin: float | None, length: float | None) -> None:
    """Draw a picture of a trace.

    load: share of every expert in each layer. traffic: bytes from rank to rank. timeline: what every rank did in a
    window of time, by default a short one in the middle; needs a trace of level full.

    \b
    moempi trace plot out/demo.trace.h5 --out load.png
    moempi trace plot out/demo.trace.h5 --what timeline --out timeline.svg
    moempi trace plot t.h5 --what timeline --begin 2.5 --length 0.05 --out a.png
    """
    from moempi.plots.picture import check_target, save

    if what != "timeline" and (begin is not None or length is not None):
        raise JobError(f"--begin and --length choose the window of --what timeline; --what is {what}")
    check_target(out)
    save(_draw(file, what, begin, length), out)
    click.echo(f"{out}: {what} of {file}")


def _draw(file: Path, what: str, begin: float | None, length: float | None) -> Figure:
    from moempi import analysis
    from moempi.analysis.timeline import busy_window
    from moempi.plots import load, timeline, traffic

    found = analysis.load(file)
    if what == "timeline":
        return timeline.timeline_figure(found, busy_window(found, begin, length))
    return load.load_figure(found) if what == "load" else traffic.traffic_figure(found)
