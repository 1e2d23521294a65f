"""Lay out line charts and matrices of classes for the report: data in, drawing coordinates out.

The template turns them into inline SVG.  Reads and writes nothing, and needs no plotting library: a report is written
within a moment and follows the page's light or dark colours.  Coordinates are SVG's: pixels, y downwards.
Shapes: C classes with background.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from stages.ops.metrics.confusion import iou

PLOT_PX = {"width": 520, "height": 270, "left": 58, "right": 504, "top": 16, "bottom": 222}
"""Size of a line chart, and the sides of the rectangle in it where the lines are."""
MOST_POINTS = 400
"""More points than this are thinned: the eye cannot see them and the page would grow with the training's length."""

MOST_CLASSES = 40
"""Classes that a matrix shows; of more, the best ones are put together as one."""
_MARGIN_PX = 10

Drawing = Mapping[str, Any]
"""What a macro of the template draws: texts, CSS classes and coordinates under the names that it reads."""


def line_chart(
    title: str,
    *,
    x_label: str,
    y_label: str,
    x: Sequence[float],
    lines: Mapping[str, Sequence[float]],
    faint: Mapping[str, Sequence[float]] | None = None,
    marks: Mapping[str, float] | None = None,
) -> Drawing:
    """Lay out ``lines`` over ``x``; the y axis starts at 0, or below where a value is negative.

    ``x`` ascends; each line has as many values, of which those that are not finite are left out.  ``faint`` lines are
    drawn pale and scaled so that their maximum touches the top (for a learning rate, whose unit is another one).
    ``marks`` are values of x that get a vertical line.  The legend has the names.
    """
    values = [value for line in lines.values() for value in line if math.isfinite(value)]
    y_ticks = nice_ticks(min([0.0, *values]), max([0.0, *values]) if values else 1.0)
    x_low, x_high = (min(x), max(x)) if len(x) else (0.0, 1.0)
    x_high = x_high if x_high > x_low else x_low + 1.0
    y_low, y_high = y_ticks[0], y_ticks[-1]

    def to_x(value: float) -> float:
        return PLOT_PX["left"] + (value - x_low) / (x_high - x_low) * (PLOT_PX["right"] - PLOT_PX["left"])

    def to_y(value: float) -> float:
        return PLOT_PX["bottom"] - (value - y_low) / (y_high - y_low) * (PLOT_PX["bottom"] - PLOT_PX["top"])

    def tick(value: float, at: float) -> dict[str, Any]:
        return {"at": at, "text": f"{value:.4g}" if abs(value) < 10_000 else f"{value:.0f}"}

    def curve(name: str, style: str, line: Sequence[float], scale: float = 1.0) -> dict[str, str]:
        step = max(1, math.ceil(len(line) / MOST_POINTS))
        kept = [i for i in range(len(line)) if (i % step == 0 or i == len(line) - 1) and math.isfinite(line[i])]
        points = " ".join(f"{to_x(x[i]):.1f},{to_y(line[i] * scale):.1f}" for i in kept)
        return {"name": name, "style": style, "points": points}

    peaks = {name: max(line, default=0.0) or 1.0 for name, line in (faint or {}).items()}
    pale = [curve(name, "line-faint", line, y_high / peaks[name]) for name, line in (faint or {}).items()]
    strong = [curve(name, f"line-{number % 4}", line) for number, (name, line) in enumerate(lines.items())]
    return {
        "title": title,
        "x_label": x_label,
        "y_label": y_label,
        "x_ticks": [tick(v, to_x(v)) for v in nice_ticks(x_low, x_high) if x_low <= v <= x_high * (1 + 1e-9)],
        "y_ticks": [tick(v, to_y(v)) for v in y_ticks],
        "curves": [*pale, *reversed(strong)],  # the first line is drawn last, on top; the legend reads backwards
        # the colours go on where those of the lines end
        "marks": [
            {"at": to_x(value), "name": name, "style": f"mark-{number}"}
            for number, (name, value) in enumerate((marks or {}).items(), start=max(len(lines), 1) - 1)
        ],
        **PLOT_PX,
    }


def nice_ticks(low: float, high: float, count: int = 5) -> list[float]:
    """Round values (1, 2, 2.5 or 5 times a power of ten apart) that cover ``low`` to ``high`` in about ``count`` steps.

    The first is at or below ``low`` and the last at or above ``high``.
    """
    span = high - low if high > low else 1.0
    power = 10.0 ** math.floor(math.log10(span / count))
    step = next(factor * power for factor in (1.0, 2.0, 2.5, 5.0, 10.0) if factor * power * count >= span * (1 - 1e-9))
    first = math.floor(low / step + 1e-9)
    last = math.ceil(max(high, low + span) / step - 1e-9)
    return [number * step for number in range(first, last + 1)]


