"""Completions, and the layout of the outputs file that holds them in input order.

/tokens int32 [sum], /logprobs float32 [sum], /offsets int64 [n + 1], /finish_reason int8 [n], /ids text
/prompt_tokens int32 [sum], /prompt_tokens_offsets int64 [n + 1], /prompt text, /completion text (where known)
/identity, /job, /environment, /run, /sources as JSON text; attributes mode, n_sequences
"""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import h5py
import numpy as np

from moempi.errors import DataError
from moempi.files import schema
from moempi.files.parts import Column, Offsets, TextColumn

FINISH_REASONS = ("length", "eos", "partial")
PARTIAL = FINISH_REASONS.index("partial")
# Of one run, which holds all its prompts in memory. Only a limit makes a part's word for it harmless: the tables
# of a resume are as long.
MOST_SEQUENCES = 2**24


@dataclass(frozen=True)
class Completion:
    """What was generated for one input sequence so far; "partial" where it is not finished."""

    index: int  # row of the input
    tokens: np.ndarray  # int32 [n]
    logprobs: np.ndarray  # float32 [n], natural logarithm
    finish_reason: str  # one of FINISH_REASONS


@dataclass(frozen=True)
class Origin:
    """Where completions come from; the parts of a run and its final file have it in common."""

    job: str  # the effective job, JSON text
    identity: dict[str, str]  # what must be the same for a resume
    sources: dict[str, str]  # {name: SHA-256 in hex}
    n_sequences: int  # of the whole input


@dataclass(frozen=True)
class Outputs:
    """Completions of many sequences with their prompts, in input order."""

    ids: list[str]
    tokens: np.ndarray  # int32 [sum], the new tokens
    logprobs: np.ndarray  # float32 [sum], natural logarithm
    offsets: np.ndarray  # int64 [n + 1] into tokens and logprobs
    finish_reason: np.ndarray  # int8 [n], an index into FINISH_REASONS
    prompt_tokens: np.ndarray  # int32 [sum]
    prompt_offsets: np.ndarray  # int64 [n + 1]
    prompts: list[str] | None
    completions: list[str] | None

    def __len__(self) -> int:
        return len(self.offsets) - 1

    def sequence(self, row: int) -> dict[str, Any]:
        """One sequence as plain values: id, prompt, completion, tokens, logprobs, finish_reason."""
        begin, end = int(self.offsets[row]), int(self.offsets[row + 1])
        return {
            "id": self.ids[row],
            "prompt": self.prompts[row] if self.prompts is not None else None,
            "completion": self.completions[row] if self.completions is not None else None,
            "tokens": self.tokens[begin:end].tolist(),
            # JSON knows no nan and no infinity.
            "logprobs": [one if math.isfinite(one) else None for one in self.logprobs[begin:end].tolist()],
            "finish_reason": FINISH_REASONS[self.finish_reason[row]],
        }


@dataclass(frozen=True)
class Head:
    """What is known of an outputs file, or of the commits of an unfinished run, without reading any tokens."""

    path: Path
    origin: Origin
    mode: str  # "exact", "fast"; "" where it is not known
    environment: str  # JSON text; "" while the run is unfinished
    ids: list[str]
    lengths: np.ndarray  # int64 [n], new tokens
    finish_reason: np.ndarray  # int8 [n], an index into FINISH_REASONS
    has_prompts: bool
    has_completions: bool
    ids_known: bool = True  # False: an unfinished run whose input was not found; ids are row numbers

    @property
    def finished(self) -> int:
        """How many sequences are finished."""
        return int(np.count_nonzero(self.finish_reason != PARTIAL))


def ragged_ranges(lengths: np.ndarray, most: int) -> list[tuple[int, int]]:
    """Cut ragged rows into ranges (begin, end) of at most `most` elements and rows each, and at least one row."""
    ends = np.cumsum(lengths)
    ranges, begin, taken = [], 0, 0
    while begin < len(ends):
        fitting = int(np.searchsorted(ends, taken + most, side="right"))
        end = max(begin + 1, min(fitting, begin + most))
        ranges.append((begin, end))
        begin, taken = end, int(ends[end - 1])
    return ranges


# ---------------------------------------------------------------- writing


class OutputsFile:
    """The columns of an outputs file that is being written, block by block."""

    def __init__(self, file: h5py.File, origin: Origin, mode: str, *, prompts: bool, completions: bool) -> None:
        schema.set_text_attribute(file, "mode", mode)
        file.attrs["n_sequences"] = origin.n_sequences
        schema.write_text(file, "identity", json.dumps(origin.identity, indent=2))
        self._tokens = Column(file, "tokens", "i4", text="new tokens of all sequences")
        self._logprobs = Column(file, "logprobs", "f4", text="log-probability of every new token", units="nat")
        self._offsets = Offsets(file, "offsets", "where each sequence begins and ends in tokens and logprobs")
        self._reasons = Column(file, "finish_reason", "i1", text="why a sequence ended")
        schema.set_text_attribute(self._reasons.dataset, "legend", ",".join(FINISH_REASONS))
        self._ids = TextColumn(file, "ids", "id of every sequence")
        self._prompt_tokens = Column(file, "prompt_tokens", "i4", text="prompt tokens of all sequences")
        self._prompt_offsets = Offsets(file, "prompt_tokens_offsets", "where each prompt begins and ends")
        self._prompts = TextColumn(file, "prompt", "prompt of every sequence") if prompts else None
        self._completions = TextColumn(file, "completion", "completion of every sequence") if completions else None

    def append(self, block: Outputs) -> None:
        """Append sequences; a text that the block does not have is stored as ""."""
        self._tokens.append(block.tokens)
        self._logprobs.append(block.logprobs)
        self._offsets.append(np.diff(block.offsets))
        self._reasons.append(block.finish_reason)
        self._ids.append(block.ids)
        self._prompt_tokens.append(block.prompt_tokens)
        self._prompt_offsets.append(np.diff(block.prompt_offsets))
        for column, texts in ((self._prompts, block.prompts), (self._completions, block.completions)):
            if column is not None:
                column.append(texts if texts is not None else [""] * len(block))


