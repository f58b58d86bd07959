"""What the model and the run ask of a device. `device.cpu` and `device.cuda` are the two that there are."""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from moempi.model.gate import Route
from moempi.planning.gpu_memory import Use


class ProductShape(NamedTuple):
    """Of a kind of product."""

    outputs: int  # O
    inputs: int  # I
    dtype: torch.dtype  # of rows and weight
    out: torch.dtype  # of what comes out


class Product(Protocol):
    """`y = x @ weight.T`."""

    shape: tuple[int, int]  # O, I
    dtype: torch.dtype  # of the weight that it holds

    def __call__(self, x: Tensor, residual: Tensor | None = None) -> Tensor:
        """[R, I] -> [R, O], in `out` of `Device.linear`, for any R including 0; `residual` [R, O] is added to it."""


class Device(Protocol):
    """Products and operations on rows. In exact mode a row's bits depend on that row alone."""

    name: str  # "cpu" or "cuda"
    mode: str  # "exact" or "fast"
    threads: int  # of the host, for torch
    arithmetic: int  # goes up with every change of its kernels that gives other bits
    model: str  # of the processor or GPU, where bits or figures depend on it; else empty

    def describe(self) -> str:
        """For people."""

    def memory_use(self) -> Use | None:
        """What is used of its memory; None where that says nothing of this process."""

    @property
    def products(self) -> str:
        """Which kind of product; the bits depend on it."""

    def choose_products(self, shapes: Iterable[ProductShape]) -> None:
        """Test that products of the shapes keep their promise."""

    def linear(self, weight: Tensor, out: torch.dtype | None = None) -> Product:
        """A product with a weight [O, I], of rows in its dtype, rounded to `out`, by default the same."""

    def has_small_experts(self, hidden: int, d_model: int) -> bool:
        """Whether an expert of so many hidden units is one kernel of the CPU."""

    def place(self, tensor: Tensor) -> Tensor:
        """A tensor on this device, to stay."""

    def normed(self, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        """RMS norm of x [R, D], in its dtype."""

    def swiglu(self, gate_up: Tensor) -> Tensor:
        """[R, 2F], gate first -> [R, F]."""

    def choose_experts(self, logits: Tensor, top_k: int, normalize: bool) -> Route:
        """The K best experts of logits [T, E] float32."""
