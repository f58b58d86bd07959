"""The GPU as a device: its products, and the row operations that exact mode stands on.

Exact mode takes products of fixed tiles (`cuda_products`), fast mode those of cuBLAS. Everything else is the same in
both. TF32 is off in both.
"""

from __future__ import annotations

import platform
from collections.abc import Iterable
from functools import lru_cache

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor

from moempi.device import cuda_rows
from moempi.device.cuda_products import product
from moempi.device.product_tiles import TILES
from moempi.device.seam import ProductShape
from moempi.device.telling import telling_product
from moempi.errors import MoempiError
from moempi.model.gate import Route
from moempi.planning.gpu_memory import Use

ARITHMETIC = 4  # goes up with every change that gives other bits: what was begun with others is not gone on with
SELF_TEST_ROWS = (1, 2, 7, 16, 64, 65, 128, 257)


class Linear:
    """`y = x @ weight.T` on the GPU.

    Args:
        weight: [O, I], float32 or bfloat16, on the GPU; kept, not copied.
        exact: the bits of every row depend on that row alone.
        out: dtype of what comes out, by default the weight's. Sums are float32 in any case.
    """

    def __init__(self, weight: Tensor, *, exact: bool, out: torch.dtype | None = None):
        self.shape, self.dtype, self.exact = (weight.shape[0], weight.shape[1]), weight.dtype, exact
        self._weight, self._out = weight.contiguous(), out or weight.dtype

    def __call__(self, x: Tensor, residual: Tensor | None = None) -> Tensor:
        """[R, I] -> [R, O], for any R including 0; `residual` [R, O] is added to it."""
        if x.dtype != self.dtype:  # even a copy that is none takes a microsecond
            x = x.to(self.dtype)
        if self.exact:
            rows = product(x.contiguous(), self._weight, out=self._out)
        elif self._out == self.dtype:
            rows = F.linear(x, self._weight)
        else:
            rows = torch.mm(x, self._weight.T, out_dtype=self._out)
        return rows if residual is None else residual + rows


class Cuda:
    """One GPU of a rank.

    Args:
        index: of the GPU.
        mode: "exact" or "fast".
    """

    name = "cuda"
    arithmetic = ARITHMETIC

    def __init__(self, index: int, mode: str):
        self.device, self.mode = torch.device("cuda", index), mode
        torch.cuda.set_device(self.device)
        self.threads = torch.get_num_threads()
        self.model = torch.cuda.get_device_name(self.device)
        torch.backends.cuda.matmul.allow_tf32 = False
        torch.backends.cuda.matmul.allow_bf16_reduced_precision_reduction = False

    def hold(self, nbytes: int) -> None:
        """Let torch's allocator take no more than so many bytes; it then returns what it only keeps in store."""
        total = torch.cuda.get_device_properties(self.device).total_memory
        torch.cuda.set_per_process_memory_fraction(min(1.0, max(0, nbytes) / total), self.device)

    def memory_use(self) -> Use:
        """What is used of this GPU, and what this process has taken of it."""
        free, total = torch.cuda.mem_get_info(self.device)
        return Use(
            gpu=f"{platform.node()} {self.device.index}",
            used=total - free,
            reserved=torch.cuda.memory_reserved(self.device),
            peak=torch.cuda.max_memory_reserved(self.device),
        )

    def describe(self) -> str:
        """For people."""
        return f"cuda ({self.model})"

    @property
    def exact(self) -> bool:
        """Whether bits never depend on the layout."""
        return self.mode == "exact"

    @property
    def products(self) -> str:
        """Which kind of product; the bits depend on it."""
        return "fixed tiles" if self.exact else "cuBLAS"

    def choose_products(self, shapes: Iterable[ProductShape]) -> None:
        """Self-test of exact mode.

        Raises:
            MoempiError: a row's bits depend on its neighbours.
        """
        for shape in sorted(set(shapes), key=str) if self.exact else ():
            if not row_is_independent(shape, self.device):
                raise MoempiError(
                    f"the self-test failed: on {self.model} with torch {torch.__version__} a row's bits depend on its "
                    f"neighbours in products of {shape.inputs} inputs and {shape.outputs} outputs; model.mode = "
                    "'fast' works"
                )
        # What the tests took would not fit what comes.
        torch.cuda.empty_cache()

    def linear(self, weight: Tensor, out: torch.dtype | None = None) -> Linear:
        """A product with `weight` [O, I], rounded to `out`, by default to its dtype."""
        return Linear(self.place(weight), exact=self.exact, out=out)

    def has_small_experts(self, hidden: int, d_model: int) -> bool:
        """Never: small experts are kernels of the CPU."""
        return False

    def place(self, tensor: Tensor) -> Tensor:
        """A tensor on this GPU, to stay."""
        return tensor.to(self.device)

    def normed(self, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        """RMS norm of x [R, D]."""
        return cuda_rows.rms_norm(x, weight, eps)

    def swiglu(self, gate_up: Tensor) -> Tensor:
        """[R, 2F], gate first -> [R, F]."""
        return cuda_rows.swiglu(gate_up)

    def choose_experts(self, logits: Tensor, top_k: int, normalize: bool) -> Route:
        """The K best experts of logits [T, E] float32; experts are int32 here."""
        return Route(*cuda_rows.choose_experts(logits, top_k, normalize))


@lru_cache(maxsize=256)
def row_is_independent(shape: ProductShape, device: torch.device) -> bool:
    """Whether rows keep their bits over row counts, places and tiles."""
    dtype, out = shape.dtype, shape.out
    x, weight = telling_product(shape[:3], SELF_TEST_ROWS[-1], device)
    expected = product(x, weight, out=out)
    for n in SELF_TEST_ROWS:
        lo = min(n, len(x) - n)  # another place in the batch than among all; a row alone is one that cancels
        rows = x[lo : lo + n].clone()  # where a kernel may read as wide as it does in a job
        for tile in TILES[dtype]:
            if not torch.equal(product(rows, weight, tile, out), expected[lo : lo + n]):
                return False
    return True
