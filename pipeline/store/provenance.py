"""Where and with what an artifact was built: host, threads, math libraries, package versions, code revision.

Equal keys give equal bytes where all of this is equal but the host: float sums depend on the number of threads and on
the instructions of the processor.
"""

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

from threadpoolctl import threadpool_info

from stages.contracts import Runtime
from stages.ops.devices import resolve_device

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


ENVIRONMENT = (
    "revision",
    "device",
    "threads",
    "cpu_capability",
    "libraries",
    "cpu",
    "cores",
    "machine",
    "python",
    "packages",
)
"""What of ``describe_machine`` can change a result, the likeliest first."""


def describe_machine(device: str | None = None) -> dict[str, Any]:
    """Where this process computes, as JSON; None for what the system does not tell.

    ``threads`` and ``libraries`` are those that this process has, so it is called where the work was done, after it.
    The fields that torch knows are None where no stage has loaded it.

    Args:
        device: ``runtime.device``; auto is what it means here.
    """
    cpu, memory = platform.processor() or platform.machine(), None
    with contextlib.suppress(OSError):
        found = re.search(r"^model name\s*:(.*)", Path("/proc/cpuinfo").read_text(encoding="utf-8"), re.MULTILINE)
        cpu = found[1].strip() if found else platform.machine()
    with contextlib.suppress(AttributeError, OSError, ValueError):
        memory = f"{os.sysconf('SC_PAGE_SIZE') * os.sysconf('SC_PHYS_PAGES') / 2**30:.0f} GiB"
    torch = sys.modules.get("torch")  # only where a stage has loaded it already
    threads = capability = used = None
    libraries = {_describe_library(library) for library in threadpool_info()}
    if torch is not None:
        built_in = re.findall(r"(Math Kernel Library|MKL-DNN)\D*([\d.]*\d)", torch.__config__.show())
        libraries |= {f"torch's {name} {version}" for name, version in built_in}
        threads, capability = torch.get_num_threads(), torch.backends.cpu.get_cpu_capability()
        used = resolve_device(Runtime(device=device or "auto"))
        if used.type == "cuda":
            used = (
                f"{torch.cuda.get_device_name(used)}, CUDA {torch.version.cuda}, cuDNN {torch.backends.cudnn.version()}"
            )
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
        "device": None if used is None else str(used),
        "threads": threads,
        "cpu_capability": capability,
        "libraries": sorted(libraries),
        "packages": packages,
        "revision": _code_revision(),
    }


def _describe_library(library: dict[str, Any]) -> str:
    """``openblas 0.3.29 Haswell``, ``libgomp``: with the processor that its code is for, where it has several."""
    words = [library["internal_api"], library.get("version"), library.get("architecture")]
    return " ".join(str(word) for word in words if word) if library["user_api"] == "blas" else library["prefix"]


def _code_revision() -> str | None:
    """The commit of the checkout that this code runs from, ``+`` behind it when files differ; None outside of one."""
    root = Path(__file__).parents[2]
    if not (root / "pyproject.toml").is_file() or not (root / ".git").exists():
        return None
    command = ["git", "-C", str(root), "describe", "--always", "--exclude=*", "--abbrev=40", "--dirty=+"]
    with contextlib.suppress(OSError, subprocess.SubprocessError):
        return subprocess.run(command, capture_output=True, text=True, timeout=10, check=True).stdout.strip()
    return None
