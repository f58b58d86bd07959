"""`moempi trace`: summary, specialists, plot."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from moempi.cli.groups import Group
from moempi.cli.results import plural
from moempi.cli.specialists import specialists
from moempi.errors import JobError

if TYPE_CHECKING:
    from matplotlib.figure import Figure

SECTIONS = ("time", "phases", "waits", "experts", "load", "traffic", "messages")
PICTURES = ("load", "traffic", "timeline")

_PATH = click.Path(path_type=Path)


@click.group(cls=Group)
def trace() -> None:
    """Say where every token and every microsecond went.

    Example: moempi trace summary out/demo.trace.h5
    """


@trace.command()
@click.argument("file", type=_PATH)
@click.option("--only", multiple=True, type=click.Choice(SECTIONS), help="Print this section; may be given again.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object, with every rank and pair of ranks.")
@click.option("--check", is_flag=True, help="Only check that all counts agree; exit code 3 where some do not.")
@click.option("--outputs", type=_PATH, help="With --check: the run's completions, to be checked too.")
def summary(file: Path, only: tuple[str, ...], as_json: bool, check: bool, outputs: Path | None) -> None:
    """Tables of time, load and traffic.

    Time per stage and rank, prefill and decode apart, who waited for whom, how busy the experts were, load per
    layer and expert, traffic between ranks and nodes, sizes of messages.

    Examples: moempi trace summary out/demo.trace.h5 --only load;
    moempi trace summary out/demo.trace.h5 --check --outputs out/demo.h5
    """
    from moempi import analysis

    trace = analysis.load(file)
    if check:
        _check(trace, outputs)
    elif as_json:
        click.echo(json.dumps(analysis.summarize(trace), indent=2))
    else:
        _display(analysis.summarize(trace), only or SECTIONS)


def _check(trace: Any, outputs: Path | None) -> None:
    from moempi.analysis import disagreements
    from moempi.errors import DataError
    from moempi.files.outputs import read_outputs

    found = disagreements(trace, None if outputs is None else read_outputs(outputs))
    if found:
        raise DataError(f"{trace.path}: {len(found)} counts do not agree:\n  " + "\n  ".join(found))
    click.echo(f"{trace.path}: all counts agree{'' if outputs is None else f', also with {outputs}'}")


def _display(found: dict[str, Any], wanted: tuple[str, ...]) -> None:
    from rich.console import Console

    from moempi.cli import trace_tables as tables
    from moempi.cli.trace_words import conclusion

    console = Console(highlight=False)
    console.print(_title(found), style="bold", markup=False, soft_wrap=True)
    for sentence in conclusion(found):
        console.print(sentence, markup=False, soft_wrap=True)
    for section in (section for section in SECTIONS if section in wanted):
        for shown in getattr(tables, section)(found):
            # A title of its own is not wrapped to the width of its table.
            title, shown.title = shown.title, None
            console.print()
            console.print(title, style="bold", markup=False, soft_wrap=True)
            console.print(shown)


def _title(found: dict[str, Any]) -> str:
    state = "; unfinished, from its parts" if found["unfinished"] else ""
    mode = f", mode {found['mode']}" if found["mode"] else ""
    error = found["clock_error_ns"]
    clocks = "clock errors not known" if error is None else f"clocks agree within {error / 1e3:.1f} us"
    ranks = plural(found["n_ranks"], "rank")
    return f"{found['file']}: level {found['level']}{mode}, {ranks}, {clocks}{state}"


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
