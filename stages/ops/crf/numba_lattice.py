"""The permutohedral lattice of the pixels of one image, built by compiled loops.

Reads and writes no file.  A vertex is known by its first d coordinates, as one number in mixed radix, which is linear:
the neighbours of all vertices along an axis are one step away.  So with the vertices in the order of their numbers, a
blur along any axis walks through memory in one direction, which is what makes it quick.
Shapes: N pixels of an image, d feature dimensions, D = d + 1 corners of a simplex, M lattice vertices.
Source: Adams, Baek, Davis, "Fast High-Dimensional Filtering Using the Permutohedral Lattice", 2010.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from stages.ops.crf.numba_compiled import compiled

Floats = NDArray[np.float32]
Integers = NDArray[Any]

_BLOCK = 64
"""Pixels that go through each loop together, so that it runs over full SIMD registers within the first cache."""

_HASH = np.uint64(0x9E3779B97F4A7C15)
"""2^64 over the golden ratio: the upper bits of its products are spread evenly (Knuth, volume 3, section 6.4)."""

_FIRST_BITS = 14
"""The table of vertices starts with 2^14 slots, for 8,192 vertices; an image of 500 × 375 has some ten thousands."""


class Lattice(NamedTuple):
    """A Gaussian kernel of unit width over the features of N pixels, ready to splat, blur and slice."""

    corners: NDArray[np.uint32]
    """Vertices around each pixel, (N, D)."""
    weights: Floats
    """What a pixel gives to each and takes from each, (N, D): barycentric, normalised, times the kernel's weight."""
    neighbours: NDArray[np.uint32]
    """Of each vertex along each axis, (D, M, 2); M where there is none."""


def build_lattice(features: Floats, strength: float) -> Lattice:
    """The lattice of a kernel.

    Splatting and slicing by its weights, with a blur between them, is ``strength`` · D^-1/2 K D^-1/2: the symmetric
    normalisation and the kernel's weight are folded in.

    Args:
        features: Positions over the kernel's widths, (d, N).
        strength: Weight of the kernel, ≥ 0.
    """
    d = len(features)
    scale = [np.sqrt(2 / 3) * (d + 1) / np.sqrt((i + 1) * (i + 2)) for i in range(d)]
    scaled = features * np.array(scale, np.float32)[:, None]
    origin, radix = _numbering(scaled)
    corners, weights, codes = _find_simplices(scaled, origin, radix)
    order = np.argsort(codes)
    place = np.empty(len(codes), np.uint32)
    place[order] = np.arange(len(codes), dtype=np.uint32)
    neighbours = _neighbours(codes[order], radix)
    _finish(corners, weights, place, neighbours, np.float32(strength))
    return Lattice(corners, weights, neighbours)


def _numbering(scaled: Floats) -> tuple[np.int64, NDArray[np.int64]]:
    """The linear map from a vertex's first d coordinates to its number: the constant, and the factors (d,).

    The number is one in mixed radix: the row in the image counts most, then the column, then coordinates 2 … d - 1.  So
    pixels near each other have vertices near each other in memory.  In the elevated coordinates e, e0 - e1 is twice the
    (scaled) column, and e0 + e1 - 2·e2 six times the row; with d = 2, e0 + e1 is twice the row.

    With widths near the least that a config allows the numbers may overflow.  They wrap then, and are still linear
    fingerprints of 64 bits; that two of a million vertices share one is less likely than 1 in ten millions.
    """
    d = len(scaled)
    digits = np.eye(d, dtype=np.int64)[::-1]
    digits[-2, :2] = 1, -1
    digits[-1, : min(d, 3)] = (1, 1, -2)[:d]
    least, most = scaled.min(axis=1).astype(np.float64), scaled.max(axis=1).astype(np.float64)
    elevation = np.triu(np.ones((d, d))) - np.diag(np.arange(1, d), -1)
    mixed = digits @ elevation
    lows = np.minimum(mixed * least, mixed * most).sum(axis=1)
    highs = np.maximum(mixed * least, mixed * most).sum(axis=1)
    room = 8 * (d + 1)  # a corner is less than D off in each coordinate, and a step to a neighbour as much
    low = np.floor(lows).astype(np.int64) - room
    extents = (np.ceil(highs).astype(np.int64) + room - low) | 1
    radix = np.ones(d, np.int64)
    radix[1:] = np.cumprod(extents[:-1])
    return -(low * radix).sum(), radix @ digits


