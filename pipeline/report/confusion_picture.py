"""Lay out a confusion matrix for the report: counts in, drawing coordinates out; the template makes inline SVG of them.

Reads and writes nothing.  Rows are true classes and add up to 100 %; the colours follow the page's light or dark ones.
Shapes: C classes with background.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from stages.ops.metrics.confusion import iou

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
    matrix, names = _drop_absent(matrix, names)
    matrix, names = _join_best(matrix, names)
    cell = min(max(_WHOLE_PX / max(len(names), 1), _CELL_PX[0]), _CELL_PX[1])
    margin = max((len(name) for name in names), default=0) * _LETTER_PX + 2 * _MARGIN_PX + _TITLE_PX
    true = matrix.sum(axis=1, keepdims=True)
    shares = np.divide(matrix, true, out=np.zeros(matrix.shape), where=true > 0)
    cells = [
        _cell(float(shares[row, column]), int(matrix[row, column]), (column * cell, row * cell), names[row], name)
        for row in range(len(names))
        for column, name in enumerate(names)
        if matrix[row, column]
    ]
    return MatrixPicture(
        title=title,
        cells=tuple(cells),
        labels=tuple(MatrixLabel(name, (place + 0.5) * cell) for place, name in enumerate(names)),
        cell_px=cell,
        left=margin,
        top=margin,
        side=len(names) * cell,
    )


def _cell(share: float, pixels: int, at: tuple[float, float], true: str, predicted: str) -> MatrixCell:
    percent = f"{share * 100:.0f}"
    return MatrixCell(
        x=at[0],
        y=at[1],
        share=share,
        text="" if percent == "0" else percent,
        is_dark=share >= _DARK_SHARE,
        hint=f"{true} taken for {predicted}: {share * 100:.2f} % of its pixels ({pixels:,})"
        if true != predicted
        else f"{true}: {share * 100:.2f} % of its pixels found ({pixels:,})",
    )


def _drop_absent(matrix: NDArray[np.int64], names: Sequence[str]) -> tuple[NDArray[np.int64], list[str]]:
    """Leave out classes that are neither in the truth nor predicted."""
    kept = np.flatnonzero(matrix.sum(axis=0) + matrix.sum(axis=1))
    return matrix[np.ix_(kept, kept)], [names[index] for index in kept.tolist()]


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
