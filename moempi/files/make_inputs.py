"""JSON lines of prompts into an inputs file, with the tokenizer of a weights file.

One object a line: {"id": "a", "prompt": "text"} or {"id": "a", "tokens": [1, 2]}, with "max_new_tokens" if wanted.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import tokenizers

from moempi.errors import DataError
from moempi.files import schema
from moempi.files.inputs import Prompts, check_prompts, write_inputs
from moempi.files.weights import TOKENIZER, Weights, open_weights
from moempi.model.huggingface import json_object

_KEYS = ("id", "prompt", "tokens", "max_new_tokens")
_INT32 = 2**31 - 1


def make_inputs(jsonl_path: Path, weights_path: Path, out: Path) -> None:
    """Tokenize prompts and write them; what the model of `weights_path` could not run is refused.

    Token lists are what the tokenizer makes of the text and nothing else. Empty lines are skipped.

    Raises:
        DataError: naming the file and line, or the prompt, and what is wrong with it.
    """
    lines = _read_lines(jsonl_path)
    with open_weights(weights_path) as weights:
        sources = _sources(jsonl_path, weights)
        prompts = _tokenize(lines, weights.tokenizer(), jsonl_path)
        # A job adds one token at least: longer prompts fit no job at all.
        check_prompts(prompts, jsonl_path, weights.config, max_new_tokens=1)
    write_inputs(out, prompts, sources)


def _sources(jsonl_path: Path, weights: Weights) -> dict[str, str]:
    sources = {jsonl_path.name: schema.file_digest(jsonl_path)}
    raw = weights.checkpoint_file(TOKENIZER)
    return sources if raw is None else sources | {TOKENIZER: hashlib.sha256(raw).hexdigest()}


@dataclass(frozen=True)
class _Line:
    where: str
    id: str
    prompt: str | None
    tokens: list[int] | None
    max_new_tokens: int


def _read_lines(path: Path) -> list[_Line]:
    lines: list[_Line] = []
    seen: dict[str, str] = {}
    for where, raw in _numbered(path):
        line = _parse(raw, where)
        if line.id in seen:
            raise DataError(f"{where}: id {line.id!r} is taken: see {seen[line.id]}")
        seen[line.id] = where
        lines.append(line)
    return lines


def _numbered(path: Path) -> Iterator[tuple[str, bytes]]:
    try:
        with path.open("rb") as stream:
            for number, raw in enumerate(stream, 1):
                if raw.strip():
                    yield f"{path}: line {number}", raw
    except OSError as error:
        raise DataError(f"{path}: cannot be read: {error.strerror}") from None


def _parse(raw: bytes, where: str) -> _Line:
    found = json_object(raw, where)
    unknown = sorted(set(found) - set(_KEYS))
    if unknown:
        raise DataError(f"{where}: unknown key {unknown[0]!r}; expected {', '.join(_KEYS)}")
    if ("prompt" in found) == ("tokens" in found):
        raise DataError(f"{where}: expected either `prompt` or `tokens`")
    if "id" not in found:
        raise DataError(f'{where}: has no `id`; every prompt needs one of its own, like "id": "a"')
    return _Line(
        where,
        _text(str(found["id"]) if _is_whole(found.get("id")) else found.get("id"), "id", where),
        _text(found["prompt"], "prompt", where) if "prompt" in found else None,
        _tokens(found["tokens"], where) if "tokens" in found else None,
        _count(found.get("max_new_tokens", 0), where),
    )


def _text(value: Any, key: str, where: str) -> str:
    if not isinstance(value, str) or not value:
        raise DataError(f"{where}: {key} = {value!r}; expected a text that is not empty")
    try:
        value.encode()
    except UnicodeEncodeError:
        raise DataError(f"{where}: {key} has half of a surrogate pair, which is no character") from None
    return value


def _tokens(value: Any, where: str) -> list[int]:
    if not isinstance(value, list) or not value or not all(_is_whole(token) for token in value):
        raise DataError(f"{where}: tokens must be a list of whole numbers that is not empty")
    outside = next((token for token in value if not 0 <= token <= _INT32), None)
    if outside is not None:
        raise DataError(f"{where}: token {outside} is outside every vocabulary")
    return value


def _count(value: Any, where: str) -> int:
    if not _is_whole(value) or not 0 <= value <= _INT32:
        raise DataError(f"{where}: max_new_tokens = {value!r}; expected 0 (the job's default) or more")
    return int(value)


def _is_whole(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _tokenize(lines: list[_Line], tokenizer: tokenizers.Tokenizer | None, path: Path) -> Prompts:
    untokenized = [line for line in lines if line.tokens is None]
    if untokenized and tokenizer is None:
        raise DataError(f"{untokenized[0].where}: the weights file has no tokenizer; give `tokens`, not `prompt`")
    encoded = iter(tokenizer.encode_batch([line.prompt or "" for line in untokenized]) if tokenizer else [])
    tokens = [line.tokens if line.tokens is not None else next(encoded).ids for line in lines]
    empty = next((line for line, row in zip(lines, tokens, strict=True) if not row), None)
    if empty:
        raise DataError(f"{empty.where}: the tokenizer makes no token of this prompt")
    return Prompts(
        ids=[line.id for line in lines],
        tokens=[np.array(row, dtype=np.int32) for row in tokens],
        text=_texts(lines, tokenizer),
        max_new_tokens=np.array([line.max_new_tokens for line in lines], dtype=np.int32),
    )


def _texts(lines: list[_Line], tokenizer: tokenizers.Tokenizer | None) -> list[str] | None:
    if tokenizer is None:
        return None
    return [line.prompt or tokenizer.decode(line.tokens or [], skip_special_tokens=False) for line in lines]
