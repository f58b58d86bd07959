"""Products on the CPU: a row's bits are its own, and what happens where they are not."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterable
from pathlib import Path

import pytest
import torch

from moempi.device import cpu, cpu_rows
from moempi.device.cpu import PIECE_ROWS, PRODUCTS, Cpu, Linear, padded_rows, product_with, row_is_independent
from moempi.device.cpu_rows import SmallLinear, WideLinear, shares
from moempi.device.kernels import blocks, compiled
from moempi.device.kernels.compiled import Kernels, has_wide_product, kernels
from moempi.device.seam import ProductShape
from moempi.errors import MoempiError
from moempi.model import config
from moempi.model.config import is_small

SHAPES = [(5, 7), (16, 128), (1, 1), (33, 17), (128, 64), (200, 65)]  # outputs, inputs

WIDE = ProductShape(5, 7, torch.float32, torch.float32)
NARROW = ProductShape(16, 8, torch.bfloat16, torch.bfloat16)


def packs(dtype: torch.dtype) -> bool:
    """Whether this processor has packed products of a type: those of bfloat16 need AVX-512."""
    try:
        cpu._pack(torch.zeros(16, 16, dtype=dtype))
    except RuntimeError:
        return False
    return True


def in_order(x: torch.Tensor, weight: torch.Tensor, order: Iterable[int] | None = None) -> torch.Tensor:
    """x [R, I] @ weight [O, I].T, input after input: in float32 whatever the rows, where a library's order may vary."""
    total = torch.zeros(len(x), len(weight))
    for i in order or range(x.shape[1]):
        total += x[:, i, None].float() * weight[:, i].float()
    return total


@pytest.fixture(autouse=True)
def _fresh() -> None:
    row_is_independent.cache_clear()
    torch.set_num_threads(1)


