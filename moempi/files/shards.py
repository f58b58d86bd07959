"""Inputs cut into shards, so that each can be a job of its own; the outputs of all are merged into one file.

A shard is an inputs file with a stamp that says which rows of which input it holds:

    /shard    JSON text: {"shard", "of", "first", "sequences", "whole"}
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from itertools import pairwise
from pathlib import Path

import numpy as np

from moempi.errors import DataError, JobError
from moempi.files import schema
from moempi.files.inputs import Prompts, read_inputs, write_inputs
from moempi.files.parts import make_folder


@dataclass(frozen=True)
class Stamp:
    """Which part of an input a shard is."""

    shard: int  # from 0
    of: int
    first: int  # its first row in the whole input
    sequences: int  # of the shard
    whole: str  # SHA-256 of the whole input's file


def cut(work: np.ndarray, n_shards: int) -> list[int]:
    """Where to cut rows into ranges of about equal work: n_shards + 1 rising row numbers, no range empty.

    Args:
        work: int64 [n], of every row.

    Raises:
        JobError: fewer rows than shards.
    """
    if len(work) < n_shards:
        raise JobError(f"{len(work)} sequences cannot be cut into {n_shards} shards; give at most {len(work)}")
    ends = np.cumsum(work)
    wanted = ends[-1] * np.arange(1, n_shards) / n_shards
    cuts = np.searchsorted(ends, wanted, side="right")
    # Each range gets one row at least: push cuts up from below, then down from above.
    numbers = np.arange(1, n_shards)
    cuts = np.maximum.accumulate(cuts - numbers) + numbers
    cuts = np.clip(cuts, numbers, len(work) - n_shards + numbers)
    return [0, *cuts.tolist(), len(work)]


def split_inputs(
    path: Path, folder: Path, n_shards: int, max_new_tokens: int, *, keep: bool = False, overwrite: bool = False
) -> list[Path]:
    """Write shard-000.h5, shard-001.h5, ... of an inputs file: ranges of its rows of about equal work.

    Args:
        max_new_tokens: the job's default, for prompts that don't say theirs.
        keep: leave shards alone that are there already and hold the same rows; their jobs can be resumed.
        overwrite: replace others.

    Raises:
        JobError: more shards than sequences, or other files of these names are there.
        DataError: the input is damaged, or a shard cannot be written.
    """
    prompts, whole = read_inputs(path), schema.file_digest(path)
    own = np.where(prompts.max_new_tokens == 0, max_new_tokens, prompts.max_new_tokens).astype(np.int64)
    cuts = cut(own + [len(tokens) for tokens in prompts.tokens], n_shards)
    stamps = [Stamp(i, n_shards, a, b - a, whole) for i, (a, b) in enumerate(pairwise(cuts))]
    paths = [folder / f"shard-{stamp.shard:03d}.h5" for stamp in stamps]
    stay = [keep and _is_there(one, stamp) for one, stamp in zip(paths, stamps, strict=True)]
    if not overwrite:
        _refuse_others([one for one, stays in zip(paths, stay, strict=True) if not stays])
    make_folder(folder)
    for one, stamp, stays in zip(paths, stamps, stay, strict=True):
        if not stays:
            _write(one, prompts, stamp, path.name)
    return paths


def _is_there(path: Path, stamp: Stamp) -> bool:
    return path.exists() and read_stamp(path) == stamp


def _refuse_others(paths: list[Path]) -> None:
    taken = next((path for path in paths if path.exists()), None)
    if taken is not None:
        raise JobError(
            f"{taken}: exists already and is not to be kept as this shard; give another folder, or --overwrite"
        )


def _write(path: Path, prompts: Prompts, stamp: Stamp, name: str) -> None:
    rows = slice(stamp.first, stamp.first + stamp.sequences)
    mine = Prompts(
        prompts.ids[rows],
        prompts.tokens[rows],
        None if prompts.text is None else prompts.text[rows],
        prompts.max_new_tokens[rows],
    )
    write_inputs(path, mine, {name: stamp.whole}, shard=json.dumps(asdict(stamp)))


def read_stamp(path: Path) -> Stamp | None:
    """The stamp of an inputs file; None where it is a whole input.

    Raises:
        DataError: no inputs file, or a damaged stamp.
    """
    with schema.open_file(path, "inputs") as file:
        if "shard" not in file:
            return None
        text = schema.read_text(file, "shard")
    try:
        stamp = Stamp(**schema.parse_json(text))
        numbers = (stamp.shard, stamp.of, stamp.first, stamp.sequences)
        whole = all(type(one) is int and one >= 0 for one in numbers)
        if not whole or stamp.shard >= stamp.of or not isinstance(stamp.whole, str):
            raise ValueError(f"{text!r}")
    except (TypeError, ValueError) as error:
        raise DataError(f"{path}: /shard is damaged: {error}") from None
    return stamp


# ---------------------------------------------------------------- in the identity of outputs


def identity_of(stamp: Stamp | None) -> dict[str, str]:
    """What outputs say of the shard that they were made from: {} for a whole input."""
    if stamp is None:
        return {}
    return {"shard": f"{stamp.shard} of {stamp.of}", "whole_inputs": stamp.whole}


def number_of(identity: dict[str, str]) -> tuple[int, int] | None:
    """(shard, number of shards) that outputs were made from; None where it was a whole input.

    Raises:
        DataError: it cannot be read.
    """
    text = identity.get("shard")
    if text is None:
        return None
    shard, _, count = text.partition(" of ")
    if not (shard.isdecimal() and count.isdecimal() and int(shard) < int(count)):
        raise DataError(f"shard {text!r}; expected a number of a number")
    return int(shard), int(count)
