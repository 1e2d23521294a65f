"""Lay out line charts and the confusion matrix for the report: data in, drawing coordinates out.

The template turns them into inline SVG.  Reads and writes nothing, and needs no plotting library: a report is written
within a moment and follows the page's light or dark colours.  Coordinates are SVG's: pixels, y downwards.
Shapes: C classes with background.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from stages.ops.metrics.confusion import iou

WIDTH_PX, HEIGHT_PX = 520, 270
LEFT_PX, RIGHT_PX, TOP_PX, BOTTOM_PX = 58, 16, 16, 48
MOST_POINTS = 400
"""More points than this are thinned: the eye cannot see them and the page would grow with the training's length."""


@dataclass(frozen=True)
class Tick:
    """A labelled position on an axis."""

    at: float
    text: str


@dataclass(frozen=True)
class Curve:
    """One drawn line with its entry in the legend."""

    name: str
    style: str
    """CSS class that carries the colour and the dashes: ``line-0``, ``line-1`` … or ``line-faint``."""
    points: str
    """The ``points`` attribute of an SVG polyline."""


@dataclass(frozen=True)
class Mark:
    """A vertical line at a value of the x axis."""

    at: float
    name: str
    style: str


@dataclass(frozen=True)
class LineChart:
    """Everything the template needs to draw one chart."""

    title: str
    x_label: str
    y_label: str
    x_ticks: tuple[Tick, ...]
    y_ticks: tuple[Tick, ...]
    curves: tuple[Curve, ...]
    marks: tuple[Mark, ...] = ()
    width: int = WIDTH_PX
    height: int = HEIGHT_PX
    left: int = LEFT_PX
    top: int = TOP_PX
    right: int = WIDTH_PX - RIGHT_PX
    bottom: int = HEIGHT_PX - BOTTOM_PX


def line_chart(
    title: str,
    *,
    x_label: str,
    y_label: str,
    x: Sequence[float],
    lines: Mapping[str, Sequence[float]],
    faint: Mapping[str, Sequence[float]] | None = None,
    marks: Mapping[str, float] | None = None,
) -> LineChart:
    """Lay out ``lines`` over ``x``; the y axis starts at 0, or below where a value is negative.

    Args:
        title: What a screen reader says.
        x_label: Name and unit of the x axis.
        y_label: Name and unit of the y axis.
        x: n ascending values.
        lines: n values each, by the name in the legend; values that are not finite are left out.
        faint: n values each, drawn pale and scaled so that their maximum touches the top (for a learning rate, whose
            unit is another one).
        marks: Values of x that get a vertical line, by the name in the legend.
    """
    values = [value for line in lines.values() for value in line if math.isfinite(value)]
    y_ticks = nice_ticks(min([0.0, *values]), max([0.0, *values]) if values else 1.0)
    x_low, x_high = (min(x), max(x)) if len(x) else (0.0, 1.0)
    x_high = x_high if x_high > x_low else x_low + 1.0
    y_low, y_high = y_ticks[0], y_ticks[-1]

    def to_x(value: float) -> float:
        return LEFT_PX + (value - x_low) / (x_high - x_low) * (WIDTH_PX - LEFT_PX - RIGHT_PX)

    def to_y(value: float) -> float:
        return HEIGHT_PX - BOTTOM_PX - (value - y_low) / (y_high - y_low) * (HEIGHT_PX - TOP_PX - BOTTOM_PX)

    def points(line: Sequence[float], scale: float = 1.0) -> str:
        step = max(1, math.ceil(len(line) / MOST_POINTS))
        kept = [i for i in range(len(line)) if (i % step == 0 or i == len(line) - 1) and math.isfinite(line[i])]
        return " ".join(f"{to_x(x[i]):.1f},{to_y(line[i] * scale):.1f}" for i in kept)

    pale = [
        Curve(name, "line-faint", points(line, y_high / (max(line, default=0.0) or 1.0)))
        for name, line in (faint or {}).items()
    ]
    strong = [Curve(name, f"line-{number % 4}", points(line)) for number, (name, line) in enumerate(lines.items())]
    x_ticks = [value for value in nice_ticks(x_low, x_high) if x_low <= value <= x_high * (1 + 1e-9)]
    return LineChart(
        title=title,
        x_label=x_label,
        y_label=y_label,
        x_ticks=tuple(Tick(to_x(value), tick_text(value)) for value in x_ticks),
        y_ticks=tuple(Tick(to_y(value), tick_text(value)) for value in y_ticks),
        curves=(*pale, *reversed(strong)),  # the first line is drawn last, on top; the legend reads backwards
        # the colours go on where those of the lines end
        marks=tuple(
            Mark(to_x(value), name, f"mark-{n}")
            for n, (name, value) in enumerate((marks or {}).items(), start=max(len(lines), 1) - 1)
        ),
    )


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


