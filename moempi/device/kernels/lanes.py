"""Sixteen float32 lanes as one value in code that numba compiles: the alphabet that kernels are written in.

Every operation is IEEE 754's, in the order in which it is written: LLVM may choose registers and instructions but
not results. A fused multiply-add is one because the source says so. Addresses are whole numbers (`Tensor.data_ptr()`).

Importing this loads numba: only `compiled` does, and only on the first run on a machine.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from llvmlite import ir
from numba.core import types
from numba.extending import intrinsic, models, register_model

LANES = 16
VECTOR = 4 * LANES  # bytes
_FLOAT, _INT, _HALF = ir.FloatType(), ir.IntType(32), ir.IntType(16)
_VECTOR, _INTS = ir.VectorType(_FLOAT, LANES), ir.VectorType(_INT, LANES)


class LanesType(types.Type):
    """numba's name for sixteen float32."""

    def __init__(self) -> None:
        super().__init__(name="lanes")


lanes = LanesType()


@register_model(LanesType)
class _LanesModel(models.PrimitiveModel):
    def __init__(self, dmm: Any, fe_type: Any) -> None:
        super().__init__(dmm, fe_type, _VECTOR)


def _operation(result: Any, parameters: tuple[Any, ...], build: Callable[..., Any]) -> Any:
    """An intrinsic of fixed types; `build(builder, *values)` gives its instructions."""

    def typer(typingctx: Any, *given: Any) -> Any:
        def codegen(context: Any, builder: ir.IRBuilder, signature: Any, values: Any) -> Any:
            cast = [context.cast(builder, *one) for one in zip(values, given, parameters, strict=True)]
            found = build(builder, *cast)
            return context.get_dummy_value() if result is types.void else found

        return result(*given), codegen

    # numba counts the parameters of a typer, so each number needs a function of its own.
    if len(parameters) == 1:
        return intrinsic(lambda typingctx, a: typer(typingctx, a))
    if len(parameters) == 2:
        return intrinsic(lambda typingctx, a, b: typer(typingctx, a, b))
    return intrinsic(lambda typingctx, a, b, c: typer(typingctx, a, b, c))


def _at(builder: ir.IRBuilder, address: Any, kind: Any) -> Any:
    return builder.inttoptr(address, kind.as_pointer())


def _read(builder: ir.IRBuilder, address: Any, kind: Any, align: int) -> Any:
    return builder.load(_at(builder, address, kind), align=align, typ=kind)


def _write(builder: ir.IRBuilder, address: Any, value: Any, align: int) -> None:
    builder.store(value, _at(builder, address, value.type), align=align)


def _first(builder: ir.IRBuilder, n: Any) -> Any:
    """Mask of the first n lanes."""
    places = ir.Constant(_INTS, list(range(LANES)))
    return builder.icmp_signed("<", places, _splat(builder, builder.trunc(n, _INT)))


def _splat(builder: ir.IRBuilder, value: Any) -> Any:
    kind = ir.VectorType(value.type, LANES)
    one = builder.insert_element(ir.Constant(kind, ir.Undefined), value, ir.Constant(_INT, 0))
    return builder.shuffle_vector(one, ir.Constant(kind, ir.Undefined), ir.Constant(_INTS, [0] * LANES))


def _call(builder: ir.IRBuilder, name: str, result: Any, values: list[Any]) -> Any:
    function = builder.module.globals.get(name)
    if function is None:
        function = ir.Function(builder.module, ir.FunctionType(result, [v.type for v in values]), name)
    return builder.call(function, values)


def _masked_read(builder: ir.IRBuilder, address: Any, n: Any, element: Any, suffix: str) -> Any:
    kind = ir.VectorType(element, LANES)
    align = ir.Constant(_INT, 2 if element is _HALF else 4)
    values = [_at(builder, address, kind), align, _first(builder, n), ir.Constant(kind, None)]
    return _call(builder, f"llvm.masked.load.v16{suffix}.p0", kind, values)


def _masked_write(builder: ir.IRBuilder, address: Any, value: Any, n: Any, suffix: str) -> None:
    align = ir.Constant(_INT, 2 if value.type.element is _HALF else 4)
    values = [value, _at(builder, address, value.type), align, _first(builder, n)]
    _call(builder, f"llvm.masked.store.v16{suffix}.p0", ir.VoidType(), values)


def _widen(builder: ir.IRBuilder, halves: Any) -> Any:
    """bfloat16 bits -> float32."""
    vector = isinstance(halves.type, ir.VectorType)
    ints, floats = (_INTS, _VECTOR) if vector else (_INT, _FLOAT)
    shift = ir.Constant(ints, [16] * LANES if vector else 16)
    return builder.bitcast(builder.shl(builder.zext(halves, ints), shift), floats)


class _Bfloat(ir.types.Type):
    """LLVM's bfloat, which llvmlite has no name for."""

    def _to_string(self) -> str:
        return "bfloat"

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Bfloat)

    def __hash__(self) -> int:
        return hash(_Bfloat)


def _constant(value: int) -> Any:
    return ir.Constant(_INTS, [value] * LANES)


def _narrow(builder: ir.IRBuilder, value: Any) -> Any:
    """float32 -> bfloat16 bits, to the nearest, ties to even; what is not a number stays so."""
    bits = builder.bitcast(value, _INTS)
    odd = builder.and_(builder.lshr(bits, _constant(16)), _constant(1))
    rounded = builder.lshr(builder.add(builder.add(bits, odd), _constant(0x7FFF)), _constant(16))
    chosen = builder.select(builder.fcmp_unordered("uno", value, value), _constant(0x7FC0), rounded)
    return builder.trunc(chosen, ir.VectorType(_HALF, LANES))