# ---------------------------------------------------------------- reading


def read_head(path: Path) -> Head:
    """Everything of an outputs file but its tokens, logprobs and texts.

    Raises:
        DataError: missing, damaged, or its columns do not fit together.
    """
    with schema.open_file(path, "outputs") as file:
        offsets = schema.read_offsets(file, "offsets", len(file["tokens"]))
        _check_columns(file, path, len(offsets) - 1)
        return Head(
            path=path,
            origin=read_origin(file),
            mode=schema.text_attribute(file, "mode"),
            environment=schema.read_text(file, "environment") if "environment" in file else "",
            ids=schema.read_ragged_text(file, "ids"),
            lengths=np.diff(offsets),
            finish_reason=file["finish_reason"][...].astype(np.int8, copy=False),
            has_prompts="prompt" in file,
            has_completions="completion" in file,
        )


def read_final(path: Path, begin: int = 0, end: int | None = None) -> Outputs:
    """Sequences begin..end of an outputs file; no others are read.

    Raises:
        DataError: missing, damaged, or its columns do not fit together.
    """
    with schema.open_file(path, "outputs") as file:
        offsets = schema.read_offsets(file, "offsets", len(file["tokens"]))
        prompt_offsets = schema.read_offsets(file, "prompt_tokens_offsets", len(file["prompt_tokens"]))
        _check_columns(file, path, len(offsets) - 1)
        rows = slice(*slice(begin, end).indices(len(offsets) - 1))
        return Outputs(
            ids=_texts(file, "ids", rows) or [],
            tokens=_ragged(file["tokens"], offsets, rows).astype(np.int32, copy=False),
            logprobs=_ragged(file["logprobs"], offsets, rows).astype(np.float32, copy=False),
            offsets=_rebased(offsets, rows),
            finish_reason=file["finish_reason"][rows].astype(np.int8, copy=False),
            prompt_tokens=_ragged(file["prompt_tokens"], prompt_offsets, rows).astype(np.int32, copy=False),
            prompt_offsets=_rebased(prompt_offsets, rows),
            prompts=_texts(file, "prompt", rows),
            completions=_texts(file, "completion", rows),
        )


def read_origin(file: h5py.File) -> Origin:
    """Job, identity, sources and number of sequences of an outputs file or a part of one."""
    job = schema.read_text(file, "job") if "job" in file else ""
    n = schema.whole_attribute(file, "n_sequences", MOST_SEQUENCES)
    return Origin(job, _json_object(file, "identity"), _json_object(file, "sources"), n)


def _json_object(file: h5py.File, name: str) -> dict[str, str]:
    try:
        found = schema.parse_json(schema.read_text(file, name))
    except ValueError:
        found = None
    if not isinstance(found, dict) or not all(isinstance(value, str) for value in found.values()):
        raise DataError(f"{file.filename}: /{name} is not a JSON object of texts")
    return found


def check_values(path: Path, n_tokens: int, n_logprobs: int, n: int, reasons: np.ndarray) -> None:
    """Raises DataError unless every token has a logprob and each of `n` sequences a known finish reason."""
    if n_tokens != n_logprobs:
        raise DataError(f"{path}: {n_logprobs} logprobs for {n_tokens} tokens")
    if len(reasons) != n:
        raise DataError(f"{path}: finish_reason of {len(reasons)} sequences, expected {n}")
    if reasons.dtype.kind not in "iu" or np.any((reasons < 0) | (reasons >= len(FINISH_REASONS))):
        raise DataError(f"{path}: finish_reason holds values outside 0..{len(FINISH_REASONS) - 1}")


def _check_columns(file: h5py.File, path: Path, n: int) -> None:
    check_values(path, len(file["tokens"]), len(file["logprobs"]), n, file["finish_reason"][...])
    for name in ("ids_offsets", "prompt_tokens_offsets", "prompt_offsets", "completion_offsets"):
        if name in file and len(file[name]) != n + 1:
            raise DataError(f"{path}: /{name} is for {len(file[name]) - 1} sequences, /offsets for {n}")


def _ragged(dataset: h5py.Dataset, offsets: np.ndarray, rows: slice) -> np.ndarray:
    return np.asarray(dataset[int(offsets[rows.start]) : int(offsets[max(rows.start, rows.stop)])])


def _rebased(offsets: np.ndarray, rows: slice) -> np.ndarray:
    return offsets[rows.start : max(rows.start, rows.stop) + 1] - offsets[rows.start]


def _texts(file: h5py.File, name: str, rows: slice) -> list[str] | None:
    if name not in file:
        return None
    ends = schema.read_offsets(file, f"{name}_offsets", len(file[name]))
    raw = bytes(np.asarray(_ragged(file[name], ends, rows), dtype=np.uint8))
    return [raw[a:b].decode(errors="replace") for a, b in pairwise(_rebased(ends, rows))]
