"""Let several ways of doing one thing take turns, so that what else the machine does meets them all alike."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable


def measure(
    ways: dict[str, Callable[[], object]], rounds: int, *, clock: Callable[[], float] = time.perf_counter
) -> dict[str, float]:
    """The median seconds of each way.

    Args:
        ways: What is timed, by name; in every round each is called once, in this order.
        rounds: How often.
        clock: Wall time, or ``time.process_time``.
    """
    times: dict[str, list[float]] = {name: [] for name in ways}
    for _ in range(rounds):
        for name, way in ways.items():
            started = clock()
            way()
            times[name].append(clock() - started)
    return {name: statistics.median(values) for name, values in times.items()}
