"""Two operations of four float32 at once, for the inner loops of the numba CRF.

numba turns simple loops over long rows into SIMD by itself, but not the four labels of a lattice vertex (its pass for
that is off by default): they are written in LLVM's vector type here.  Either is one load, sum or product of a register.
"""

# ruff: noqa: ANN401 - numba and llvmlite give their builders, contexts and values no public types
from __future__ import annotations

from typing import Any

from llvmlite import ir
from numba import types
from numba.extending import intrinsic

_FOUR = ir.VectorType(ir.FloatType(), 4)
_FUSED = ("contract",)
"""A product may join its sum in one instruction."""


def _pointer(context: Any, builder: Any, array_type: Any, array: Any, row: Any) -> Any:
    """The address of a row of an array (rows, 4)."""
    data = context.make_array(array_type)(context, builder, array).data
    place = builder.mul(row, ir.Constant(row.type, 4))
    return builder.bitcast(builder.gep(data, [place]), _FOUR.as_pointer())


def _load(builder: Any, pointer: Any) -> Any:
    return builder.load(pointer, align=4)


def _spread(builder: Any, number: Any) -> Any:
    """The number in all four places."""
    first = builder.insert_element(ir.Constant(_FOUR, ir.Undefined), number, ir.Constant(ir.IntType(32), 0))
    places = ir.Constant(ir.VectorType(ir.IntType(32), 4), [0] * 4)
    return builder.shuffle_vector(first, ir.Constant(_FOUR, ir.Undefined), places)


def _add_row(typing: Any, target: Any, t: Any, source: Any, s: Any, factor: Any) -> Any:
    """``target[t] += factor * source[s]`` for contiguous float32 arrays (rows, 4)."""
    del typing, t, s, factor

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        target, t, source, s, factor = arguments
        into = _pointer(context, builder, signature.args[0], target, t)
        row = _load(builder, _pointer(context, builder, signature.args[2], source, s))
        product = builder.fmul(_spread(builder, factor), row, flags=_FUSED)
        builder.store(builder.fadd(_load(builder, into), product, flags=_FUSED), into, align=4)
        return context.get_dummy_value()

    return types.void(target, types.intp, source, types.intp, types.float32), generate


def _blur_row(typing: Any, target: Any, source: Any, row: Any, ahead: Any, behind: Any) -> Any:
    """``target[row] = source[row] + (source[ahead] + source[behind]) / 2`` for contiguous float32 arrays (rows, 4)."""
    del typing, row, ahead, behind

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        target, source, *rows = arguments
        at = [_load(builder, _pointer(context, builder, signature.args[1], source, row)) for row in rows]
        half = ir.Constant(_FOUR, [0.5] * 4)
        sides = builder.fmul(half, builder.fadd(at[1], at[2]), flags=_FUSED)
        into = _pointer(context, builder, signature.args[0], target, rows[0])
        builder.store(builder.fadd(at[0], sides, flags=_FUSED), into, align=4)
        return context.get_dummy_value()

    return types.void(target, source, types.intp, types.intp, types.intp), generate


# the first argument is numba's: callers leave it out
add_row: Any = intrinsic(_add_row)
blur_row: Any = intrinsic(_blur_row)
