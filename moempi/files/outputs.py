"""Outputs as everyone reads them: the file of a finished run, or the commits of one that is not finished.

`read_outputs` reads either, `merge_outputs` joins several runs (the shards of an array job) into one file.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import numpy as np

from moempi.errors import DataError, JobError
from moempi.files import schema
from moempi.files.completions import Head, Origin, Outputs, OutputsFile, ragged_ranges, read_final, read_head
from moempi.files.inputs import Prompts, read_inputs
from moempi.files.output_parts import PATTERN, WINDOW, Decode, gather, latest_of, read_parts
from moempi.files.parts import committed_parts
from moempi.files.together import check_alike, in_input_order, is_whole


@dataclass(frozen=True)
class Shard:
    """One run's outputs: what is known of them, and a function that reads sequences begin..end."""

    head: Head
    read: Callable[[int, int], Outputs]


def read_outputs(path: Path, *, first: int | None = None, decode: Decode | None = None) -> Outputs:
    """The outputs of a run: all sequences, or the `first` so many.

    Args:
        path: the outputs file. Where it is not there yet, its committed parts are read: sequences in input order,
            without those that have not begun.
        decode: tokens -> text, for the commits of an unfinished run; a finished file has its texts inside.

    Raises:
        DataError: neither is there, or they are damaged.
    """
    shard = open_shard(path, decode)
    n = len(shard.head.ids)
    return shard.read(0, n if first is None else min(first, n))


def open_shard(path: Path, decode: Decode | None = None) -> Shard:
    """Look at the outputs file `path`, or at its parts; see `read_outputs`."""
    if not path.exists():
        try:
            return _unfinished(path, decode)
        except DataError:
            # The run may have ended just now: then the parts are gone and the file is there.
            if not path.exists():
                raise
    return Shard(read_head(path), partial(read_final, path))


def _unfinished(path: Path, decode: Decode | None) -> Shard:
    parts = read_parts(path)
    if not parts:
        raise DataError(f"{path}: there is no such file, and no commits of an unfinished run beside it")
    origin = parts[0].origin
    prompts = _find_prompts(origin)
    latest = latest_of(parts, origin.n_sequences)
    begun = np.flatnonzero(latest.part >= 0)
    known = prompts or _nameless(origin.n_sequences)
    head = Head(
        path=path,
        origin=origin,
        mode=origin.identity.get("mode", ""),
        environment="",
        ids=[known.ids[row] for row in begun],
        lengths=latest.length[begun],
        finish_reason=latest.finish_reason[begun],
        has_prompts=known.text is not None,
        has_completions=decode is not None,
        ids_known=prompts is not None,
    )
    return Shard(head, lambda begin, end: gather(parts, latest, begun[begin:end], known, decode))


def _find_prompts(origin: Origin) -> Prompts | None:
    """The input that the job names, if it still is the one that the run was started with."""
    try:
        path = Path(schema.parse_json(origin.job)["input"]["file"])
        if not path.is_file():  # a device or a pipe would be read without end
            return None
        if schema.file_digest(path) not in origin.sources.values():
            return None
        prompts = read_inputs(path)
    except (DataError, KeyError, TypeError, ValueError):
        return None
    return prompts if len(prompts.ids) == origin.n_sequences else None


def _nameless(n: int) -> Prompts:
    return Prompts(
        ids=[str(row) for row in range(n)],
        tokens=[np.empty(0, dtype=np.int32)] * n,
        text=None,
        max_new_tokens=np.zeros(n, dtype=np.int32),
    )


# ---------------------------------------------------------------- merging


def merge_outputs(
    out: Path,
    paths: list[Path],
    *,
    overwrite: bool = False,
    decode: Callable[[Path], Decode | None] | None = None,
    window: int = WINDOW,
    mixed: bool = False,
    incomplete: bool = False,
) -> int:
    """Join outputs into one file; returns the number of sequences.

    Sequences stand in the order of the files; outputs of shards of one input in its order, whatever order they are
    given in. Unfinished runs are taken as far as they are committed. The job and environment are those of the first
    file, an identity that differs between the files is said to, and /sources names every file with its SHA-256.

    Args:
        decode: gives the decode function of an unfinished run, by its path.
        window: tokens to hold at a time.
        mixed: take files of different weights, options or libraries too.
        incomplete: take some shards of an input without the others.

    Raises:
        JobError: `out` exists, or is one of the files.
        DataError: one is missing or damaged, an id occurs twice, they don't belong together, or a shard is missing.
    """
    if out.resolve() in {path.resolve() for path in paths}:
        raise JobError(f"{out}: is the file to write and one of those to read")
    if (out.exists() and not overwrite) or committed_parts(out, PATTERN):
        raise JobError(f"{out}: exists already, or a run is writing it; give --overwrite, or another name")
    shards = [open_shard(path, decode(path) if decode else None) for path in paths]
    _one_mode([shard.head for shard in shards])
    if not mixed:
        check_alike([shard.head for shard in shards])
    shards = in_input_order(shards, incomplete=incomplete)
    heads = [shard.head for shard in shards]
    _check_ids(heads)
    origin = _merged_origin(heads)
    made_by = heads[0].environment if heads else ""
    with schema.create(out, "outputs", sources=origin.sources, job=origin.job, made_by=made_by) as file:
        texts = {
            "prompts": any(head.has_prompts for head in heads),
            "completions": any(head.has_completions for head in heads),
        }
        merged = OutputsFile(file, origin, _one_mode(heads), **texts)
        for shard in shards:
            for begin, end in ragged_ranges(shard.head.lengths, window):
                merged.append(shard.read(begin, end))
    return sum(len(head.ids) for head in heads)


def _merged_origin(heads: list[Head]) -> Origin:
    if not heads:
        return Origin("", {}, {}, 0)
    keys = sorted({key for head in heads for key in head.origin.identity})
    identity = {}
    for key in keys:
        values = {head.origin.identity.get(key, "not set") for head in heads}
        identity[key] = values.pop() if len(values) == 1 else "differs between the merged files"
    if all(head.finished == head.origin.n_sequences for head in heads) and is_whole(heads):
        # What one run of the whole input would have written.
        identity["inputs"] = identity.pop("whole_inputs")
        del identity["shard"]
    sources = {str(path): schema.file_digest(path) for head in heads for path in _files_of(head.path)}
    return replace(
        heads[0].origin,
        identity=identity,
        sources=sources,
        n_sequences=sum(head.origin.n_sequences for head in heads),
    )


def _files_of(path: Path) -> list[Path]:
    return [path] if path.exists() else committed_parts(path, PATTERN)


def _one_mode(heads: list[Head]) -> str:
    modes = {head.mode: head.path for head in heads if head.mode}
    if len(modes) > 1:
        text = ", ".join(f"{path} is {mode}" for mode, path in modes.items())
        raise DataError(f"outputs of different modes cannot be merged: {text}")
    return next(iter(modes), "")


def _check_ids(heads: list[Head]) -> None:
    for head in heads:
        if not head.ids_known:
            raise DataError(
                f"{head.path}: the run is unfinished and its input is not where the job says, or has changed, so that "
                "its sequences have no ids; put the input back, or finish the run"
            )
    twice = [name for name, count in Counter(one for head in heads for one in head.ids).items() if count > 1]
    if twice:
        where = [str(head.path) for head in heads if twice[0] in head.ids]
        raise DataError(f"{len(twice)} ids occur more than once, first {twice[0]!r} in {' and '.join(where)}")
