"""The GPUs that this process may use, without importing torch here.

Asks ``nvidia-smi``, or torch in a process of its own; what CUDA_VISIBLE_DEVICES allows stands.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path

VARIABLE = "CUDA_VISIBLE_DEVICES"
_TIMEOUT_S = 60.0
_DEVICE_FILES = ("/dev/nvidiactl", "/dev/kfd", "/dev/dxg")
"""One of them is there where a driver is: NVIDIA, AMD, WSL."""


def find_gpus(environment: Mapping[str, str] = os.environ) -> list[str]:
    """What CUDA_VISIBLE_DEVICES of one worker per GPU should be; empty without a GPU.

    Indices are in the order of the PCI bus (CUDA_DEVICE_ORDER=PCI_BUS_ID), as nvidia-smi counts.
    """
    allowed = environment.get(VARIABLE)
    if allowed is not None:
        names = [name.strip() for name in allowed.split(",")]
        return names[: names.index("-1")] if "-1" in names else [name for name in names if name]
    program = shutil.which("nvidia-smi", path=environment.get("PATH"))
    found = _ask([program, "--query-gpu=index", "--format=csv,noheader"], environment) if program else None
    if found is not None:
        return found.split()
    if any(Path(file).exists() for file in _DEVICE_FILES):
        number = _ask([sys.executable, "-c", "import torch; print(torch.cuda.device_count())"], environment)
        return [str(index) for index in range(int(number or 0))]
    return []


def _ask(command: list[str], environment: Mapping[str, str]) -> str | None:
    """What a program says, or None when it fails."""
    try:
        done = subprocess.run(
            command, capture_output=True, text=True, check=True, timeout=_TIMEOUT_S, env=dict(environment)
        )
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout


def short_name(device: str) -> str:
    """``device`` in the name of a worker: ``gpu0``, or the beginning of a UUID."""
    return f"gpu{device}" if device.isdigit() else device.lower()[:12]
