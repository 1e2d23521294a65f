"""What a person sees of a build in shards: one bar over all of it, whoever builds which shard.

Pure; passes on to the progress of the process.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Protocol

from stages.contracts import Progress


class WarningProgress(Progress, Protocol):
    """A Progress that keeps its warnings for the manifest."""

    warnings: list[str]


class Board:
    """The bar: what is published by anybody, and what this process has done of the shard at hand."""

    def __init__(self, progress: Progress, units: Callable[[], int], count: int) -> None:
        """Show ``count`` shards of ``units()`` images, or what else they are made of, on ``progress``."""
        self._progress, self._units, self._count = progress, units, count
        self._published = 0
        self._shown: int | None = None

    def count_published(self, units: Iterable[int]) -> None:
        """The published shards have these many units each, and no shard is at hand."""
        self._published = sum(units)
        self._show(self._published, "images", {})

    def count_current(self, done: int, unit: str, values: dict[str, float]) -> None:
        """``done`` units of the shard at hand are finished."""
        self._show(self._published + done, unit, values)

    def _show(self, done: int, unit: str, values: dict[str, float]) -> None:
        if self._shown is None or done < self._shown:  # a shard turned out to be damaged
            self._progress.begin(f"in {self._count} shards", total=self._units(), done=done, unit=unit)
        elif done > self._shown:
            self._progress.advance(done - self._shown, **values)
        self._shown = done


class ShardProgress:
    """The Progress of the stage while it makes one shard."""

    def __init__(self, inner: Progress, board: Board, number: int) -> None:
        """Show shard ``number``, counted from 1, on ``board`` and its lines on ``inner``."""
        self.warnings: list[str] = []
        self.units = 0
        """Of this shard, finished or not."""
        self._inner, self._board, self._number = inner, board, number
        self._done, self._unit = 0, "images"

    def begin(self, task: str, *, total: int, done: int = 0, unit: str = "images") -> None:
        """Take the size of the shard; the bar goes on."""
        del task
        self.units, self._done, self._unit = total, done, unit
        self._board.count_current(done, unit, {})

    def advance(self, count: int = 1, **values: float) -> None:
        """Count finished units."""
        self._done += count
        self._board.count_current(self._done, self._unit, {**values, "shard": self._number})

    def info(self, text: str) -> None:
        """Say one line."""
        self._inner.info(text)

    def warn(self, text: str) -> None:
        """Say one line and keep it for the shard's manifest."""
        self.warnings.append(text)
        self._inner.warn(text)


class MergeProgress:
    """The Progress of the stage while it adds to finished shards what needs the whole set."""

    def __init__(self, inner: Progress, count: int, warnings: Iterable[str]) -> None:
        """Begin with the warnings of ``count`` shards; what several of them said is kept once."""
        self.warnings = list(dict.fromkeys(warnings))
        self._inner, self._count = inner, count

    def begin(self, task: str, *, total: int, done: int = 0, unit: str = "images") -> None:
        """Start a bar of its own."""
        del task
        self._inner.begin(f"putting {self._count} shards together", total=total, done=done, unit=unit)

    def advance(self, count: int = 1, **values: float) -> None:
        """Count units that were found, or made where one is missing."""
        self._inner.advance(count, **values)

    def info(self, text: str) -> None:
        """Say one line."""
        self._inner.info(text)

    def warn(self, text: str) -> None:
        """Say one line and keep it for the manifest, unless a shard's build said it."""
        if text not in self.warnings:
            self.warnings.append(text)
            self._inner.warn(text)
