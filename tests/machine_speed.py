"""How slow the machine that tests is, so that limits in seconds mean the same everywhere."""

from __future__ import annotations

import resource
import subprocess
import sys
from pathlib import Path

_USUAL_S = 0.28
"""CPU seconds of the imports below where the limits were set."""


def cpu_seconds(*words: str, tries: int = 3) -> float:
    """CPU seconds of a Python process with these arguments, in the project's folder; the least of some tries."""
    spent = []
    for _ in range(tries):
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        subprocess.run([sys.executable, *words], check=True, capture_output=True, cwd=Path(__file__).parents[1])
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        spent.append(after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime)
    return min(spent)


def slowness() -> float:
    """1 on the machine where limits were set and on every quicker one; 2 where the same imports take twice as long.

    What is measured, anew each time, is what checking a config cannot do without: numpy, pydantic, Pillow and YAML.
    """
    return max(1.0, cpu_seconds("-c", "import numpy, pydantic.main, yaml, PIL.Image") / _USUAL_S)
