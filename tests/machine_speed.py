"""How slow the machine that tests is, so that limits in seconds mean the same everywhere."""

from __future__ import annotations

import resource
import subprocess
import sys
from functools import cache

_USUAL_S = 0.28
"""CPU seconds of the imports below where the limits were set."""


@cache
def slowness() -> float:
    """1 on the machine where limits were set and on every quicker one; 2 where the same imports take twice as long.

    What is measured is what checking a config cannot do without: numpy, pydantic, Pillow and YAML.
    """
    spent = []
    for _ in range(3):
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        subprocess.run([sys.executable, "-c", "import numpy, pydantic.main, yaml, PIL.Image"], check=True)
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        spent.append(after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime)
    return max(1.0, min(spent) / _USUAL_S)
