"""`moempi outputs`: show, merge."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

if TYPE_CHECKING:
    from rich.console import Console

    from moempi.files.completions import Head, Origin
    from moempi.files.output_parts import Decode
    from moempi.files.outputs import Shard

_PATH = click.Path(path_type=Path)
_AT_A_TIME = 2**20  # tokens that are read before they are printed
_SHOWN = 10  # sequences that are displayed unless asked for more


@click.group()
def outputs() -> None:
    """Show and merge files of completions."""


@outputs.command()
@click.argument("file", type=_PATH)
@click.option("-n", "first", type=click.IntRange(min=0), help=f"Only the first N sequences ({_SHOWN} without --json).")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object per sequence and line.")
def show(file: Path, first: int | None, as_json: bool) -> None:
    """Show prompts with their completions, also of a run that is not finished yet.

    Example: moempi outputs show outputs.h5 -n 3
    """
    from moempi.files.outputs import open_shard

    shard = open_shard(file, _decoder_of_unfinished(file))
    if as_json:
        _print_json(shard, first)
    else:
        _display(shard, _SHOWN if first is None else first)


@outputs.command()
@click.argument("out", type=_PATH)
@click.argument("files", type=_PATH, nargs=-1, required=True)
@click.option("--overwrite", is_flag=True, help="Replace OUT if it is there.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object.")
def merge(out: Path, files: tuple[Path, ...], overwrite: bool, as_json: bool) -> None:
    """Join the outputs FILES (the shards of an array job) into OUT; no id may occur twice.

    Of a run that is not finished what it has committed is taken.

    Example: moempi outputs merge all.h5 shard-*.h5
    """
    from moempi.files.outputs import merge_outputs

    n = merge_outputs(out, list(files), overwrite=overwrite, decode=_decoder_of_unfinished)
    if as_json:
        click.echo(json.dumps({"file": str(out), "merged_files": len(files), "sequences": n}))
    else:
        click.echo(f"{out}: {n} sequences of {len(files)} files")


# ---------------------------------------------------------------- sequence by sequence


def _print_json(shard: Shard, first: int | None) -> None:
    from moempi.files.completions import ragged_ranges

    for begin, end in ragged_ranges(shard.head.lengths[:first], _AT_A_TIME):
        block = shard.read(begin, end)
        for row in range(len(block)):
            click.echo(json.dumps(block.sequence(row), ensure_ascii=False))


def _display(shard: Shard, first: int) -> None:
    from rich.console import Console

    console = Console(highlight=False)
    head, n = shard.head, len(shard.head.ids)
    console.print(_title(head), style="bold", markup=False, soft_wrap=True)
    block = shard.read(0, min(first, n))
    for row in range(len(block)):
        _display_sequence(console, block.sequence(row))
    if first < n:
        more = f"... and {n - first} more: -n {n} shows all, --json prints them"
        console.print(more, style="dim", markup=False, soft_wrap=True)


def _title(head: Head) -> str:
    total, done, partial = head.origin.n_sequences, head.finished, len(head.ids) - head.finished
    mode = f", mode {head.mode}" if head.mode else ""
    counts = f"{total} sequences" if done == total else f"{done} of {total} sequences finished, {partial} partly"
    names = "" if head.ids_known else "; the input is not where the job says, or has changed: rows instead of ids"
    return f"{head.path}: {counts}, {int(head.lengths.sum())} new tokens{mode}{names}"


def _display_sequence(console: Console, sequence: dict[str, Any]) -> None:
    from rich.text import Text

    title = f"{sequence['id']}  ({len(sequence['tokens'])} new tokens, {sequence['finish_reason']})"
    console.print()
    console.print(Text(printable(title), style="bold cyan"))
    if sequence["completion"] is None:
        console.print(Text(f"tokens {sequence['tokens']}"))
        return
    text = Text(printable(sequence["prompt"] or ""), style="dim")
    text.append(printable(sequence["completion"]), style="not dim green")
    console.print(text)


def printable(text: str) -> str:
    """Text without what could steer a terminal: control characters become �."""
    return "".join(one if one.isprintable() or one in "\n\t" else "\N{REPLACEMENT CHARACTER}" for one in text)


# ---------------------------------------------------------------- texts of an unfinished run


def _decoder_of_unfinished(file: Path) -> Decode | None:
    """The tokenizer of the weights that an unfinished run's job names; a finished file has its texts inside."""
    from moempi.files.output_parts import first_origin

    origin = None if file.exists() else first_origin(file)
    return _decoder(origin) if origin else None


def _decoder(origin: Origin) -> Callable[[list[int]], str] | None:
    from moempi.errors import DataError
    from moempi.files.weights import open_weights

    try:
        with open_weights(Path(json.loads(origin.job)["model"]["weights"])) as weights:
            tokenizer = weights.tokenizer()
    except (DataError, KeyError, TypeError, ValueError):
        return None
    return tokenizer.decode if tokenizer is not None else None
