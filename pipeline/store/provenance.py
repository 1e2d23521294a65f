"""Where and with what an artifact was built: host, package versions, code revision."""

from __future__ import annotations

import contextlib
import os
import platform
import re
import socket
import subprocess
import sys
from importlib import metadata
from pathlib import Path
from typing import Any

PACKAGES = (
    "wsss-pipeline",
    "torch",
    "torchvision",
    "timm",
    "segmentation-models-pytorch",
    "albumentations",
    "numpy",
    "scipy",
    "pillow",
    "pydensecrf2",
    "numba",
    "llvmlite",
)
"""Distributions whose version may explain a difference in results."""


def describe_machine() -> dict[str, Any]:
    """Host, Python, package versions and code revision, as JSON; None for what the system does not tell."""
    cpu, memory, gpus = platform.processor() or platform.machine(), None, None
    with contextlib.suppress(OSError):
        found = re.search(r"^model name\s*:(.*)", Path("/proc/cpuinfo").read_text(encoding="utf-8"), re.MULTILINE)
        cpu = found[1].strip() if found else platform.machine()
    with contextlib.suppress(AttributeError, OSError, ValueError):
        memory = f"{os.sysconf('SC_PAGE_SIZE') * os.sysconf('SC_PHYS_PAGES') / 2**30:.0f} GiB"
    torch = sys.modules.get("torch")  # only where a stage has loaded it already
    if torch is not None and torch.cuda.is_available():
        gpus = ", ".join(torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count()))
    packages = {}
    for name in PACKAGES:
        with contextlib.suppress(metadata.PackageNotFoundError):
            packages[name] = metadata.version(name)
    return {
        "host": socket.gethostname(),
        "python": platform.python_version(),
        "machine": f"{platform.system()} {platform.machine()}",
        "cpu": cpu,
        "cores": f"{os.cpu_count()} cores",
        "memory": memory,
        "device": gpus,
        "packages": packages,
        "revision": _code_revision(),
    }


def _code_revision() -> str | None:
    """The commit of the checkout that this code runs from, ``+`` behind it when files differ; None outside of one."""
    root = Path(__file__).parents[2]
    if not (root / "pyproject.toml").is_file() or not (root / ".git").exists():
        return None
    command = ["git", "-C", str(root), "describe", "--always", "--exclude=*", "--abbrev=40", "--dirty=+"]
    with contextlib.suppress(OSError, subprocess.SubprocessError):
        return subprocess.run(command, capture_output=True, text=True, timeout=10, check=True).stdout.strip()
    return None
