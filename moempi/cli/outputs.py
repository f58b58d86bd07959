"""`moempi outputs`: show, merge, compare."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from moempi.cli.groups import Group
from moempi.cli.results import plural
from moempi.errors import EXIT_DONE, EXIT_FAILED

if TYPE_CHECKING:
    from rich.console import Console

    from moempi.files.compare_outputs import Difference
    from moempi.files.completions import Head, Origin
    from moempi.files.output_parts import Decode
    from moempi.files.outputs import Shard

_PATH = click.Path(path_type=Path)
_AT_A_TIME = 2**20  # tokens that are read before they are printed
_SHOWN = 10  # sequences that are displayed unless asked for more


@click.group(cls=Group)
def outputs() -> None:
    """Show and merge files of completions.

    Example: moempi outputs show out/demo.h5 -n 3
    """


@outputs.command()
@click.argument("file", type=_PATH)
@click.option("-n", "first", type=click.IntRange(min=0), help=f"Only the first N sequences ({_SHOWN} without --json).")
@click.option("--id", "ids", multiple=True, metavar="ID", help="Only the sequence of this id; may be given again.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object per sequence and line.")
def show(file: Path, first: int | None, ids: tuple[str, ...], as_json: bool) -> None:
    """Show prompts with their completions, also of a run that is not finished yet.

    Lines of a completion begin with `>`.

    \b
    moempi outputs show out/demo.h5 -n 3
    moempi outputs show out/demo.h5 --id verse-04 --id code-03
    """
    from moempi.files.outputs import open_shard

    shard = open_shard(file, _decoder_of_unfinished(file))
    n = len(shard.head.ids)
    rows = [_row_of(shard, one) for one in ids] if ids else range(n if first is None else min(first, n))
    if as_json:
        _print_json(shard, rows)
    else:
        _display(shard, rows if ids or first is not None else rows[:_SHOWN], say_more=not ids)


@outputs.command()
@click.argument("out", type=_PATH)
@click.argument("files", type=_PATH, nargs=-1, required=True)
@click.option("--overwrite", is_flag=True, help="Replace OUT if it is there.")
@click.option("--mixed", is_flag=True, help="Join files of different weights, options or libraries too.")
@click.option("--incomplete", is_flag=True, help="Join some shards of an input without the others.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object.")
def merge(out: Path, files: tuple[Path, ...], overwrite: bool, mixed: bool, incomplete: bool, as_json: bool) -> None:
    """Join the outputs FILES into OUT; no id may occur twice, and all must be of one model and the same options.

    Shards of one input, as of an array job, are put in its order. Of a run that is not finished what it has
    committed is taken.

    Example: moempi outputs merge all.h5 shard-*.h5
    """
    from moempi.files.outputs import merge_outputs

    n = merge_outputs(
        out, list(files), overwrite=overwrite, decode=_decoder_of_unfinished, mixed=mixed, incomplete=incomplete
    )
    if as_json:
        click.echo(json.dumps({"file": str(out), "merged_files": len(files), "sequences": n}))
    else:
        click.echo(f"{out}: {plural(n, 'sequence')} of {plural(len(files), 'file')}")


@outputs.command()
@click.argument("first", type=_PATH)
@click.argument("second", type=_PATH)
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object.")
def compare(first: Path, second: Path, as_json: bool) -> int:
    """Say whether FIRST and SECOND have the same tokens and log-probabilities, bit for bit.

    Sequences are matched by id. Ends with 1 where anything differs, or only one of the two has a sequence.

    Example: moempi outputs compare out/demo.h5 out/again.h5
    """
    from dataclasses import asdict

    from moempi.files.compare_outputs import compare as find
    from moempi.files.outputs import read_outputs

    a, b = read_outputs(first), read_outputs(second)
    differences, alone = find(a, b)
    same = not differences and not alone
    if as_json:
        click.echo(json.dumps({"same": same, "differences": [asdict(one) for one in differences], "alone": alone}))
    elif same:
        tokens = plural(len(a.tokens), "new token")
        click.echo(f"the same, bit for bit: {plural(len(a.ids), 'sequence')}, {tokens} and their log-probabilities")
    else:
        click.echo("\n".join(_told(len(a.ids), differences, alone)))
    return EXIT_DONE if same else EXIT_FAILED


def _told(n: int, differences: list[Difference], alone: list[str]) -> list[str]:
    lines = [f"{len(differences)} of {plural(n, 'sequence')} differ"] if differences else []
    lines += [f"  {one.id}: {one.what} {one.position} is the first that differs" for one in differences[:_SHOWN]]
    lines += ["  ..."] if len(differences) > _SHOWN else []
    names = ", ".join(alone[:_SHOWN]) + (", ..." if len(alone) > _SHOWN else "")
    return [*lines, f"only in one of the two: {names}"] if alone else lines


# ---------------------------------------------------------------- sequence by sequence


def _row_of(shard: Shard, name: str) -> int:
    from moempi.errors import JobError

    ids = shard.head.ids
    if name not in ids:
        known = ", ".join(ids[:3]) + (", ..." if len(ids) > 3 else "")
        raise JobError(f"{shard.head.path}: no sequence has the id {name!r}; its {len(ids)} ids are {known or 'none'}")
    return ids.index(name)


def _read(shard: Shard, rows: Sequence[int]) -> Iterator[dict[str, Any]]:
    """Sequences one by one; neighbours are read together."""
    from moempi.files.completions import ragged_ranges

    if not isinstance(rows, range):
        for row in rows:
            yield shard.read(row, row + 1).sequence(0)
        return
    for begin, end in ragged_ranges(shard.head.lengths[: len(rows)], _AT_A_TIME):
        block = shard.read(begin, end)
        yield from (block.sequence(row) for row in range(len(block)))


def _print_json(shard: Shard, rows: Sequence[int]) -> None:
    for sequence in _read(shard, rows):
        click.echo(json.dumps(sequence, ensure_ascii=False))


def _display(shard: Shard, rows: Sequence[int], *, say_more: bool) -> None:
    from rich.console import Console

    console = Console(highlight=False)
    head, n = shard.head, len(shard.head.ids)
    console.print(_title(head), style="bold", markup=False, soft_wrap=True)
    for sequence in _read(shard, rows):
        _display_sequence(console, sequence)
    if say_more and len(rows) < n:
        more = f"... and {n - len(rows)} more: -n {n} shows all, --json prints them"
        console.print(more, style="dim", markup=False, soft_wrap=True)


def _title(head: Head) -> str:
    total, done, partial = head.origin.n_sequences, head.finished, len(head.ids) - head.finished
    mode = f", mode {head.mode}" if head.mode else ""
    counts = plural(total, "sequence") if done == total else f"{done} of {total} sequences finished, {partial} partly"
    names = "" if head.ids_known else "; the input is not where the job says, or has changed: rows instead of ids"
    return f"{head.path}: {counts}, {plural(int(head.lengths.sum()), 'new token')}{mode}{names}"


def _display_sequence(console: Console, sequence: dict[str, Any]) -> None:
    from rich.text import Text

    title = f"{sequence['id']}  ({plural(len(sequence['tokens']), 'new token')}, {sequence['finish_reason']})"
    console.print()
    console.print(Text(printable(title), style="bold cyan"))
    if sequence["completion"] is None:
        console.print(Text(f"tokens {sequence['tokens']}"))
        return
    # Marked, because where there are no colours nobody could say where the prompt ends.
    _display_lines(console, "  ", (sequence["prompt"] or "").removesuffix("\n"), "dim")
    _display_lines(console, "> ", sequence["completion"].removeprefix("\n"), "green")


def _display_lines(console: Console, mark: str, text: str, style: str) -> None:
    from rich.text import Text

    for line in Text(printable(text), style=style).wrap(console, max(8, console.width - len(mark))):
        console.print(Text(mark).append_text(line))


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
    from moempi.files.schema import parse_json
    from moempi.files.weights import open_weights

    try:
        with open_weights(Path(parse_json(origin.job)["model"]["weights"])) as weights:
            if weights.digest() not in origin.sources.values():
                return None
            tokenizer = weights.tokenizer()
    except (DataError, KeyError, TypeError, ValueError):
        return None
    return tokenizer.decode if tokenizer is not None else None
