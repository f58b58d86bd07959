"""The inputs file (moempi-inputs 1): ragged token sequences with ids, made from JSON lines or by a program.

/tokens int32 [sum], /offsets int64 [n+1]      sequence i is tokens[offsets[i]:offsets[i+1]]
/ids, /text                                    ragged text, in the same order; text only where there is any
/max_new_tokens int32 [n]                      0: the job's default
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import h5py
import numpy as np

from moempi.errors import DataError
from moempi.files import schema
from moempi.model.config import ModelConfig
from moempi.model.huggingface import json_object


@dataclass(frozen=True)
class Prompts:
    """n prompts in input order. The arrays may be views of one buffer: don't write to them."""

    ids: list[str]
    tokens: list[np.ndarray]  # int32 each
    text: list[str] | None
    max_new_tokens: np.ndarray  # int32 [n], 0: the job's default


def write_inputs(path: Path, prompts: Prompts, sources: Mapping[str, str], shard: str = "") -> None:
    """Write an inputs file; an existing one is replaced. `sources` is {name: SHA-256} of what it is made from.

    Args:
        shard: which part of another input this is, as `files.shards` stamps it; "": a whole one.

    Raises:
        DataError: the file cannot be written, or two prompts have the same id.
    """
    _refuse_duplicates(prompts.ids, path)
    lengths = [len(tokens) for tokens in prompts.tokens]
    flat = np.concatenate([np.empty(0, np.int32), *prompts.tokens]).astype(np.int32, copy=False)
    with schema.create(path, "inputs", sources=sources) as file:
        schema.write_column(file, "tokens", flat, text="token ids of all prompts, one after the other")
        ends = np.cumsum([0, *lengths], dtype=np.int64)
        schema.write_column(file, "offsets", ends, text="prompt i is tokens[offsets[i]:offsets[i+1]]")
        schema.write_ragged_text(file, "ids", prompts.ids)
        if prompts.text is not None:
            schema.write_ragged_text(file, "text", prompts.text)
        own = prompts.max_new_tokens.astype(np.int32, copy=False)
        schema.write_column(file, "max_new_tokens", own, units="tokens", text="most new tokens; 0: the job's default")
        if shard:
            schema.write_text(file, "shard", shard)


def read_inputs(path: Path) -> Prompts:
    """Read an inputs file whole; its columns are checked against one another, tokens are not (`check_prompts`).

    Raises:
        DataError: naming the dataset, what was found and what was expected.
    """
    with schema.open_file(path, "inputs") as file:
        tokens = _column(file, "tokens")
        _need(file, "offsets", "ids", "ids_offsets")
        ends = schema.read_offsets(file, "offsets", len(tokens))
        n = len(ends) - 1
        ids = schema.read_ragged_text(file, "ids")
        text = schema.read_ragged_text(file, "text") if "text" in file else None
        own = _column(file, "max_new_tokens")
    for name, found in (("ids", len(ids)), ("max_new_tokens", len(own)), ("text", n if text is None else len(text))):
        if found != n:
            raise DataError(f"{path}: /{name} has {found} entries; /offsets says that there are {n} prompts")
    _refuse_duplicates(ids, path)
    return Prompts(ids, [tokens[a:b] for a, b in pairwise(ends.tolist())], text, own)


def _column(file: h5py.File, name: str) -> np.ndarray:
    _need(file, name)
    dataset = file[name]
    if dataset.ndim != 1 or dataset.dtype != np.int32:
        raise DataError(f"{file.filename}: /{name} is {dataset.dtype} {list(dataset.shape)}; expected int32 [n]")
    return np.asarray(dataset[...])


def _need(file: h5py.File, *names: str) -> None:
    for name in names:
        if not isinstance(file.get(name), h5py.Dataset):
            raise DataError(f"{file.filename}: /{name} is missing; make the file again with `moempi inputs make`")


def _refuse_duplicates(ids: list[str], path: Path) -> None:
    if len(set(ids)) == len(ids):
        return
    seen: dict[str, int] = {}
    for index, name in enumerate(ids):
        if name in seen:
            raise DataError(f"{path}: prompts {seen[name]} and {index} have the same id {name!r}; ids must differ")
        seen[name] = index


def check_prompts(prompts: Prompts, path: Path, config: ModelConfig, max_new_tokens: int) -> None:
    """Refuse what the model cannot run; `max_new_tokens` is the job's default. Call before any rank allocates.

    Raises:
        DataError: naming the file, the first such prompt and what is wrong with it.
    """
    if not prompts.ids:
        return
    lengths = np.array([len(tokens) for tokens in prompts.tokens], dtype=np.int64)
    own = prompts.max_new_tokens.astype(np.int64)
    new = np.where(own == 0, max_new_tokens, own)
    _refuse_first(lengths == 0, prompts, path, lambda i: "is empty; a prompt needs at least one token")
    _refuse_first(own < 0, prompts, path, lambda i: f"has max_new_tokens = {own[i]}; expected 0 (the default) or more")
    _refuse_tokens(prompts, path, lengths, config.vocab)
    _refuse_first(
        lengths + new > config.max_positions,
        prompts,
        path,
        lambda i: (
            f"has {lengths[i]} tokens and may get {new[i]} new ones; the model takes {config.max_positions} in all: "
            "shorten it or lower max_new_tokens"
        ),
    )


def _refuse_tokens(prompts: Prompts, path: Path, lengths: np.ndarray, vocab: int) -> None:
    flat = np.concatenate(prompts.tokens)
    outside = (flat < 0) | (flat >= vocab)
    if not outside.any():
        return
    at = int(np.argmax(outside))
    ends = np.cumsum(lengths)
    index = int(np.searchsorted(ends, at, side="right"))
    place = at - int(ends[index] - lengths[index])
    raise DataError(
        f"{path}: prompt {prompts.ids[index]!r} (number {index}) has token {flat[at]} at position {place}; "
        f"the model's vocabulary is 0 to {vocab - 1}"
    )


def _refuse_first(bad: np.ndarray, prompts: Prompts, path: Path, what: Callable[[int], str]) -> None:
    if bad.any():
        index = int(np.argmax(bad))
        raise DataError(f"{path}: prompt {prompts.ids[index]!r} (number {index}) {what(index)}")


def info(path: Path) -> dict[str, Any]:
    """What `moempi inputs info` shows: counts and lengths, JSON-ready."""
    prompts = read_inputs(path)
    lengths = np.array([len(tokens) for tokens in prompts.tokens] or [0])
    with schema.open_file(path, "inputs") as file:
        sources = schema.read_text(file, "sources")
    return {
        "file": str(path),
        "prompts": len(prompts.ids),
        "tokens": int(lengths.sum()),
        "shortest": int(lengths.min()),
        "median": float(np.median(lengths)),
        "longest": int(lengths.max()),
        "with_text": prompts.text is not None,
        "with_own_max_new_tokens": int(np.count_nonzero(prompts.max_new_tokens)),
        "sources": json_object(sources, f"{path}: /sources"),
    }
