"""Dispatches and answers as bytes: rows as they lie, behind a header where the receiver has several slots."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from mpi4py import MPI
from torch import Tensor

from moempi.exchange.plan import header_bytes


def as_bytes(tensor: Tensor) -> np.ndarray:
    """The bytes of a contiguous tensor, without a copy: uint8 [nbytes]."""
    return tensor.view(-1).view(torch.uint8).numpy()


def bytes_at(address: int, nbytes: int) -> list[Any]:
    """Memory at an address, of the host or a GPU, as MPI takes it."""
    return [MPI.buffer.fromaddress(address, nbytes), MPI.BYTE]


def frame(rows: Tensor, rows_per_slot: tuple[int, ...]) -> np.ndarray:
    """The message of rows [R, D]: the rows as they lie, behind a header where the receiver has several slots."""
    header = header_bytes(len(rows_per_slot))
    body = as_bytes(rows)
    if not header:
        return body
    message = np.zeros(header + body.nbytes, dtype=np.uint8)
    message[: 4 * len(rows_per_slot)] = np.array(rows_per_slot, dtype="<i4").view(np.uint8)
    message[header:] = body
    return message


def read_header(buffer: Tensor, n_slots: int) -> tuple[int, ...]:
    """Rows per slot, from the head of a message."""
    return tuple(buffer[: 4 * n_slots].numpy().view("<i4").tolist())
