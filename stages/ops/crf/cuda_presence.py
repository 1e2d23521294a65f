"""Whether torch would find a CUDA device, told without importing torch, for choices that a config's check makes.

Reads the text of torch's ``version.py`` and asks NVIDIA's management library, which opens no device: a process that
has asked may still fork.
"""

from __future__ import annotations

import ctypes
import importlib.util
import os
import re
from functools import cache
from pathlib import Path

_LIBRARIES = ("libnvidia-ml.so.1", "nvml.dll")
_CUDA_OF_TORCH = re.compile(r"^cuda\b[^=]*=\s*['\"]", re.MULTILINE)


@cache
def has_cuda() -> bool:
    """Whether this process may use a CUDA device: torch is built for CUDA, one is there and is not hidden.

    A device that torch cannot use all the same (a driver older than torch's CUDA) counts as there.
    """
    return not _all_hidden(os.environ.get("CUDA_VISIBLE_DEVICES")) and _is_torch_for_cuda() and _num_devices() > 0


def _all_hidden(visible: str | None) -> bool:
    """CUDA sees the devices before the first invalid entry: an empty list or a leading -1 hides all of them."""
    return visible is not None and visible.split(",")[0].strip() in ("", "-1", "NoDevFiles")


def _is_torch_for_cuda() -> bool:
    package = importlib.util.find_spec("torch")
    if package is None or package.origin is None:
        return False
    version = Path(package.origin).with_name("version.py")
    return version.exists() and _CUDA_OF_TORCH.search(version.read_text(encoding="utf-8")) is not None


def _num_devices() -> int:
    for name in _LIBRARIES:
        try:
            library = ctypes.CDLL(name)
        except OSError:
            continue
        count = ctypes.c_uint(0)
        if library.nvmlInit_v2() != 0:
            return 0
        found = library.nvmlDeviceGetCount_v2(ctypes.byref(count)) == 0
        library.nvmlShutdown()
        return count.value if found else 0
    return 0
