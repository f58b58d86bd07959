"""Safetensors files in bounded memory: where each tensor lies, its rows, and the header of a new file.

The library checks a file that is read. The numbers are then read plainly, because the library maps whole
files into memory, and `save_file` wants all tensors of a file at once. The format: eight bytes with the length
of a JSON header, the header, then the tensors; offsets count from the end of the header.
"""

from __future__ import annotations

import json
import math
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import numpy as np
import torch
from safetensors import SafetensorError, safe_open

from moempi.errors import DataError
from moempi.files import schema

DTYPES = {"F32": torch.float32, "BF16": torch.bfloat16}
_NAMES = {dtype: name for name, dtype in DTYPES.items()}

Shape = tuple[int, ...]


@dataclass(frozen=True)
class Stored:
    """A tensor in a safetensors file."""

    path: Path
    dtype: str  # as the format spells it, like "BF16"
    shape: Shape
    offset: int  # of its first byte, from the start of the file


def read_header(path: Path) -> dict[str, Stored]:
    """Every tensor of a safetensors file by name; no tensor is read.

    Raises:
        DataError: the file is missing, truncated or not safetensors.
    """
    try:
        # Refuses wrong lengths, overlaps, holes and shapes that don't match their bytes.
        with safe_open(path, framework="pt"):
            pass
        with path.open("rb") as stream:
            (length,) = struct.unpack("<Q", stream.read(8))
            header = schema.parse_json(stream.read(length))
    except (SafetensorError, OSError, ValueError, struct.error) as error:
        raise DataError(f"{path}: cannot be read as safetensors: {error}") from None
    header.pop("__metadata__", None)
    return {
        name: Stored(path, entry["dtype"], tuple(entry["shape"]), 8 + length + entry["data_offsets"][0])
        for name, entry in header.items()
    }


def read_rows(stream: BinaryIO, stored: Stored, lo: int, hi: int) -> torch.Tensor:
    """Rows lo:hi (of the first dimension) of a tensor in `stream`, its opened file; dtype one of `DTYPES`.

    Raises:
        DataError: the file ends before.
    """
    dtype, shape = DTYPES[stored.dtype], (hi - lo, *stored.shape[1:])
    row = math.prod(stored.shape[1:]) * dtype.itemsize
    raw = np.empty((hi - lo) * row, np.uint8)
    stream.seek(stored.offset + lo * row)
    if stream.readinto(raw.data) != raw.nbytes:  # type: ignore[attr-defined]
        raise DataError(f"{stored.path}: ends inside a tensor; was it changed while it was read?")
    return torch.from_numpy(raw).view(dtype).view(shape)


def new_header(shapes: Mapping[str, Shape], dtype: torch.dtype) -> bytes:
    """The first bytes of a file with these tensors, in this order and all of `dtype`; their bytes follow it."""
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name, shape in shapes.items():
        begin, end = end, end + math.prod(shape) * dtype.itemsize
        header[name] = {"dtype": _NAMES[dtype], "shape": shape, "data_offsets": [begin, end]}
    raw = json.dumps(header, separators=(",", ":")).encode()
    raw += b" " * (-len(raw) % 8)
    return struct.pack("<Q", len(raw)) + raw
