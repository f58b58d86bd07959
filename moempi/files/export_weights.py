"""A weights file back into a Hugging Face checkpoint: same names, dtypes, shapes and bits, same small files."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

import torch

from moempi.errors import DataError, JobError
from moempi.files import schema
from moempi.files.import_weights import INDEX, SINGLE, is_plain_name, shards_of, shifted
from moempi.files.safetensors_file import new_header
from moempi.files.tensors import BLOCK, row_blocks
from moempi.files.weights import Weights, open_weights
from moempi.model.huggingface import Piece, pieces

_Placed = tuple[str, Piece]  # a dataset, and a tensor in it


def export_checkpoint(weights_path: Path, folder: Path) -> None:
    """Write the checkpoint that a weights file was imported from; files of the same names are replaced.

    Tensors lie in the files that the checkpoint's index names, or in one model.safetensors. config.json is
    written last: a folder without it is an export that did not end.

    Raises:
        DataError: the weights file is damaged or names a file outside `folder`, or `folder` cannot be written.
        JobError: the folder holds safetensors that this export would not replace.
    """
    with open_weights(weights_path) as weights:
        shards = _shards(weights)
        others = [name for name in weights.checkpoint_files() if not _is_reserved(name, shards, weights_path)]
        try:
            folder.mkdir(parents=True, exist_ok=True)
            _refuse_strangers(folder, shards)
            _write_files(weights, folder, shards, others)
        except OSError as error:
            raise DataError(f"{folder}: cannot be written: {error.strerror}") from error


def _write_files(weights: Weights, folder: Path, shards: dict[str, list[_Placed]], others: list[str]) -> None:
    for name, content in shards.items():
        with _replacing(folder / name) as stream:
            _write_safetensors(stream, weights, content)
    for name in others:
        with _replacing(folder / name) as stream:
            stream.write(weights.checkpoint_file(name) or b"")
    with _replacing(folder / "config.json") as stream:
        stream.write(weights.config_text.encode())


def _shards(weights: Weights) -> dict[str, list[_Placed]]:
    placed = {
        piece.tensor: (dataset, piece)
        for dataset, shape in weights.shapes.items()
        for piece in pieces(dataset, shape, weights.is_fused(dataset))
    }
    index = weights.checkpoint_file(INDEX)
    if index is None:
        return {SINGLE: [placed[name] for name in sorted(placed)]}
    where = f"{weights.path}: /checkpoint/{INDEX}"
    shards = shards_of(index, where)
    if sorted(name for names in shards.values() for name in names) != sorted(placed):
        raise DataError(f"{where}: does not name the tensors of this model")
    return {file: [placed[name] for name in sorted(names)] for file, names in shards.items()}


def _is_reserved(name: str, shards: dict[str, list[_Placed]], path: Path) -> bool:
    if not is_plain_name(name):
        raise DataError(f"{path}: /checkpoint has a file named {name!r}; expected a name without a folder")
    return name == "config.json" or name in shards


def _refuse_strangers(folder: Path, shards: dict[str, list[_Placed]]) -> None:
    # A loader would prefer a model.safetensors of another model to the shards that are written here.
    strangers = sorted(path.name for path in folder.glob("*.safetensors*") if path.name not in {*shards, INDEX})
    if (folder / INDEX).exists() and SINGLE in shards:
        strangers.append(INDEX)
    if strangers:
        raise JobError(f"{folder}: holds {strangers[0]} of another checkpoint; export into an empty folder")


@contextmanager
def _replacing(path: Path) -> Iterator[BinaryIO]:
    """A stream whose bytes become the file `path`, synced, when the block ends well."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with temporary.open("wb") as stream:
            yield stream
        schema.sync(temporary)
        temporary.replace(path)
        schema.sync(path.parent)
    finally:
        temporary.unlink(missing_ok=True)


def _write_safetensors(stream: BinaryIO, weights: Weights, content: list[_Placed]) -> None:
    stream.write(new_header({piece.tensor: piece.shape for _, piece in content}, weights.dtype))
    for dataset, piece in content:
        leading = (1,) * (len(piece.start) - len(piece.shape))
        for lo, hi in row_blocks(piece.shape, weights.dtype.itemsize, BLOCK):
            part = weights.box(dataset, shifted(piece, lo), (*leading, hi - lo, *piece.shape[1:]))
            stream.write(part.view(torch.uint8).numpy().data)
