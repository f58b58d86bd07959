"""Tensors in HDF5 datasets: bits move unconverted, whole or box by box, and each dataset knows its SHA-256.

The memory type is always the file type. For bfloat16 that is `schema.BFLOAT16`, read into and written from
16-bit integers that torch views as bfloat16: HDF5 never converts, and other tools see floats.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager

import h5py
import numpy as np
import torch

from moempi.files import schema

# Most bytes of a tensor in a piece, where a single row is not larger; two pieces are in memory at a time.
BLOCK = 16 * 2**20

FILE_TYPES: dict[torch.dtype, h5py.h5t.TypeID] = {
    torch.float32: h5py.h5t.IEEE_F32LE,
    torch.bfloat16: schema.BFLOAT16,
}
_MEMORY_TYPES: dict[torch.dtype, np.dtype] = {torch.float32: np.dtype("<f4"), torch.bfloat16: np.dtype("<u2")}

Shape = tuple[int, ...]
Put = Callable[[Shape, torch.Tensor], None]


def row_blocks(shape: Shape, itemsize: int, block: int = BLOCK) -> Iterator[tuple[int, int]]:
    """Ranges of the first dimension, in order, of at most `block` bytes each, but of one row at least."""
    rows = max(1, block // max(1, itemsize * math.prod(shape[1:])))
    return ((lo, min(lo + rows, shape[0])) for lo in range(0, shape[0], rows))


def stored_dtype(dataset: h5py.Dataset) -> torch.dtype | None:
    """float32 or bfloat16, or None where the dataset has any other type."""
    kind = dataset.id.get_type()
    return next((dtype for dtype, expected in FILE_TYPES.items() if kind == expected), None)


def read_box(dataset: h5py.Dataset, start: Shape, shape: Shape, dtype: torch.dtype) -> torch.Tensor:
    """The box of `shape` that begins at `start`; `dtype` is what `stored_dtype` says. Reads only those bytes."""
    values = np.empty(shape, _MEMORY_TYPES[dtype])
    space = dataset.id.get_space()
    space.select_hyperslab(start, shape)
    dataset.id.read(h5py.h5s.create_simple(shape), space, values, mtype=FILE_TYPES[dtype])
    return torch.from_numpy(values).view(dtype)


@contextmanager
def filling(group: h5py.Group, name: str, shape: Shape, dtype: torch.dtype, long_name: str) -> Iterator[Put]:
    """Create a contiguous dataset and fill it with the `put(start, tensor)` that this yields.

    The blocks must come in the order of the dataset's bytes and cover it: their running SHA-256 becomes the
    attribute `sha256`. It is made beside the writing: a tensor must stay as it is until the next `put` has returned, or
    all have ended; its memory is not for the next one. A tensor may lack leading dimensions, which then count 1.
    """
    dataset = _create(group, name, shape, dtype)
    digest = hashlib.sha256()
    with ThreadPoolExecutor(1) as beside:
        hashed: Future[None] = beside.submit(lambda: None)

        def put(start: Shape, tensor: torch.Tensor) -> None:
            nonlocal hashed
            hashed.result()
            values = _bits(tensor)
            hashed = beside.submit(digest.update, values.data)
            _write_box(dataset, start, values, dtype)

        yield put
        hashed.result()
    schema.set_text_attribute(dataset, "sha256", digest.hexdigest())
    schema.set_text_attribute(dataset, "long_name", long_name)


def _create(group: h5py.Group, name: str, shape: Shape, dtype: torch.dtype) -> h5py.Dataset:
    folder, _, last = name.rpartition("/")
    parent = group.require_group(folder) if folder else group
    options = h5py.h5p.create(h5py.h5p.DATASET_CREATE)
    # Every byte is about to be written: no pass of zeros before.
    options.set_fill_time(h5py.h5d.FILL_TIME_NEVER)
    options.set_obj_track_times(False)
    space = h5py.h5s.create_simple(shape)
    return h5py.Dataset(h5py.h5d.create(parent.id, last.encode(), FILE_TYPES[dtype], space, dcpl=options))


def _write_box(dataset: h5py.Dataset, start: Shape, values: np.ndarray, dtype: torch.dtype) -> None:
    shape = (1,) * (len(start) - values.ndim) + values.shape
    space = dataset.id.get_space()
    space.select_hyperslab(start, shape)
    dataset.id.write(h5py.h5s.create_simple(shape), space, values.reshape(shape), mtype=FILE_TYPES[dtype])


def _bits(tensor: torch.Tensor) -> np.ndarray:
    tensor = tensor.contiguous()
    return (tensor.view(torch.uint16) if tensor.dtype == torch.bfloat16 else tensor).numpy()


def digest_of(dataset: h5py.Dataset) -> str:
    """SHA-256 of a dataset's bytes as they are stored, in hex; a tensor is read block by block."""
    digest = hashlib.sha256()
    dtype = stored_dtype(dataset)
    if dtype is None:
        digest.update(np.ascontiguousarray(dataset[...]).tobytes())
        return digest.hexdigest()
    for lo, hi in row_blocks(dataset.shape, dtype.itemsize):
        start = (lo, *(0 for _ in dataset.shape[1:]))
        digest.update(_bits(read_box(dataset, start, (hi - lo, *dataset.shape[1:]), dtype)).data)
    return digest.hexdigest()