# ---------------------------------------------------------------------------------------------------------------------
# Simplices of a block of pixels
# ---------------------------------------------------------------------------------------------------------------------


@compiled
def _elevate(features: Floats, start: int, count: int, elevated: Floats) -> None:
    """Map pixels on the plane of coordinates that sum to zero: (d, N) to (D, block)."""
    for p in range(count):
        elevated[0, p] = 0
    for j in range(len(features), 0, -1):
        factor = np.float32(j)
        for p in range(count):
            feature = features[j - 1, start + p]
            elevated[j, p] = elevated[0, p] - factor * feature
            elevated[0, p] += feature  # the running sum, in the end the coordinate 0


@compiled
def _enclose(elevated: Floats, count: int, vertex: Floats, rank: Integers, total: Integers) -> None:
    """The remainder-0 vertex of each pixel's simplex (D, block), and the rank of each coordinate's offset from it."""
    size = len(elevated)
    wide = np.float32(size)
    inverse = np.float32(1) / wide
    total[:count] = 0
    for i in range(size):
        for p in range(count):
            nearest = np.rint(elevated[i, p] * inverse)
            vertex[i, p] = nearest * wide
            total[p] += np.int32(nearest)
            rank[i, p] = 0
    for i in range(size - 1):
        for j in range(i + 1, size):
            for p in range(count):
                is_less = np.int32(elevated[i, p] - vertex[i, p] < elevated[j, p] - vertex[j, p])
                rank[i, p] += is_less
                rank[j, p] += np.int32(1) - is_less
    for i in range(size):
        for p in range(count):
            place = rank[i, p] + total[p]
            wrap = np.int32(place < 0) - np.int32(place >= size)
            rank[i, p] = place + wrap * np.int32(size)
            vertex[i, p] += np.float32(wrap) * wide


@compiled
def _weigh(elevated: Floats, vertex: Floats, rank: Integers, count: int, weights: Floats) -> None:
    """Barycentric weights of the corners, (D, block)."""
    size = len(elevated)
    inverse = np.float32(1) / np.float32(size)
    for r in range(size):
        for p in range(count):
            weights[r, p] = np.float32(r == 0)
    for i in range(size):
        for r in range(size):
            after = size - r if r > 0 else 0
            for p in range(count):
                offset = (elevated[i, p] - vertex[i, p]) * inverse
                sign = np.float32(rank[i, p] == size - 1 - r) - np.float32(rank[i, p] == after)
                weights[r, p] += offset * sign


@compiled
def _number(vertex: Floats, rank: Integers, count: int, origin: np.int64, radix: Integers, codes: Integers) -> None:
    """The numbers of the corners, (D, block)."""
    size = len(vertex)
    codes[0, :count] = origin
    for i in range(size - 1):
        for p in range(count):
            codes[0, p] += np.int64(vertex[i, p]) * radix[i]
    forward = radix.sum()
    for r in range(1, size):
        for p in range(count):
            codes[r, p] = codes[r - 1, p] + forward
        for i in range(size - 1):
            back = radix[i] * size
            for p in range(count):
                codes[r, p] -= back * np.int64(rank[i, p] == size - r)


# ---------------------------------------------------------------------------------------------------------------------
# Vertices of the image
# ---------------------------------------------------------------------------------------------------------------------


@compiled
def _slot(code: int, table: Integers, codes: Integers, bits: int) -> np.int64:
    """Where in the table the vertex with this number is, or belongs."""
    slot = np.int64((np.uint64(code) * _HASH) >> np.uint64(64 - bits))
    while table[slot] >= 0 and codes[table[slot]] != code:
        slot = (slot + 1) & (len(table) - 1)
    return slot


