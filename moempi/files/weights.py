"""The weights file (moempi-weights 1): a model's config, small files and tensors, read by name or by expert.

    /config                  the checkpoint's config.json, verbatim
    /checkpoint/<name>       every other small file of the checkpoint, verbatim (tokenizer.json, ...)
    /model/<dataset>         float32 or bfloat16, contiguous; names and shapes in `moempi.model.huggingface`
    /model/layers/<l>/<...>

Each dataset has the attribute `sha256` of its stored bytes. Written by `import_checkpoint` and `init_weights`.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import asdict
from pathlib import Path
from types import TracebackType
from typing import Any

import h5py
import numpy as np
import tokenizers
import torch

from moempi.errors import DataError
from moempi.files import schema
from moempi.files.tensors import digest_of, read_box, stored_dtype
from moempi.model.config import ModelConfig
from moempi.model.huggingface import (
    Shape,
    count_parameters,
    dataset_shapes,
    parse_config,
    parse_generation_config,
)

# Small files of a checkpoint that have a meaning here; all others are only kept for the export.
GENERATION_CONFIG = "generation_config.json"
TOKENIZER = "tokenizer.json"


def open_weights(path: Path) -> Weights:
    """Open a weights file for reading: `with open_weights(path) as weights:`. Any number of ranks may, at once.

    Every dataset is looked at (there, of the config's shape, of one right type), none is read.

    Raises:
        DataError: naming the dataset, what was found and what was expected.
    """
    with ExitStack() as stack:
        file = stack.enter_context(schema.open_file(path, "weights"))
        return Weights(file, path, stack)


class Weights:
    """An open weights file. Use as a context manager, or call `close`."""

    path: Path
    config: ModelConfig
    dtype: torch.dtype  # of all tensors, as stored
    eos_tokens: tuple[int, ...]  # from generation_config.json where it names any, else from the config
    shapes: dict[str, Shape]  # of every dataset below /model, in the order of the model

    def __init__(self, file: h5py.File, path: Path, stack: ExitStack) -> None:
        self.path = path
        self.config_text = schema.read_text(file, "config")
        self.config = parse_config(self.config_text, f"{path}: /config")
        self.shapes = _expected_shapes(file, path, self.config)
        self.dtype = _check_datasets(file, path, self.shapes)
        self._file = file
        self.eos_tokens = self._eos_tokens()
        # From here on an error of the caller's block must not pass through `open_file`, which would call
        # it a damaged file: this object closes the file itself.
        self._stack = stack.pop_all()

    def __enter__(self) -> Weights:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.close()

    def close(self) -> None:
        """Close the file; the tensors that were read stay valid."""
        self._stack.close()

    def tensor(self, name: str) -> torch.Tensor:
        """A whole dataset of `shapes`, like "embedding" or "layers/3/q", in the stored dtype."""
        shape = self.shapes[name]
        return self.box(name, (0,) * len(shape), shape)

    def expert(self, layer: int, expert: int, lo: int, hi: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Hidden range lo:hi (of F) of one expert: gate rows then up rows [2(hi-lo), D], and down [D, hi-lo].

        Only these bytes are read; the whole range is two contiguous reads.
        """
        f, d = self.config.expert_hidden, self.config.d_model
        if not 0 <= lo < hi <= f:
            raise ValueError(f"hidden range {lo}:{hi} of an expert with F = {f}")
        name = f"layers/{layer}/experts_gate_up"
        if hi - lo == f:
            gate_up = self.box(name, (expert, 0, 0), (1, 2 * f, d))[0]
        else:
            halves = [self.box(name, (expert, row, 0), (1, hi - lo, d))[0] for row in (lo, f + lo)]
            gate_up = torch.cat(halves)
        down = self.box(f"layers/{layer}/experts_down", (expert, 0, lo), (1, d, hi - lo))[0]
        return gate_up, down

    def box(self, name: str, start: Shape, shape: Shape) -> torch.Tensor:
        """The part of a dataset that begins at `start`, of `shape` (as many dimensions as the dataset has).

        Raises:
            DataError: the file cannot be read there.
            ValueError: the box does not lie inside the dataset.
        """
        whole = self.shapes[name]
        if not all(0 <= a < a + n <= w for a, n, w in zip(start, shape, whole, strict=True)):
            raise ValueError(f"{name} {list(whole)} has no box of {list(shape)} at {list(start)}")
        with self._reading(name):
            return read_box(self._file[f"model/{name}"], start, shape, self.dtype)

    def tokenizer(self) -> tokenizers.Tokenizer | None:
        """The checkpoint's tokenizer, set to neither cut nor pad; None where the file has none."""
        raw = self.checkpoint_file(TOKENIZER)
        if raw is None:
            return None
        return parse_tokenizer(raw, f"{self.path}: /checkpoint/{TOKENIZER}")

    def checkpoint_files(self) -> list[str]:
        """Names of the small files that the checkpoint had beside its config and tensors."""
        return sorted(self._file["checkpoint"]) if "checkpoint" in self._file else []

    def checkpoint_file(self, name: str) -> bytes | None:
        """One of `checkpoint_files`, verbatim, or None."""
        if name not in self.checkpoint_files():
            return None
        with self._reading(name):
            return bytes(np.asarray(self._file["checkpoint"][name][...], dtype=np.uint8))

    def is_fused(self, name: str) -> bool:
        """Whether the checkpoint had all experts of this dataset in one tensor."""
        return schema.text_attribute(self._file[f"model/{name}"], "checkpoint_form") == "fused"

    def digest(self) -> str:
        """One SHA-256 for all that decides which tokens come out: config, end-of-sequence tokens, tensors.

        Made from the digests that are stored with the datasets: no tensor is read (`verify` does).
        """
        digest = hashlib.sha256(f"{self.config_text}\0{self.eos_tokens}\0".encode())
        for name in sorted(self.shapes):
            digest.update(f"{name} {self._stored_digest(f'model/{name}')}\n".encode())
        return digest.hexdigest()

    def expect(self, digest: str) -> None:
        """Refuse another file than the one whose `digest` was taken before, at the same place.

        Raises:
            DataError: it was replaced meanwhile.
        """
        found = self.digest()
        if found != digest:
            raise DataError(
                f"{self.path}: was replaced while the job was running: its digest was {digest[:12]}, is now "
                f"{found[:12]}; put the file back that the job began with, and go on with --resume"
            )

    def verify(self) -> None:
        """Read every dataset and compare its SHA-256 with the stored one.

        Raises:
            DataError: naming the first dataset that differs.
        """
        names = ["config", *(f"checkpoint/{name}" for name in self.checkpoint_files())]
        for name in [*names, *(f"model/{name}" for name in self.shapes)]:
            expected = self._stored_digest(name)
            with self._reading(name):
                found = digest_of(self._file[name])
            if found != expected:
                raise DataError(
                    f"{self.path}: /{name} is damaged: its SHA-256 is {found}; {expected} was stored with it. "
                    "Import the checkpoint again"
                )

    def _stored_digest(self, name: str) -> str:
        found = schema.text_attribute(self._file[name], "sha256")
        if not found:
            raise DataError(f"{self.path}: /{name} has no attribute `sha256`; import the checkpoint again")
        return found

    def _eos_tokens(self) -> tuple[int, ...]:
        text = self.checkpoint_file(GENERATION_CONFIG)
        if text is None:
            return self.config.eos_tokens
        named = parse_generation_config(text, f"{self.path}: /checkpoint/{GENERATION_CONFIG}")
        return self.config.eos_tokens if named is None else named

    @contextmanager
    def _reading(self, name: str) -> Iterator[None]:
        try:
            yield
        except (OSError, RuntimeError, KeyError, TypeError, ValueError) as error:
            raise DataError(f"{self.path}: {name} cannot be read: {error}") from error


def parse_tokenizer(raw: bytes, where: str) -> tokenizers.Tokenizer:
    """The tokenizer of a tokenizer.json, set to neither cut nor pad.

    Raises:
        DataError: naming `where`.
    """
    try:
        tokenizer = tokenizers.Tokenizer.from_buffer(raw)
    except Exception as error:  # the library raises no narrower class
        raise DataError(f"{where}: is not a tokenizer: {error}") from None
    tokenizer.no_truncation()
    tokenizer.no_padding()
    return tokenizer


def _expected_shapes(file: h5py.File, path: Path, config: ModelConfig) -> dict[str, Shape]:
    layers = file.get("model/layers")
    found = len(layers) if isinstance(layers, h5py.Group) else 0
    # Before the table is made: a damaged config may claim any number of layers.
    if found != config.n_layers:
        raise DataError(f"{path}: /model/layers holds {found} layers; the config says {config.n_layers}")
    return dataset_shapes(config)


def _check_datasets(file: h5py.File, path: Path, shapes: dict[str, Shape]) -> torch.dtype:
    for name in _datasets_below(file["model"]):
        if name not in shapes:
            raise DataError(f"{path}: /model/{name} is not a tensor of the model that /config describes")
    first = next(iter(shapes))
    dtype = None
    for name, shape in shapes.items():
        found = _check_dataset(file.get(f"model/{name}"), f"{path}: /model/{name}", shape)
        dtype = dtype or found
        if found != dtype:
            raise DataError(f"{path}: /model/{name} is {found}, but /model/{first} is {dtype}; expected one type")
    assert dtype is not None
    return dtype


def _datasets_below(group: h5py.Group) -> list[str]:
    names: list[str] = []
    group.visititems(lambda name, item: names.append(name) if isinstance(item, h5py.Dataset) else None)
    return names


def _check_dataset(dataset: Any, where: str, shape: Shape) -> torch.dtype:
    if not isinstance(dataset, h5py.Dataset):
        raise DataError(f"{where} is missing; expected {list(shape)}")
    if dataset.shape != shape:
        raise DataError(f"{where} has shape {list(dataset.shape)}; the config says {list(shape)}")
    dtype = stored_dtype(dataset)
    if dtype is None:
        raise DataError(f"{where} has type {dataset.dtype}; expected float32 or bfloat16 (little-endian)")
    stored, expected = dataset.id.get_storage_size(), math.prod(shape) * dtype.itemsize
    if stored != expected:
        raise DataError(f"{where} takes {stored} bytes in the file; expected {expected}, contiguous, uncompressed")
    return dtype


def info(path: Path) -> dict[str, Any]:
    """What `moempi weights info` shows: shape, parameters, bytes, dtype, digest; JSON-ready, no tensor is read."""
    with open_weights(path) as weights:
        total, active = count_parameters(weights.config)
        return {
            "file": str(path),
            "dtype": str(weights.dtype).removeprefix("torch."),
            "parameters": total,
            "active_parameters_per_token": active,
            "tensor_bytes": total * weights.dtype.itemsize,
            "file_bytes": path.stat().st_size,
            "digest": weights.digest(),
            "tokenizer": TOKENIZER in weights.checkpoint_files(),
            "eos_tokens": list(weights.eos_tokens),
            "checkpoint_files": weights.checkpoint_files(),
            "config": asdict(weights.config),
        }
