"""`moempi trace specialists`: which experts prefer one kind of prompt."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING

import click

if TYPE_CHECKING:
    from collections.abc import Sequence

    from moempi.analysis import Trace
    from moempi.analysis.specialists import Specialist


@click.command()
@click.argument("file", type=click.Path(path_type=Path))
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object per layer and group.")
def specialists(file: Path, as_json: bool) -> None:
    """Say which experts prefer one kind of prompt; needs a trace of level routes.

    Kinds are the ids' parts before the first `-`: verse-01 and code-07 are of the kinds verse and code.

    Example: moempi trace specialists out/again.trace.h5
    """
    from dataclasses import asdict

    from moempi import analysis
    from moempi.analysis.specialists import load_by_group
    from moempi.analysis.specialists import specialists as find

    trace = analysis.load(file)
    names, load = load_by_group(trace, _kinds(trace))
    found = find(names, load)
    if as_json:
        for one in found:
            click.echo(json.dumps(asdict(one)))
    else:
        _display(names, found)


def _kinds(trace: Trace) -> list[str]:
    from moempi.errors import DataError
    from moempi.files.inputs import read_inputs

    try:
        source = Path(trace.job["input"]["file"])
    except (KeyError, TypeError):
        raise DataError(f"{trace.path}: its job does not say which prompts it read") from None
    return [name.partition("-")[0] for name in read_inputs(source).ids]


def _display(names: Sequence[str], found: Sequence[Specialist]) -> None:
    from rich.console import Console

    from moempi.cli.load_table import plain_table

    table = plain_table("Specialists: their share of a kind's tokens, and of the others'", "layer", *names)
    for layer in dict.fromkeys(one.layer for one in found):
        here = [one for one in found if one.layer == layer]
        cells = [f"expert {one.expert}: {one.share:.0%} (others {one.share_of_others:.0%})" for one in here]
        table.add_row(str(layer), *cells)
    Console(highlight=False).print(table)
