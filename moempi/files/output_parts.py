"""The part files of an output: commits of completions, and the final file that is assembled from them.

A part holds the completions that became ready between two commits, finished or not; of several completions of one
sequence the one with the highest commit number counts.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from moempi.errors import DataError
from moempi.files import schema
from moempi.files.completions import (
    FINISH_REASONS,
    PARTIAL,
    Completion,
    Origin,
    Outputs,
    OutputsFile,
    check_values,
    ragged_ranges,
    read_origin,
)
from moempi.files.parts import committed_parts, parts_folder

if TYPE_CHECKING:
    from moempi.files.inputs import Prompts

PATTERN = "part-*.h5"
WINDOW = 2**26  # tokens that are held at a time while the final file is assembled

Decode = Callable[[list[int]], str]


@dataclass(frozen=True)
class Part:
    """Which sequences a part file holds; their tokens stay on the disk."""

    path: Path
    commit: int
    origin: Origin
    index: np.ndarray  # int64 [m], rows of the input
    finish_reason: np.ndarray  # int8 [m]
    offsets: np.ndarray  # int64 [m + 1]


def write_part(
    target: Path, commit: int, completions: Sequence[Completion], origin: Origin, check: Callable[[], None]
) -> None:
    """Commit completions as `<target>.parts/part-<commit>.h5`; once this returns they outlive any crash.

    Args:
        check: called when all is written and before it counts; it raises where this run may not write any more.

    Raises:
        DataError: it cannot be written, or another run has made a commit of that number.
    """
    path = parts_folder(target) / f"part-{commit:08d}.h5"
    with schema.create(path, "outputs-part", sources=origin.sources, before=check, new=True) as file:
        file.attrs["commit"] = commit
        file.attrs["n_sequences"] = origin.n_sequences
        schema.write_text(file, "job", origin.job)
        schema.write_text(file, "identity", json.dumps(origin.identity))
        file["index"] = np.array([one.index for one in completions], dtype=np.int64)
        file["finish_reason"] = np.array([FINISH_REASONS.index(one.finish_reason) for one in completions], np.int8)
        file["offsets"] = np.cumsum([0, *(len(one.tokens) for one in completions)], dtype=np.int64)
        file["tokens"] = _joined([one.tokens for one in completions], np.int32)
        file["logprobs"] = _joined([one.logprobs for one in completions], np.float32)


def _joined(arrays: list[np.ndarray], dtype: type) -> np.ndarray:
    return np.concatenate([np.empty(0, dtype), *arrays]).astype(dtype, copy=False)


# ---------------------------------------------------------------- reading


def read_parts(target: Path) -> list[Part]:
    """What the committed parts of a target hold, by rising commit number.

    Raises:
        DataError: naming the part that is damaged, or that belongs to another run than the rest.
    """
    parts = sorted((_read_part(path) for path in committed_parts(target, PATTERN)), key=lambda part: part.commit)
    for part in parts:
        if part.origin.n_sequences != parts[0].origin.n_sequences or part.origin.identity != parts[0].origin.identity:
            raise DataError(
                f"{part.path}: belongs to another run than {parts[0].path.name} beside it (another input, model or "
                "option); move the one away that does not belong there"
            )
    return parts


def first_origin(target: Path) -> Origin | None:
    """Where the commits of an unfinished run come from; None where there are none."""
    paths = committed_parts(target, PATTERN)
    return _read_part(paths[0]).origin if paths else None


def _read_part(path: Path) -> Part:
    try:
        with schema.open_file(path, "outputs-part") as file:
            origin, commit = read_origin(file), int(file.attrs["commit"])
            index, reasons = file["index"][...].astype(np.int64), file["finish_reason"][...]
            offsets = schema.read_offsets(file, "offsets", len(file["tokens"]))
            check_values(path, len(file["tokens"]), len(file["logprobs"]), len(index), reasons)
            if len(offsets) != len(index) + 1 or np.any((index < 0) | (index >= origin.n_sequences)):
                raise DataError(f"{path}: /index does not fit /offsets or an input of {origin.n_sequences} sequences")
            return Part(path, commit, origin, index, reasons.astype(np.int8), offsets)
    except DataError as error:
        raise DataError(
            f"{error}\n{path} was committed; without it a resumed run computes its sequences once more: to do so, move "
            "it away and use --resume"
        ) from error


def read_values(part: Part) -> tuple[np.ndarray, np.ndarray]:
    """Tokens int32 [sum] and logprobs float32 [sum] of a part."""
    with schema.open_file(part.path, "outputs-part") as file:
        return file["tokens"][...].astype(np.int32, copy=False), file["logprobs"][...].astype(np.float32, copy=False)


@dataclass(frozen=True)
class Latest:
    """The newest completion of every sequence of the input: where it lies and what is known without reading it."""

    part: np.ndarray  # int32 [n], position in the list of parts; -1: none
    row: np.ndarray  # int64 [n], row in that part
    length: np.ndarray  # int64 [n], new tokens
    finish_reason: np.ndarray  # int8 [n]; partial where there is none


def latest_of(parts: list[Part], n_sequences: int) -> Latest:
    """Look through parts in the order of their commits: a later one counts."""
    latest = Latest(
        part=np.full(n_sequences, -1, dtype=np.int32),
        row=np.zeros(n_sequences, dtype=np.int64),
        length=np.zeros(n_sequences, dtype=np.int64),
        finish_reason=np.full(n_sequences, PARTIAL, dtype=np.int8),
    )
    for number, part in enumerate(parts):
        latest.part[part.index] = number
        latest.row[part.index] = np.arange(len(part.index))
        latest.length[part.index] = np.diff(part.offsets)
        latest.finish_reason[part.index] = part.finish_reason
    return latest


def restore_partial(parts: list[Part], latest: Latest) -> dict[int, Completion]:
    """The sequences that are begun and not finished, by row of the input; the tokens of all others stay on the disk."""
    begun = np.flatnonzero((latest.part >= 0) & (latest.finish_reason == PARTIAL))
    restored = {}
    for number in np.unique(latest.part[begun]):
        tokens, logprobs = read_values(parts[number])
        for index in begun[latest.part[begun] == number].tolist():
            begin, end = parts[number].offsets[latest.row[index] :][:2]
            # Copies: a view keeps all of its part in memory.
            values = tokens[begin:end].copy(), logprobs[begin:end].copy()
            restored[index] = Completion(index, *values, FINISH_REASONS[PARTIAL])
    return restored


# ---------------------------------------------------------------- putting together


def gather(
    parts: list[Part], latest: Latest, sequences: np.ndarray, prompts: Prompts, decode: Decode | None
) -> Outputs:
    """The newest completions of some sequences (int64 [m], rising), with their prompts, as one block."""
    offsets = np.concatenate([[0], np.cumsum(latest.length[sequences])]).astype(np.int64)
    tokens, logprobs = np.empty(offsets[-1], np.int32), np.empty(offsets[-1], np.float32)
    # Visit each part once, for all of the block's sequences that lie in it.
    order = np.argsort(latest.part[sequences], kind="stable")
    numbers, begins = np.unique(latest.part[sequences[order]], return_index=True)
    for number, mine in zip(numbers, np.split(order, begins[1:]), strict=False):
        lengths = latest.length[sequences[mine]]
        source = _ranges(parts[number].offsets[latest.row[sequences[mine]]], lengths)
        place = _ranges(offsets[mine], lengths)
        found_tokens, found_logprobs = read_values(parts[number])
        tokens[place], logprobs[place] = found_tokens[source], found_logprobs[source]
    chosen = [prompts.tokens[row] for row in sequences]
    return Outputs(
        ids=[prompts.ids[row] for row in sequences],
        tokens=tokens,
        logprobs=logprobs,
        offsets=offsets,
        finish_reason=latest.finish_reason[sequences],
        prompt_tokens=_joined(chosen, np.int32),
        prompt_offsets=np.cumsum([0, *map(len, chosen)], dtype=np.int64),
        prompts=None if prompts.text is None else [prompts.text[row] for row in sequences],
        completions=None if decode is None else _decoded(tokens, offsets, decode),
    )


def _ranges(begins: np.ndarray, lengths: np.ndarray) -> np.ndarray:
    """begins[0], begins[0] + 1, ... (lengths[0] of them), then begins[1], ...: int64 [sum of lengths]."""
    ends = np.cumsum(lengths)
    return np.repeat(begins - (ends - lengths), lengths) + np.arange(ends[-1] if len(ends) else 0)


def _decoded(tokens: np.ndarray, offsets: np.ndarray, decode: Decode) -> list[str]:
    return [decode(tokens[a:b].tolist()) for a, b in pairwise(offsets)]


def assemble(
    target: Path,
    origin: Origin,
    prompts: Prompts,
    meta: Mapping[str, Any],
    check: Callable[[], None],
    window: int = WINDOW,
) -> None:
    """Write the final file from the parts of a finished run, in input order; the parts stay.

    Args:
        prompts: the whole input.
        meta: `mode` ("exact" or "fast"); `decode` (tokens -> text), where there is a tokenizer; anything else is
            stored as JSON text in /run.
        check: called before the file counts; it raises where this run may not write any more.
        window: tokens to hold at a time.

    Raises:
        DataError: a sequence is not finished, or the file cannot be written.
    """
    parts = read_parts(target)
    latest = latest_of(parts, origin.n_sequences)
    _check_finished(target, latest, prompts)
    measured = {key: value for key, value in meta.items() if key not in ("mode", "decode")}
    decode = meta.get("decode")
    with schema.create(target, "outputs", sources=origin.sources, job=origin.job, before=check) as file:
        texts = {"prompts": prompts.text is not None, "completions": decode is not None}
        final = OutputsFile(file, origin, meta["mode"], **texts)
        schema.write_text(file, "run", json.dumps(measured, indent=2))
        for begin, end in ragged_ranges(latest.length, window):
            final.append(gather(parts, latest, np.arange(begin, end), prompts, decode))


def _check_finished(target: Path, latest: Latest, prompts: Prompts) -> None:
    if len(prompts.ids) != len(latest.part):
        raise DataError(f"{target}: {len(prompts.ids)} prompts for {len(latest.part)} sequences")
    open_rows = np.flatnonzero(latest.finish_reason == PARTIAL)
    if len(open_rows):
        first = prompts.ids[open_rows[0]]
        raise DataError(f"{target}: {len(open_rows)} of {len(latest.part)} sequences are not finished, first {first!r}")