def tick_text(value: float) -> str:
    """The shortest text of a tick: ``0``, ``0.25``, ``1500``, ``2e-05``."""
    return f"{value:.4g}" if abs(value) < 10_000 else f"{value:.0f}"


# ---------------------------------------------------------------------------------------------------------------------
# The confusion matrix
# ---------------------------------------------------------------------------------------------------------------------

MOST_CLASSES = 40
"""Classes that a picture shows; of more, the best ones are put together as one."""
_WHOLE_PX = 660
_CELL_PX = (18, 44)
_LETTER_PX = 6.4
_MARGIN_PX = 10
_TITLE_PX = 18
"""Room for the title of an axis."""
_DARK_SHARE = 0.7
"""Share from which a cell's number is written in the colour for dark cells."""


@dataclass(frozen=True)
class MatrixCell:
    """One coloured square."""

    x: float
    y: float
    share: float
    """Part of the true class's pixels, 0 … 1: the depth of the colour."""
    text: str
    """Percent without the sign; empty where it would be 0."""
    is_dark: bool
    hint: str
    """What a pointer over the cell shows."""


@dataclass(frozen=True)
class MatrixLabel:
    """The name of a row and column."""

    name: str
    at: float
    """Middle of the row or column, from the first cell's edge."""


@dataclass(frozen=True)
class MatrixPicture:
    """Everything the template needs to draw one confusion matrix."""

    title: str
    cells: tuple[MatrixCell, ...]
    labels: tuple[MatrixLabel, ...]
    cell_px: float
    left: float
    top: float
    side: float
    """Width and height of the square of cells."""

    @property
    def width(self) -> float:
        """Of the whole picture, in pixels."""
        return self.left + self.side + _MARGIN_PX

    @property
    def height(self) -> float:
        """Of the whole picture, in pixels."""
        return self.top + self.side + _MARGIN_PX


def matrix_picture(title: str, matrix: NDArray[np.int64], names: Sequence[str]) -> MatrixPicture:
    """Lay out ``matrix`` with the share of each true class's pixels in each cell.

    Args:
        title: What a screen reader says.
        matrix: Pixels by true (rows) and predicted class (C, C).
        names: C names, background first.
    """
    kept = np.flatnonzero(matrix.sum(axis=0) + matrix.sum(axis=1))  # in the truth or predicted
    matrix, names = _join_best(matrix[np.ix_(kept, kept)], [names[index] for index in kept.tolist()])
    cell = min(max(_WHOLE_PX / max(len(names), 1), _CELL_PX[0]), _CELL_PX[1])
    margin = max((len(name) for name in names), default=0) * _LETTER_PX + 2 * _MARGIN_PX + _TITLE_PX
    true = matrix.sum(axis=1, keepdims=True)
    shares = np.divide(matrix, true, out=np.zeros(matrix.shape), where=true > 0)
    cells = []
    for row, column in zip(*(places.tolist() for places in np.nonzero(matrix)), strict=True):
        share, percent = float(shares[row, column]), f"{shares[row, column] * 100:.0f}"
        text = f"{share * 100:.2f} % of its pixels"
        hint = f"{names[row]} taken for {names[column]}: {text}" if row != column else f"{names[row]}: {text} found"
        cells.append(
            MatrixCell(
                x=column * cell,
                y=row * cell,
                share=share,
                text="" if percent == "0" else percent,
                is_dark=share >= _DARK_SHARE,
                hint=f"{hint} ({matrix[row, column]:,})",
            )
        )
    return MatrixPicture(
        title=title,
        cells=tuple(cells),
        labels=tuple(MatrixLabel(name, (place + 0.5) * cell) for place, name in enumerate(names)),
        cell_px=cell,
        left=margin,
        top=margin,
        side=len(names) * cell,
    )


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
