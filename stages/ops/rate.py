"""How many images a second are finished at present; reads and writes nothing."""

from __future__ import annotations

from collections import deque
from time import monotonic

_BATCHES = 128
"""Batches that the rate is taken over."""


class ImageRate:
    """Images per second over the last batches; of the first alone nothing, for it waited for the start."""

    def __init__(self) -> None:
        """Nothing is finished yet."""
        self._ends: deque[tuple[float, int]] = deque(maxlen=_BATCHES)
        self._count = 0

    def add(self, count: int) -> dict[str, float]:
        """Note that ``count`` images are finished just now; what ``Progress.step`` should be told beside."""
        self._count += count
        self._ends.append((monotonic(), self._count))
        (since, before), (now, after) = self._ends[0], self._ends[-1]
        return {"images_per_s": (after - before) / (now - since)} if now > since else {}