def _tree(builder: ir.IRBuilder, value: Any, join: Callable[[Any, Any], Any]) -> Any:
    """All lanes joined: lane i with lane i + 8, then + 4, + 2, + 1."""
    for step in (8, 4, 2, 1):
        turned = ir.Constant(_INTS, [(lane + step) % LANES for lane in range(LANES)])
        value = join(value, builder.shuffle_vector(value, value, turned))
    return builder.extract_element(value, ir.Constant(_INT, 0))


def _larger(builder: ir.IRBuilder, a: Any, b: Any) -> Any:
    return builder.select(builder.fcmp_ordered(">", a, b), a, b)


def _power(builder: ir.IRBuilder, value: Any) -> Any:
    """2 to a whole power from -127 to 127, by its exponent bits."""
    exponents = builder.add(builder.fptosi(value, _INTS), _constant(127))
    return builder.bitcast(builder.shl(exponents, _constant(23)), _VECTOR)


def _where(builder: ir.IRBuilder, value: Any, n: Any, other: Any) -> Any:
    return builder.select(_first(builder, n), value, other)


def _zero_below(builder: ir.IRBuilder, value: Any, x: Any, limit: Any) -> Any:
    return builder.select(builder.fcmp_ordered("<", x, _splat(builder, limit)), ZERO, value)


def read_lanes(builder: ir.IRBuilder, address: Any) -> Any:
    """Sixteen float32."""
    return _read(builder, address, _VECTOR, 4)


def read_halves(builder: ir.IRBuilder, address: Any) -> Any:
    """Sixteen bfloat16, as float32."""
    return _widen(builder, _read(builder, address, ir.VectorType(_HALF, LANES), 2))


def write_lanes(builder: ir.IRBuilder, address: Any, value: Any) -> None:
    """Sixteen float32."""
    _write(builder, address, value, 4)


def splat_at(builder: ir.IRBuilder, address: Any) -> Any:
    """One float32, sixteen times."""
    return _splat(builder, _read(builder, address, _FLOAT, 4))


def multiply_add(builder: ir.IRBuilder, x: Any, y: Any, z: Any) -> Any:
    """x * y + z, rounded once."""
    return _call(builder, "llvm.fma.v16f32", _VECTOR, [x, y, z])


def dot_pairs(builder: ir.IRBuilder, x: Any, y: Any, total: Any) -> Any:
    """x0 * y0 + x1 * y1 + total, of lanes that are pairs of bfloat16."""
    pairs = ir.VectorType(_Bfloat(), 2 * LANES)
    values = [total, builder.bitcast(x, pairs), builder.bitcast(y, pairs)]
    return _call(builder, "llvm.x86.avx512bf16.dpbf16ps.512", _VECTOR, values)


ZERO = ir.Constant(_VECTOR, None)
_f, _i, _v = types.float32, types.int64, lanes

load = _operation(_v, (_i,), read_lanes)
load_first = _operation(_v, (_i, _i), lambda b, a, n: _masked_read(b, a, n, _FLOAT, "f32"))
store = _operation(types.void, (_i, _v), write_lanes)
store_first = _operation(types.void, (_i, _v, _i), lambda b, a, v, n: _masked_write(b, a, v, n, "f32"))
load_half = _operation(_v, (_i,), read_halves)
load_half_first = _operation(_v, (_i, _i), lambda b, a, n: _widen(b, _masked_read(b, a, n, _HALF, "i16")))
store_half = _operation(types.void, (_i, _v), lambda b, a, v: _write(b, a, _narrow(b, v), 2))
store_half_first = _operation(types.void, (_i, _v, _i), lambda b, a, v, n: _masked_write(b, a, _narrow(b, v), n, "i16"))

read_float = _operation(_f, (_i,), lambda b, a: _read(b, a, _FLOAT, 4))
write_float = _operation(types.void, (_i, _f), lambda b, a, v: _write(b, a, v, 4))
read_int = _operation(_i, (_i,), lambda b, a: _read(b, a, ir.IntType(64), 8))
write_int = _operation(types.void, (_i, _i), lambda b, a, v: _write(b, a, v, 8))
copy_float = _operation(types.void, (_i, _i), lambda b, to, a: _write(b, to, _read(b, a, _INT, 4), 4))
copy_half = _operation(types.void, (_i, _i), lambda b, to, a: _write(b, to, _read(b, a, _HALF, 2), 2))

splat = _operation(_v, (_f,), _splat)
add = _operation(_v, (_v, _v), lambda b, x, y: b.fadd(x, y))
subtract = _operation(_v, (_v, _v), lambda b, x, y: b.fsub(x, y))
multiply = _operation(_v, (_v, _v), lambda b, x, y: b.fmul(x, y))
divide = _operation(_v, (_v, _v), lambda b, x, y: b.fdiv(x, y))
fused = _operation(_v, (_v, _v, _v), multiply_add)
larger = _operation(_v, (_v, _v), _larger)  # y where either is not a number
smaller = _operation(_v, (_v, _v), lambda b, x, y: b.select(b.fcmp_ordered("<", x, y), x, y))
to_whole = _operation(_v, (_v,), lambda b, x: _call(b, "llvm.rint.v16f32", _VECTOR, [x]))
power_of_two = _operation(_v, (_v,), _power)
first_else = _operation(_v, (_v, _i, _v), _where)  # x in the first n lanes, else y
zero_below = _operation(_v, (_v, _v, _f), _zero_below)  # value, but 0 where x < limit
total = _operation(_f, (_v,), lambda b, v: _tree(b, v, b.fadd))
largest = _operation(_f, (_v,), lambda b, v: _tree(b, v, lambda x, y: _larger(b, x, y)))
