"""`moempi inputs`: make, split, info."""

from __future__ import annotations

from pathlib import Path

import click

from moempi.cli.groups import Group
from moempi.cli.results import refuse_existing, show

_PATH = click.Path(path_type=Path)
_json = click.option("--json", "as_json", is_flag=True, help="Print one JSON object.")


@click.group(cls=Group)
def inputs() -> None:
    """Make, cut and describe files of prompts.

    \b
    moempi inputs make inputs/prompts.jsonl inputs/tinymoe.h5 inputs/prompts.h5
    """


@inputs.command()
@click.argument("prompts", type=_PATH)
@click.argument("weights", type=_PATH)
@click.argument("out", type=_PATH)
@click.option("--overwrite", is_flag=True, help="Replace what is there.")
@_json
def make(prompts: Path, weights: Path, out: Path, overwrite: bool, as_json: bool) -> None:
    """Tokenize PROMPTS (JSON lines) with the tokenizer in WEIGHTS and write the inputs file OUT.

    \b
    {"id": "a", "prompt": "some text"}                  tokenized
    {"id": "b", "tokens": [17, 4, 201]}                 taken as they are
    {"id": "c", "prompt": "ROMEO:", "max_new_tokens": 20}
                                                        not what the job says

    \b
    moempi inputs make inputs/prompts.jsonl inputs/tinymoe.h5 inputs/prompts.h5
    """
    refuse_existing(out, overwrite)
    from moempi.files.inputs import info
    from moempi.files.make_inputs import make_inputs

    make_inputs(prompts, weights, out)
    show(info(out), as_json)


@inputs.command()
@click.argument("file", type=_PATH)
@click.argument("folder", type=_PATH)
@click.option("-k", "--shards", type=click.IntRange(1, 1000), required=True, help="How many shards to cut it into.")
@click.option("--max-new-tokens", type=click.IntRange(1), default=64, show_default=True, help="The job's default.")
@click.option("--overwrite", is_flag=True, help="Replace what is there.")
@_json
def split(file: Path, folder: Path, shards: int, max_new_tokens: int, overwrite: bool, as_json: bool) -> None:
    """Cut the inputs FILE into shards of about equal work, in FOLDER: shard-000.h5 and so on.

    Each is an inputs file of its own; `moempi outputs merge` puts their outputs together, in the order of FILE.

    Example: moempi inputs split inputs/prompts.h5 out/shards -k 4
    """
    from moempi.files.shards import read_stamp, split_inputs

    paths = split_inputs(file, folder, shards, max_new_tokens, overwrite=overwrite)
    stamps = {str(path): read_stamp(path) for path in paths}
    show({path: stamp.sequences for path, stamp in stamps.items() if stamp is not None}, as_json)


@inputs.command("info")
@click.argument("file", type=_PATH)
@_json
def info_(file: Path, as_json: bool) -> None:
    """Say what the inputs FILE holds: prompts, tokens, lengths, where it comes from.

    Example: moempi inputs info inputs/prompts.h5
    """
    from moempi.files.inputs import info

    show(info(file), as_json)
