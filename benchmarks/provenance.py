"""What a benchmark's figures were measured on: every document says it."""

from __future__ import annotations

import os
import platform
import subprocess
from pathlib import Path


def processor() -> str:
    """The CPU and its number of cores."""
    return f"{platform.processor() or platform.machine()}, {os.cpu_count()} cores"


def hardware() -> str:
    """The GPU where there is one, else the processor."""
    import torch

    return torch.cuda.get_device_name() if torch.cuda.is_available() else processor()


def has_bf16() -> bool | None:
    """Whether the CPU has instructions for bfloat16 (AVX-512 BF16, AMX, ARM's); None where Linux does not say."""
    try:
        text = Path("/proc/cpuinfo").read_text(encoding="utf-8")
    except OSError:
        return None
    return "bf16" in text


def commit() -> str:
    """The revision that is measured; empty outside a repository."""
    found = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=False)
    return found.stdout.strip()
