"""A Hugging Face checkpoint (safetensors) into a weights file, in bounded memory.

Names, shapes and dtypes are checked before anything is written, numbers while they pass. Only safetensors
are read: other formats are pickles, which can run code.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import h5py
import numpy as np
import torch

from moempi.errors import DataError
from moempi.files import schema
from moempi.files.safetensors_file import DTYPES, Stored, read_header, read_rows
from moempi.files.tensors import BLOCK, Put, filling, row_blocks
from moempi.files.weights import GENERATION_CONFIG, TOKENIZER, parse_tokenizer
from moempi.model.huggingface import (
    LONG_NAMES,
    Piece,
    Shape,
    dataset_shapes,
    fused_name,
    json_object,
    parse_config,
    parse_generation_config,
    pieces,
)

SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"
# Files of a checkpoint above this are no config and no tokenizer; they are left out.
SMALL_FILE = 64 * 2**20
_PICKLES = (".bin", ".pt", ".pth", ".ckpt")


def import_checkpoint(folder: Path, out: Path, *, block: int = BLOCK) -> None:
    """Make a weights file from a checkpoint folder; an existing `out` is replaced when all has gone well.

    Args:
        folder: holds config.json and model.safetensors, or shards with model.safetensors.index.json.
        out: the weights file.
        block: most bytes of a piece of a tensor; two pieces are in memory at a time.

    Raises:
        DataError: a file is missing or not safetensors; a tensor is missing, unknown, of a wrong shape or dtype,
            or holds NaN or infinity.
    """
    _check_folder(folder)
    config_text = read_small_file(folder / "config.json")
    shapes = dataset_shapes(parse_config(config_text, str(folder / "config.json")))
    checkpoint = _find_tensors(folder)
    fused = {name for name in shapes if fused_name(name) in checkpoint.tensors}
    table = {name: pieces(name, shape, name in fused) for name, shape in shapes.items()}
    dtype = _check_tensors(checkpoint, [piece for row in table.values() for piece in row])
    with schema.create(out, "weights", sources=checkpoint.digests()) as file:
        write_bytes(file, "config", config_text)
        for name, raw in _small_files(folder):
            write_bytes(file.require_group("checkpoint"), name, raw)
        model = file.require_group("model")
        for name, row in table.items():
            with filling(model, name, shapes[name], dtype, long_name(name)) as put:
                _copy(checkpoint, row, put, block)
            if name in fused:
                mark_fused(model[name])


def _check_folder(folder: Path) -> None:
    """Refuse what is no checkpoint, saying what was looked for and what is there."""
    if not folder.is_dir():
        raise DataError(f"{folder}: there is no such folder; expected a checkpoint in the Hugging Face format")
    if (folder / "config.json").exists():
        return
    names = sorted(path.name for path in folder.iterdir())
    here = ", ".join(names[:5]) + (", ..." if len(names) > 5 else "") if names else "nothing"
    raise DataError(
        f"{folder}: is no checkpoint: there is no config.json in it (expected that and {SINGLE}, or shards and "
        f"{INDEX}; found {here})"
    )


def mark_fused(dataset: h5py.Dataset) -> None:
    """Say that the checkpoint had this dataset in one tensor; without the mark: one per projection and expert."""
    schema.set_text_attribute(dataset, "checkpoint_form", "fused")


def long_name(dataset: str) -> str:
    """What a dataset holds, in words, with its dimensions."""
    return LONG_NAMES[dataset.rpartition("/")[2]]


def write_bytes(group: h5py.Group, name: str, raw: bytes) -> None:
    """A small file as a uint8 dataset with its `sha256`."""
    dataset = group.create_dataset(name, data=np.frombuffer(raw, dtype=np.uint8))
    schema.set_text_attribute(dataset, "content", "bytes of a file, verbatim")
    schema.set_text_attribute(dataset, "sha256", hashlib.sha256(raw).hexdigest())


def read_small_file(path: Path) -> bytes:
    """The bytes of a file.

    Raises:
        DataError: it cannot be read.
    """
    try:
        return path.read_bytes()
    except OSError as error:
        raise DataError(f"{path}: cannot be read: {error.strerror}") from None


def _small_files(folder: Path) -> Iterator[tuple[str, bytes]]:
    for path in sorted(folder.iterdir()):
        if path.is_file() and not path.name.startswith(".") and _is_kept(path):
            raw = read_small_file(path)
            # What a later run needs is read once now, so that a file that was made can also be used.
            if path.name == GENERATION_CONFIG:
                parse_generation_config(raw, str(path))
            if path.name == TOKENIZER:
                parse_tokenizer(raw, str(path))
            yield path.name, raw


def _is_kept(path: Path) -> bool:
    known = path.name == "config.json" or path.suffix in (".safetensors", *_PICKLES)
    return not known and path.stat().st_size <= SMALL_FILE


# ---------------------------------------------------------------- the checkpoint's files


@dataclass(frozen=True)
class _Checkpoint:
    """The safetensors of a folder."""

    folder: Path
    tensors: dict[str, Stored]

    def where(self, name: str) -> str:
        return f"{self.tensors[name].path}: tensor {name}"

    def digests(self) -> dict[str, str]:
        files = {stored.path for stored in self.tensors.values()}
        return {path.name: schema.file_digest(path) for path in sorted({self.folder / "config.json", *files})}


def _find_tensors(folder: Path) -> _Checkpoint:
    tensors: dict[str, Stored] = {}
    for file, expected in _files_of(folder).items():
        found = read_header(folder / file)
        if expected is not None and set(found) != expected:
            name = min(set(found) ^ expected)
            has, lacks = (INDEX, file) if name in expected else (file, INDEX)
            raise DataError(f"{folder}: {has} has tensor {name} in {file}, but {lacks} does not")
        tensors |= found
    return _Checkpoint(folder, tensors)


def _files_of(folder: Path) -> dict[str, set[str] | None]:
    """{file: the tensors that the index says are in it, None where there is no index}."""
    if (folder / SINGLE).is_file():
        return {SINGLE: None}
    if (folder / INDEX).is_file():
        return dict(shards_of(read_small_file(folder / INDEX), str(folder / INDEX)))
    pickles = sorted(path.name for path in folder.iterdir() if path.suffix in _PICKLES)
    hint = f"; {pickles[0]} may be a pickle, which is not read: save it as safetensors first" if pickles else ""
    raise DataError(f"{folder}: has neither {SINGLE} nor {INDEX}{hint}")


def shards_of(index: bytes, where: str) -> dict[str, set[str]]:
    """{file: its tensors} of a model.safetensors.index.json.

    Raises:
        DataError: it has no such table, or a file in it does not lie beside it.
    """
    table = json_object(index, where).get("weight_map")
    if not isinstance(table, dict) or not table:
        raise DataError(f"{where}: has no `weight_map`")
    shards: dict[str, set[str]] = {}
    for tensor, file in table.items():
        if not isinstance(file, str) or not is_plain_name(file) or not file.endswith(".safetensors"):
            raise DataError(f"{where}: tensor {tensor} should be in {file!r}; expected a .safetensors file beside it")
        shards.setdefault(file, set()).add(tensor)
    return shards


def is_plain_name(name: str) -> bool:
    """Whether a name that a file gave us stays inside the folder that it is joined to."""
    return bool(name) and name not in (".", "..") and not set(name) & set("/\\\0")


# ---------------------------------------------------------------- checks, then numbers


def _check_tensors(checkpoint: _Checkpoint, table: list[Piece]) -> torch.dtype:
    expected = {piece.tensor: piece.shape for piece in table}
    _check_names(checkpoint, expected)
    for name, shape in expected.items():
        found = checkpoint.tensors[name].shape
        if found != shape:
            raise DataError(f"{checkpoint.where(name)} has shape {list(found)}; the config says {list(shape)}")
    return _one_dtype(checkpoint, list(expected))


def _check_names(checkpoint: _Checkpoint, expected: dict[str, Shape]) -> None:
    missing = [name for name in expected if name not in checkpoint.tensors]
    if missing:
        raise DataError(
            f"{checkpoint.folder}: {_some(missing)} of {len(expected)} tensors that config.json asks for "
            f"are missing ({missing[0]}: expected {list(expected[missing[0]])})"
        )
    unknown = sorted(name for name in checkpoint.tensors if name not in expected)
    if unknown == ["lm_head.weight"]:
        raise DataError(
            f"{checkpoint.where('lm_head.weight')} is not expected: tie_word_embeddings is true in config.json. "
            "Remove the tensor if it equals the embedding; else set tie_word_embeddings to false"
        )
    if unknown:
        raise DataError(f"{checkpoint.folder}: {_some(unknown)} unknown tensors for the model of config.json")


def _some(names: list[str]) -> str:
    shown = ", ".join(names[:3]) + (", ..." if len(names) > 3 else "")
    return f"{len(names)} ({shown})"


def _one_dtype(checkpoint: _Checkpoint, names: Iterable[str]) -> torch.dtype:
    first, *others = names
    found = checkpoint.tensors[first].dtype
    if found not in DTYPES:
        hint = "; convert it to bfloat16 or float32 first" if found == "F16" else ""
        raise DataError(f"{checkpoint.where(first)} has dtype {found}; expected {' or '.join(DTYPES)}{hint}")
    for name in others:
        other = checkpoint.tensors[name].dtype
        if other != found:
            raise DataError(f"{checkpoint.where(name)} has dtype {other}, but {first} has {found}; expected one dtype")
    return DTYPES[found]


def _copy(checkpoint: _Checkpoint, table: list[Piece], put: Put, block: int) -> None:
    for piece in table:
        stored = checkpoint.tensors[piece.tensor]
        with stored.path.open("rb") as stream:
            for lo, hi in row_blocks(piece.shape, DTYPES[stored.dtype].itemsize, block):
                part = read_rows(stream, stored, lo, hi)
                _check_finite(part, lo, checkpoint.where(piece.tensor))
                put(shifted(piece, lo), part)


def shifted(piece: Piece, rows: int) -> Shape:
    """Where, in the dataset, the tensor's row number `rows` begins."""
    axis = len(piece.start) - len(piece.shape)
    return (*piece.start[:axis], piece.start[axis] + rows, *piece.start[axis + 1 :])


def _check_finite(part: torch.Tensor, first_row: int, where: str) -> None:
    finite = torch.isfinite(part)
    if finite.all():
        return
    bad = torch.nonzero(~finite)
    index = bad[0].tolist()
    value = part[tuple(index)].item()
    index[0] += first_row
    raise DataError(f"{where} holds {value} at {index} ({len(bad)} such values in this part); expected finite numbers")
