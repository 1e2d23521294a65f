"""Mean-field steps of all labellings of one image at once, by compiled loops.

Reads and writes no file.  A step goes through the image once: in blocks of pixels it takes the messages from both
lattices, makes probabilities of them, and gives these to the lattices of the next step.
Shapes: N pixels, D corners of a simplex, M lattice vertices, S labellings with L labels each, P ≥ S·L the labels of
all, padded to a multiple of 4 (a SIMD register).
Source: Krähenbühl and Koltun, 2011; the exponential's polynomial is Cephes' ``expf`` (Moshier).
"""

# ruff: noqa: ANN401 - numba and llvmlite give their builders, contexts and values no public types
from __future__ import annotations

from typing import Any

import numpy as np
from llvmlite import ir
from numba import types
from numba.extending import intrinsic
from numpy.typing import NDArray

from stages.ops.crf.numba_compiled import compiled

Floats = NDArray[np.float32]
Integers = NDArray[Any]
Simplices = tuple[Integers, Floats]
"""Corners and weights, (N, D) each."""
Pair = tuple[Floats, Floats]

_BLOCK = 64
"""Pixels that go through each loop together, so that it runs over full SIMD registers within the first cache."""

_LOG2_E = np.float32(1.44269504)
_LN2_HIGH, _LN2_LOW = np.float32(0.693359375), np.float32(-2.12194440e-4)
_LEAST = np.float32(-50)
"""exp(-50) = 2e-22 changes no sum of a softmax, and below -87 the result would be no normal float32."""


# ---------------------------------------------------------------------------------------------------------------------
# Two operations of four float32 at once
#
# numba turns simple loops over long rows into SIMD by itself, but not the four labels of a lattice vertex (its pass for
# that is off by default).  They are written in LLVM's vector type here: each is one load, sum or product of a register.
# ---------------------------------------------------------------------------------------------------------------------

_FOUR = ir.VectorType(ir.FloatType(), 4)
_FUSED = ("contract",)
"""A product may join its sum in one instruction."""


def _pointer(context: Any, builder: Any, array_type: Any, array: Any, row: Any) -> Any:
    """The address of a row of an array (rows, 4)."""
    data = context.make_array(array_type)(context, builder, array).data
    place = builder.mul(row, ir.Constant(row.type, 4))
    return builder.bitcast(builder.gep(data, [place]), _FOUR.as_pointer())


def _load_row(builder: Any, pointer: Any) -> Any:
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
        row = _load_row(builder, _pointer(context, builder, signature.args[2], source, s))
        product = builder.fmul(_spread(builder, factor), row, flags=_FUSED)
        builder.store(builder.fadd(_load_row(builder, into), product, flags=_FUSED), into, align=4)
        return context.get_dummy_value()

    return types.void(target, types.intp, source, types.intp, types.float32), generate


def _blur_row(typing: Any, target: Any, source: Any, row: Any, ahead: Any, behind: Any) -> Any:
    """``target[row] = source[row] + (source[ahead] + source[behind]) / 2`` for contiguous float32 arrays (rows, 4)."""
    del typing, row, ahead, behind

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        target, source, *rows = arguments
        at = [_load_row(builder, _pointer(context, builder, signature.args[1], source, row)) for row in rows]
        half = ir.Constant(_FOUR, [0.5] * 4)
        sides = builder.fmul(half, builder.fadd(at[1], at[2]), flags=_FUSED)
        into = _pointer(context, builder, signature.args[0], target, rows[0])
        builder.store(builder.fadd(at[0], sides, flags=_FUSED), into, align=4)
        return context.get_dummy_value()

    return types.void(target, source, types.intp, types.intp, types.intp), generate


# the first argument is numba's: callers leave it out
add_row: Any = intrinsic(_add_row)
blur_row: Any = intrinsic(_blur_row)


# ---------------------------------------------------------------------------------------------------------------------
# Loops
# ---------------------------------------------------------------------------------------------------------------------


@compiled
def _exp(values: Floats, bits: Integers, exponents: Integers, count: int) -> None:
    """Exp of values ≤ 0 in place, within 2e-7 of itself: 2^k · exp(rest), a polynomial over |rest| ≤ ln 2 / 2.

    ``bits`` is ``values`` seen as int32.  Such loops run over SIMD registers, calls of libm's exp do not.
    """
    for i in range(count):
        x = values[i] if values[i] > _LEAST else _LEAST
        k = np.rint(x * _LOG2_E)
        rest = x - k * _LN2_HIGH - k * _LN2_LOW
        y = np.float32(1.9875691500e-4) * rest + np.float32(1.3981999507e-3)
        y = y * rest + np.float32(8.3334519073e-3)
        y = y * rest + np.float32(4.1665795894e-2)
        y = y * rest + np.float32(1.6666665459e-1)
        y = y * rest + np.float32(5.0000001201e-1)
        values[i] = y * (rest * rest) + rest + np.float32(1)
        exponents[i] = np.int32(k)
    for i in range(count):
        bits[i] += exponents[i] << 23