@pytest.fixture
def no_small_ones(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every product is a library's."""
    monkeypatch.setattr(config, "SMALL", 0)


@pytest.fixture
def no_wide_ones(monkeypatch: pytest.MonkeyPatch) -> None:
    """A processor without the instructions for large products."""
    monkeypatch.setattr(cpu, "has_wide_product", lambda half: False)


@pytest.mark.parametrize("kind", ["small", *PRODUCTS])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("outputs,inputs", SHAPES)
def test_products_of_a_row_see_only_that_row(outputs: int, inputs: int, dtype: torch.dtype, kind: str) -> None:
    if kind in ("packed", "pieces") and not packs(dtype):
        pytest.skip(f"this processor has no packed products of {dtype}; tiled ones take their place, and are tested")
    if kind == "kernels" and not has_wide_product(dtype == torch.bfloat16):
        pytest.skip(f"this processor has no instructions for large products of {dtype}; oneDNN's take their place")
    random = torch.Generator().manual_seed(outputs)
    weight = torch.randn(outputs, inputs, generator=random).to(dtype)
    product = product_with(weight, kind)
    row = torch.randn(inputs, generator=random).to(dtype)
    expected = product(row.unsqueeze(0))[0]
    assert product(row.expand(3, -1).contiguous()).is_contiguous(), "kernels read rows without gaps"
    exact = row.double() @ weight.double().T
    assert torch.allclose(expected.double(), exact, rtol=1e-2 if dtype == torch.bfloat16 else 1e-5, atol=2e-2)
    for threads in (1,) if kind in ("small", "tiled") else (1, 2):
        torch.set_num_threads(threads)
        for n in (2, 3, 4, 5, 6, 7, 9, 11, 12, 16, 31, 64, 129):
            for place in (0, n // 2, n - 1):
                x = torch.randn(n, inputs, generator=random).to(dtype)
                x[place] = row
                assert torch.equal(product(x)[place], expected), (n, place, threads)


@pytest.mark.parametrize("rows", [1, 2, 5, 17])
@pytest.mark.parametrize("outputs,inputs", [(51, 28), (9, 40), (70, 512)])
def test_the_self_test_sees_another_order_of_a_sum(
    outputs: int, inputs: int, rows: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of one row count alone, in bfloat16, which hides nearly all of it."""

    class Other:
        def __init__(self, weight: torch.Tensor):
            self._weight = weight

        def __call__(self, x: torch.Tensor) -> torch.Tensor:
            backwards = len(x) == rows
            return in_order(x, self._weight, reversed(range(inputs)) if backwards else None).bfloat16()

    monkeypatch.setattr(cpu, "product_with", lambda weight, kind: Other(weight))
    assert not row_is_independent((outputs, inputs, torch.bfloat16), "packed", (1,))
    rows = -1
    row_is_independent.cache_clear()
    assert row_is_independent((outputs, inputs, torch.bfloat16), "packed", (1,))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("inputs", [2, 3, 22, 28, 31, 32, 33, 64])
def test_packed_products_of_few_inputs_keep_the_bits_of_rows(inputs: int, dtype: torch.dtype) -> None:
    if not packs(dtype):
        pytest.skip(f"this processor has no packed products of {dtype}; tiled ones take their place, and are tested")
    assert all(row_is_independent((outputs, inputs, dtype), "pieces", (1, 2)) for outputs in (5, 14, 48, 51))


def test_a_product_that_comes_out_wide_is_computed_so() -> None:
    """Of a weight in bfloat16, as a gate is."""
    weight, x = torch.randn(6, 40).bfloat16(), torch.randn(9, 40).bfloat16()
    product = Cpu(1).linear(weight, torch.float32)
    assert torch.equal(product(x), Cpu(1).linear(weight.float())(x.float())) and product.dtype == torch.float32


def test_no_rows() -> None:
    assert Linear(torch.randn(3, 4))(torch.empty(0, 4)).shape == (0, 3)


def test_rows_are_padded_to_a_few_counts() -> None:
    table = {1: 4, 2: 4, 3: 4, 5: 8, 9: 16, 16: 16, 17: 32, 33: 48, 256: 256, 257: 320, 1000: 1024}
    assert {rows: padded_rows(rows) for rows in table} == table
    assert len({padded_rows(rows) for rows in range(1, 257)}) == 18


def test_the_weight_alone_decides_who_multiplies() -> None:
    device = Cpu(1)
    device.take_products("kernels")
    assert isinstance(device.linear(torch.zeros(1024, 128)), SmallLinear)
    assert isinstance(device.linear(torch.zeros(1025, 128)), WideLinear)
    device.take_products("packed")
    assert isinstance(device.linear(torch.zeros(1025, 128)), Linear)
    assert is_small(2, 2**16) and not is_small(3, 2**16)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_small_product_adds_to_the_residual_before_it_rounds(dtype: torch.dtype) -> None:
    x, weight, residual = (torch.randn(*shape).to(dtype) for shape in ((5, 20), (33, 20), (5, 33)))
    expected = (residual.double() + x.double() @ weight.double().T).to(dtype)
    assert torch.allclose(SmallLinear(weight)(x, residual).float(), expected.float(), rtol=1e-2, atol=1e-5)


def test_kernels_multiply_where_the_processor_has_their_instructions(no_small_ones: None) -> None:
    device = Cpu(1)
    device.choose_products([WIDE])
    assert (device.products == "kernels") == has_wide_product(False)
    device.choose_products([WIDE, NARROW])
    assert (device.products == "kernels") == (has_wide_product(False) and has_wide_product(True))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_threads_share_the_outputs_of_a_large_product(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    if not has_wide_product(dtype == torch.bfloat16):
        pytest.skip(f"this processor has no instructions for large products of {dtype}; oneDNN's take their place")
    x, weight, residual = (torch.randn(*shape).to(dtype) for shape in ((70, 65), (200, 65), (70, 200)))
    alone = WideLinear(weight)(x, residual)
    monkeypatch.setattr(cpu_rows, "SHARED", 0)
    for threads in (2, 3, 9):
        torch.set_num_threads(threads)
        assert torch.equal(WideLinear(weight)(x, residual), alone)
    assert torch.equal(WideLinear(weight)(x[::2], residual[::2]), alone[::2])


def test_blocks_have_the_same_bits_where_registers_hold_fewer_sums(monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a processor without AVX-512."""
    x, weights = torch.randn(23, 40), [torch.randn(o, 40) for o in (16, 33, 100)]
    expected = [SmallLinear(weight)(x[:n]) for weight in weights for n in (1, 2, 3, 4, 23)]
    monkeypatch.setattr(blocks, "sums_in_registers", lambda: 6)
    narrow = Kernels(compiled.compile_kernels(False), False)
    monkeypatch.setattr(cpu_rows, "kernels_for", lambda dtype: narrow)
    found = [SmallLinear(weight)(x[:n]) for weight in weights for n in (1, 2, 3, 4, 23)]
    assert all(map(torch.equal, found, expected))


def test_shares_of_threads_are_all_panels() -> None:
    assert shares(4, 1) == [(0, 4)]
    assert shares(7, 3) == [(0, 2), (2, 4), (4, 7)]


def test_packed_products_are_chosen_where_they_hold(no_small_ones: None, no_wide_ones: None) -> None:
    device = Cpu(1)
    device.choose_products([WIDE])
    assert device.products == "packed"
    device.choose_products([WIDE, NARROW])
    # With AMX two rows of bfloat16 may have other bits than many.
    assert device.products in (("packed", "pieces") if packs(torch.bfloat16) else ("tiled",))


def test_pieces_where_long_batches_change_bits(
    no_small_ones: None, no_wide_ones: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    def dependent(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        return in_order(x, weight) + (len(x) > PIECE_ROWS)

    monkeypatch.setattr(cpu, "_pack", lambda weight: weight)
    monkeypatch.setattr(cpu, "_packed_product", dependent)
    device = Cpu(2)
    device.choose_products([WIDE])
    assert device.products == "pieces" and device.threads == 2
    product, x = device.linear(torch.randn(5, 7)), torch.randn(3 * PIECE_ROWS + 1, 7)
    assert torch.equal(product(x), torch.cat([product(row.unsqueeze(0)) for row in x]))


def test_the_self_test_sees_a_single_value_that_depends_on_the_row_count(
    no_small_ones: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    def dependent(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        y = in_order(x, weight)
        y[-1, -1] += len(x) > 500
        return y

    monkeypatch.setattr(cpu, "_pack", lambda weight: weight)
    monkeypatch.setattr(cpu, "_packed_product", dependent)
    assert not row_is_independent((5, 7, torch.float32), "packed", (1,))
    assert row_is_independent((5, 7, torch.float32), "pieces", (1,))


@pytest.mark.parametrize("fault", ["missing", "dependent"])
def test_tiles_on_one_thread_where_packed_products_fail(
    no_small_ones: None, no_wide_ones: None, monkeypatch: pytest.MonkeyPatch, fault: str
) -> None:
    def missing(weight: torch.Tensor) -> torch.Tensor:
        raise AttributeError("no such operator")

    def dependent(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        return torch.nn.functional.linear(x, weight) + len(x)

    if fault == "missing":
        monkeypatch.setattr(cpu, "_pack", missing)
    else:
        monkeypatch.setattr(cpu, "_pack", lambda weight: weight)
        monkeypatch.setattr(cpu, "_packed_product", dependent)
    device = Cpu(2)
    device.choose_products([WIDE])
    assert device.products == "tiled" and device.threads == 1 and torch.get_num_threads() == 1
    assert device.linear(torch.randn(5, 7)).kind == "tiled"


def test_no_exact_mode_where_both_fail(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cpu, "row_is_independent", lambda shape, kind, threads: False)
    with pytest.raises(MoempiError, match="self-test failed"):
        Cpu(1).choose_products([WIDE])


def test_numba_is_not_loaded_where_kernels_are_kept() -> None:
    kernels(False)
    code = "from moempi.device.kernels.compiled import kernels; kernels(False); import sys; print(*sys.modules)"
    shown = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=120)
    assert "llvmlite" in shown.stdout.split() and "numba" not in shown.stdout.split()


def test_compiling_leaves_standard_output_to_the_program() -> None:
    # colorama, where it is installed, would reset the terminal behind the last line of `--json`.
    code = "from moempi.device.kernels.compiled import compile_kernels; compile_kernels(False)"
    said = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=120)
    assert said.stdout == ""


def test_kernels_are_compiled_where_none_can_be_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_text("not a folder")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    monkeypatch.setattr(compiled, "compile_kernels", lambda half: b"code")
    assert compiled._object_code(False) == b"code"
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert compiled._object_code(False) == b"code"
    monkeypatch.setattr(compiled, "compile_kernels", lambda half: b"other")
    assert compiled._object_code(False) == b"code" and compiled._object_code(True) == b"other"
