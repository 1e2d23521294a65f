"""Where torch computes, and that it computes the same bits every time.  Torch is imported by the functions only."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from typing import TYPE_CHECKING

from stages.contracts import Runtime
from stages.errors import EnvironmentFailure

if TYPE_CHECKING:
    import torch


def resolve_device(runtime: Runtime) -> torch.device:
    """Choose the device and apply ``runtime.threads``.

    Raises:
        EnvironmentFailure: the device that was asked for is not there.
    """
    import torch

    if runtime.threads > 0:
        torch.set_num_threads(runtime.threads)
    present = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available(), "cpu": True}
    if runtime.device == "auto":
        return torch.device(next(name for name, is_there in present.items() if is_there))
    device = torch.device(runtime.device)
    if not present[device.type] or (device.index or 0) >= max(1, torch.cuda.device_count()):
        names = [f"{torch.cuda.device_count()} x cuda" if name == "cuda" else name for name in present if present[name]]
        raise EnvironmentFailure(
            f"runtime.device is '{runtime.device}', but torch finds only {', '.join(names)}; choose from these"
        )
    return device


@contextlib.contextmanager
def deterministic(device: torch.device) -> Iterator[None]:
    """Use only operations that give equal bits every time; off the CPU torch warns where it has none."""
    import torch
    from torch.utils import deterministic as options

    before = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    fill = getattr(options, "fill_uninitialized_memory")  # noqa: B009 - torch's stubs do not know it
    # A debugging aid that writes every new tensor twice.
    setattr(options, "fill_uninitialized_memory", False)  # noqa: B010
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # cuBLAS asks for it
    torch.use_deterministic_algorithms(True, warn_only=device.type != "cpu")
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before[0], warn_only=before[1])
        setattr(options, "fill_uninitialized_memory", fill)  # noqa: B010