@compiled
def _softmax(block: Floats, bits: Integers, exponents: Integers, scratch: Floats, first: int, last: int) -> None:
    """Softmax over the rows first … last - 1 of (P, block), in place."""
    most, total = scratch[0], scratch[1]
    for p in range(_BLOCK):
        most[p] = block[first, p]
        total[p] = 0
    for k in range(first + 1, last):
        for p in range(_BLOCK):
            most[p] = block[k, p] if block[k, p] > most[p] else most[p]
    for k in range(first, last):
        for p in range(_BLOCK):
            block[k, p] -= most[p]
        _exp(block[k], bits[k], exponents, _BLOCK)
        for p in range(_BLOCK):
            total[p] += block[k, p]
    for p in range(_BLOCK):
        total[p] = np.float32(1) / total[p]
    for k in range(first, last):
        for p in range(_BLOCK):
            block[k, p] *= total[p]


@compiled
def _take(messages: Floats, start: int, count: int, corners: Integers, weights: Floats, values: Floats) -> None:
    """Add what a blurred lattice (rows of M + 1 vertices) says of each pixel to ``messages`` (rows of a block)."""
    quads = len(messages) // _BLOCK
    for p in range(count):
        for c in range(quads):
            for r in range(corners.shape[1]):
                vertex = np.intp(corners[start + p, r])
                add_row(messages, p * quads + c, values, vertex * quads + c, weights[start + p, r])


@compiled
def _give(shares: Floats, start: int, count: int, corners: Integers, weights: Floats, values: Floats) -> None:
    """Splat the probabilities of a block on a lattice (rows of M + 1 vertices)."""
    quads = len(shares) // _BLOCK
    for p in range(count):
        for c in range(quads):
            for r in range(corners.shape[1]):
                vertex = np.intp(corners[start + p, r])
                add_row(values, vertex * quads + c, shares, p * quads + c, weights[start + p, r])


@compiled
def blur(values: Floats, scratch: Floats, neighbours: Integers) -> tuple[Floats, Floats]:
    """Blur rows of M + 1 vertices, the last zero, along every axis: the array with the result, and the other one."""
    num_vertices = neighbours.shape[1]
    quads = len(values) // (num_vertices + 1)
    for axis in range(len(neighbours)):
        for m in range(num_vertices):
            ahead, behind = np.intp(neighbours[axis, m, 0]) * quads, np.intp(neighbours[axis, m, 1]) * quads
            for c in range(quads):
                blur_row(scratch, values, m * quads + c, ahead + c, behind + c)
        values, scratch = scratch, values
    return values, scratch


@compiled
def _load(block: Floats, rows: Floats, energy: Floats, start: int, count: int) -> None:
    """Logits of a block (S·L, block): messages less energies."""
    messages = rows.reshape(_BLOCK, rows.size // _BLOCK)
    for k in range(len(block)):
        for p in range(count):
            block[k, p] = messages[p, k] - energy[k, start + p]


@compiled
def _store(block: Floats, rows: Floats, marginals: Floats, start: int, count: int) -> None:
    """Probabilities of a block, for the lattices and, where it has room, for ``marginals``."""
    shares = rows.reshape(_BLOCK, rows.size // _BLOCK)
    for k in range(len(block)):
        for p in range(count):
            shares[p, k] = block[k, p]
    if marginals.size:
        for k in range(len(block)):
            for p in range(count):
                marginals[k, start + p] = block[k, p]


@compiled
def sweep(
    energy: Floats, num_labels: int, near: Simplices, far: Simplices, taken: Pair, given: Pair, marginals: Floats
) -> None:
    """Half a step: from the blurred lattices of the step before to those of the next one, not yet blurred.

    Args:
        energy: Of each labelling, one after the other, (S·L, N).
        num_labels: L.
        near: Corners and weights of the kernel over position.
        far: Of the one over position and colour.
        taken: Both blurred lattices, rows of four labels ((M + 1)·P / 4, 4); all zero in the beginning.
        given: Both lattices to splat on, the same shapes, all zero; empty ones where no step follows.
        marginals: Takes the probabilities, (S·L, N); an empty one does not.
    """
    block = np.zeros((len(energy), _BLOCK), np.float32)
    rows = np.zeros((_BLOCK * ((len(energy) + 3) // 4), 4), np.float32)
    bits, exponents, scratch = block.view(np.int32), np.empty(_BLOCK, np.int32), np.empty((2, _BLOCK), np.float32)
    for start in range(0, energy.shape[1], _BLOCK):
        count = min(_BLOCK, energy.shape[1] - start)
        rows[:] = 0
        _take(rows, start, count, near[0], near[1], taken[0])
        _take(rows, start, count, far[0], far[1], taken[1])
        _load(block, rows, energy, start, count)
        for first in range(0, len(energy), num_labels):
            _softmax(block, bits, exponents, scratch, first, first + num_labels)
        _store(block, rows, marginals, start, count)
        if given[0].size:
            _give(rows, start, count, near[0], near[1], given[0])
            _give(rows, start, count, far[0], far[1], given[1])