@compiled
def _table(codes: Integers, num_vertices: int, bits: int) -> tuple[Integers, Integers]:
    """A table of 2^bits slots with the vertices in it, and room for half as many numbers."""
    table = np.full(1 << bits, -1, np.int32)
    room = np.empty(len(table) // 2, np.int64)
    room[:num_vertices] = codes[:num_vertices]
    for m in range(num_vertices):
        table[_slot(codes[m], table, codes, bits)] = m
    return table, room


@compiled
def _find_simplices(features: Floats, origin: np.int64, radix: Integers) -> tuple[Integers, Floats, Integers]:
    """Corners (N, D) of each pixel in the order of their discovery, barycentric weights (N, D), and numbers (M,)."""
    d, num_pixels = features.shape
    size = d + 1
    elevated, vertex = np.empty((size, _BLOCK), np.float32), np.empty((size, _BLOCK), np.float32)
    rank, total = np.empty((size, _BLOCK), np.int32), np.empty(_BLOCK, np.int32)
    shares, numbers = np.empty((size, _BLOCK), np.float32), np.empty((size, _BLOCK), np.int64)
    corners, weights = np.empty((num_pixels, size), np.uint32), np.empty((num_pixels, size), np.float32)
    bits, num_vertices = _FIRST_BITS, 0
    table, codes = _table(np.empty(0, np.int64), 0, bits)
    for start in range(0, num_pixels, _BLOCK):
        count = min(_BLOCK, num_pixels - start)
        _elevate(features, start, count, elevated)
        _enclose(elevated, count, vertex, rank, total)
        _weigh(elevated, vertex, rank, count, shares)
        _number(vertex, rank, count, origin, radix, numbers)
        while num_vertices + size * count > len(codes):
            bits += 1
            table, codes = _table(codes, num_vertices, bits)
        for r in range(size):
            for p in range(count):
                weights[start + p, r] = shares[r, p]
                code = numbers[r, p]
                if p > 0 and numbers[r, p - 1] == code:  # often so between pixels of like colour
                    corners[start + p, r] = corners[start + p - 1, r]
                    continue
                slot = _slot(code, table, codes, bits)
                if table[slot] < 0:
                    table[slot] = num_vertices
                    codes[num_vertices] = code
                    num_vertices += 1
                corners[start + p, r] = table[slot]
    return corners, weights, codes[:num_vertices].copy()


@compiled
def _neighbours(codes: Integers, radix: Integers) -> Integers:
    """The two neighbours of each vertex along each of the D axes, (D, M, 2); M where there is none.

    Args:
        codes: Numbers of the vertices, sorted, (M,).
        radix: Of each coordinate, (d,).
    """
    num_vertices, d = len(codes), len(radix)
    found = np.full((d + 1, num_vertices, 2), num_vertices, np.uint32)
    for axis in range(d + 1):
        step = (radix[axis] * (d + 1) if axis < d else 0) - radix.sum()
        ahead = 0
        for m in range(num_vertices):
            wanted = codes[m] + step
            while ahead < num_vertices and codes[ahead] < wanted:
                ahead += 1
            if ahead == num_vertices:
                break
            if codes[ahead] == wanted:
                found[axis, m, 0] = ahead
                found[axis, ahead, 1] = m
    return found


@compiled
def _finish(corners: Integers, weights: Floats, place: Integers, neighbours: Integers, strength: np.float32) -> None:
    """Give the corners their sorted places, and fold normalisation and strength into the weights, in place."""
    num_pixels, size = corners.shape
    half, alpha = np.float32(0.5), np.float32(1 / (1 + 2.0 ** -(size - 1)))
    values = np.zeros(neighbours.shape[1] + 1, np.float32)
    scratch = np.zeros_like(values)
    for n in range(num_pixels):
        for r in range(size):
            corners[n, r] = place[corners[n, r]]
            values[corners[n, r]] += weights[n, r]
    for axis in range(size):
        for m in range(neighbours.shape[1]):
            scratch[m] = values[m] + half * (values[neighbours[axis, m, 0]] + values[neighbours[axis, m, 1]])
        values, scratch = scratch, values
    for n in range(num_pixels):
        mass = np.float32(0)
        for r in range(size):
            mass += weights[n, r] * values[corners[n, r]]
        # the root, since splatting and slicing both have it; 1e-20 is what pydensecrf adds under its root
        factor = np.sqrt(strength * alpha / (alpha * mass + np.float32(1e-20)))
        for r in range(size):
            weights[n, r] *= factor
