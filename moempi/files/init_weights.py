"""Random weights of any shape and size, seeded, in bounded memory: for tests and benchmarks."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import numpy as np
import torch

from moempi.errors import JobError
from moempi.files import schema
from moempi.files.import_weights import long_name, read_small_file, write_bytes
from moempi.files.tensors import BLOCK, Put, filling, row_blocks
from moempi.model.huggingface import EXPERT_DATASETS, Shape, dataset_shapes, parse_config

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


def init_weights(
    config_path: Path,
    out: Path,
    seed: int = 0,
    dtype: str = "bfloat16",
    gate_scale: float = 1.0,
    std: float = 0.02,
    *,
    block: int = BLOCK,
    alike: bool = False,
) -> None:
    """Write a weights file of normally distributed numbers; weights of norms are ones.

    The numbers are a pure function of (seed, dataset, expert, place): the same for any `block`, and an
    expert's do not depend on how many others there are.

    Args:
        config_path: a config.json.
        out: the weights file; replaced if it exists.
        seed: 0 or more.
        dtype: "float32" or "bfloat16" (drawn in float32, then rounded).
        gate_scale: factor on the standard deviation of the gates; larger makes routes clearer.
        std: standard deviation of all other numbers.
        block: most bytes of a piece of a tensor; two pieces are in memory at a time.
        alike: all experts of a layer get the numbers of the first one, which is many times as fast to write: for
            measurements of speed.

    Raises:
        DataError: the config is missing or not of a supported model.
        JobError: an unknown dtype.
    """
    if dtype not in DTYPES:
        raise JobError(f"dtype = {dtype!r}; expected one of {', '.join(DTYPES)}")
    text = read_small_file(config_path)
    config = parse_config(text, str(config_path))
    options = {"seed": seed, "dtype": dtype, "gate_scale": gate_scale, "std": std}
    options |= {"alike": True} if alike else {}
    with schema.create(out, "weights", sources={"config.json": hashlib.sha256(text).hexdigest()}) as file:
        write_bytes(file, "config", text)
        schema.write_text(file, "init", json.dumps(options))
        model = file.require_group("model")
        for name, shape in dataset_shapes(config).items():
            scale = std * gate_scale if name.endswith("/gate") else std
            with filling(model, name, shape, DTYPES[dtype], long_name(name)) as put:
                if alike and name.endswith(EXPERT_DATASETS):
                    _fill_alike(put, name, shape, DTYPES[dtype], seed, scale)
                else:
                    _fill(put, name, shape, DTYPES[dtype], seed, scale, block)


def _fill(put: Put, name: str, shape: Shape, dtype: torch.dtype, seed: int, scale: float, block: int) -> None:
    if len(shape) == 1:
        put((0,), torch.ones(shape, dtype=dtype))
        return
    # Each expert has its own stream; a dataset without experts has one.
    streams: list[Shape] = [(e,) for e in range(shape[0])] if name.endswith(EXPERT_DATASETS) else [()]
    rows, columns = shape[-2:]
    for stream in streams:
        generator = _generator(seed, name, stream)
        for lo, hi in row_blocks((rows, columns), 4, block):
            values = generator.standard_normal((hi - lo, columns), dtype=np.float32)
            values *= np.float32(scale)
            put((*stream, lo, 0), torch.from_numpy(values).to(dtype))


def _fill_alike(put: Put, name: str, shape: Shape, dtype: torch.dtype, seed: int, scale: float) -> None:
    """The numbers of the first expert, in memory as a whole, for all of them."""
    values = _generator(seed, name, (0,)).standard_normal(shape[1:], dtype=np.float32)
    values *= np.float32(scale)
    first = torch.from_numpy(values).to(dtype)
    for expert in range(shape[0]):
        put((expert,) + (0,) * (len(shape) - 1), first)


def _generator(seed: int, name: str, stream: Shape) -> np.random.Generator:
    key = hashlib.sha256(f"{seed} {name} {stream}".encode()).digest()[:16]
    return np.random.Generator(np.random.Philox(key=int.from_bytes(key, "little")))
