"""Where and with what an artifact was built: host, package versions, code revision."""

from __future__ import annotations

import os
import platform
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
    """Host, Python, package versions and code revision, as JSON."""
    return {
        "host": socket.gethostname(),
        "python": platform.python_version(),
        "machine": f"{platform.system()} {platform.machine()}",
        "cpu": _cpu_model(),
        "cores": f"{os.cpu_count()} cores",
        "memory": _memory(),
        "device": _gpu_names(),
        "packages": {name: version for name in PACKAGES if (version := _version(name)) is not None},
        "revision": code_revision(),
    }


def code_version() -> str:
    """The installed version with the commit of a checkout: ``0.1.0``, or ``0.1.0 at 3f2c1d9``."""
    commit = code_revision()
    version = _version("wsss-pipeline") or "0+checkout"
    return version if commit is None else f"{version} at {commit[:7]}{'+' if commit.endswith('+') else ''}"


def _cpu_model() -> str:
    """The processor's own name, where the system tells it."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    return next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), platform.machine())


def _memory() -> str | None:
    """Main memory; None where the system does not tell it."""
    try:
        size = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (AttributeError, OSError, ValueError):
        return None
    return f"{size / 2**30:.0f} GiB"


def _gpu_names() -> str | None:
    """The CUDA devices, None without one; asks torch only where a stage has loaded it already."""
    torch = sys.modules.get("torch")
    if torch is None or not torch.cuda.is_available():
        return None
    return ", ".join(torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count()))


def _version(name: str) -> str | None:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


def code_revision() -> str | None:
    """The commit of the checkout that this code runs from, ``+`` behind it when files differ; None outside of one."""
    root = Path(__file__).parents[2]
    if not (root / "pyproject.toml").is_file() or not (root / ".git").exists():
        return None
    commit = _git(root, "rev-parse", "HEAD")
    changes = _git(root, "status", "--porcelain", "--untracked-files=no")
    return None if commit is None else commit + ("+" if changes else "")


def _git(root: Path, *arguments: str) -> str | None:
    try:
        answer = subprocess.run(["git", "-C", str(root), *arguments], capture_output=True, text=True, timeout=10)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return answer.stdout.strip() if answer.returncode == 0 else None