def matrix_picture(title: str, matrix: NDArray[np.int64], names: Sequence[str]) -> Drawing:
    """Lay out a confusion matrix with the share of each true class's pixels in each cell; rows add up to 100 %.

    ``matrix`` has the pixels by true (rows) and predicted class (C, C), ``names`` the classes, background first.
    """
    kept = np.flatnonzero(matrix.sum(axis=0) + matrix.sum(axis=1))  # in the truth or predicted
    matrix, names = _join_best(matrix[np.ix_(kept, kept)], [names[index] for index in kept.tolist()])

    def hint(row: int, column: int, share: float) -> str:
        part, pixels = f"{share * 100:.2f} % of its pixels", f"({matrix[row, column]:,})"
        if row == column:
            return f"{names[row]}: {part} found {pixels}"
        return f"{names[row]} taken for {names[column]}: {part} {pixels}"

    return _lay_out(title, matrix, matrix.sum(axis=1), names, ("true", "predicted"), hint)


def cooccurrence_picture(title: str, matrix: NDArray[np.int64], names: Sequence[str]) -> Drawing:
    """Lay out how many of each class's images have each other class too, as shares of the class's images.

    ``matrix`` has the images with both classes (K, K), on its diagonal those of one class; ``names`` are the K classes.
    Of more than ``MOST_CLASSES`` the most frequent are shown.
    """
    images = np.diagonal(matrix)
    kept = np.sort(np.argsort(-images, kind="stable")[:MOST_CLASSES])
    kept = kept[images[kept] > 0]
    matrix, images = matrix[np.ix_(kept, kept)], images[kept]
    chosen = set(kept.tolist())
    names = [name for index, name in enumerate(names) if index in chosen]

    def hint(row: int, column: int, share: float) -> str:
        if row == column:
            return f"{names[row]}: {images[row]:,} images"
        both = f"{matrix[row, column]:,} of {images[row]:,} images with {names[row]}"
        return f"{both} have {names[column]} too ({share * 100:.1f} %)"

    return _lay_out(title, matrix, images, names, ("images with", "that have"), hint)


def _lay_out(
    title: str,
    matrix: NDArray[np.int64],
    whole: NDArray[np.int64],
    names: Sequence[str],
    axes: tuple[str, str],
    hint: Callable[[int, int, float], str],
) -> Drawing:
    """Cells shaded by ``matrix`` as a share of ``whole``, that of their row; ``axes`` names rows and columns."""
    cell_px = min(max(660 / max(len(names), 1), 18), 44)  # pixels, of which a letter takes 6.4 and the axis's title 18
    margin = max((len(name) for name in names), default=0) * 6.4 + 2 * _MARGIN_PX + 18
    shares = np.divide(matrix, whole[:, None], out=np.zeros(matrix.shape), where=whole[:, None] > 0)
    cells = []
    for row, column in zip(*(places.tolist() for places in np.nonzero(matrix)), strict=True):
        share = float(shares[row, column])
        percent = f"{share * 100:.0f}"
        cell = {"x": column * cell_px, "y": row * cell_px, "share": share, "is_dark": share >= 0.7}
        cells.append({**cell, "text": "" if percent == "0" else percent, "hint": hint(row, column, share)})
    side = len(names) * cell_px
    return {
        "title": title,
        "axes": axes,
        "cells": cells,
        "labels": [{"name": name, "at": (place + 0.5) * cell_px} for place, name in enumerate(names)],
        "cell_px": cell_px,
        "left": margin,
        "top": margin,
        "side": side,
        "width": margin + side + _MARGIN_PX,
        "height": margin + side + _MARGIN_PX,
    }


def _join_best(matrix: NDArray[np.int64], names: list[str]) -> tuple[NDArray[np.int64], list[str]]:
    """Keep background and the classes of lowest IoU; the others become one row and one column."""
    if len(names) <= MOST_CLASSES:
        return matrix, names
    order = 1 + np.argsort(iou(matrix)[1:], kind="stable")
    kept = np.sort(np.append(order[: MOST_CLASSES - 2], 0))
    group = np.full(len(names), len(kept))
    group[kept] = np.arange(len(kept))
    joined = np.zeros((len(kept) + 1, len(kept) + 1), np.int64)
    np.add.at(joined, (group[:, None], group[None]), matrix)
    return joined, [*(names[index] for index in kept), f"{len(names) - len(kept)} better ones"]
