"""Where torch computes, how precisely, and that it computes the same bits every time.

Torch is imported by the functions only.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any, Literal

from stages.contracts import Runtime, StageConfig
from stages.errors import ConfigError, EnvironmentFailure

if TYPE_CHECKING:
    import torch

Precision = Literal["fp32", "bf16", "fp16"]
"""Of a network's forward pass; its weights are float32, and so is what is computed from its scores."""


class ForwardConfig(StageConfig):
    """How a trained network computes that is only looked at."""

    precision: Precision = "fp32"
    """Of the forward pass; scores are float32 again before anything is done with them.  bf16 and fp16 are quicker on
    devices that have instructions for them; fp16 needs CUDA."""

    def key_content(self) -> dict[str, Any]:
        """What of the options decides the result, as JSON; fp32 is not mentioned."""
        return self.model_dump(mode="json", exclude={"precision"} if self.precision == "fp32" else None)


def autocast(device_type: str, precision: Precision) -> torch.autocast:
    """What a forward pass on that type of device runs under; changes nothing with fp32."""
    import torch

    dtype = torch.float16 if precision == "fp16" else torch.bfloat16
    return torch.autocast(device_type, dtype=dtype, enabled=precision != "fp32")


def check_precision(precision: Precision, place: Runtime | torch.device, option: str) -> None:
    """Refuse fp16 where there is no CUDA.

    Args:
        precision: What is asked for.
        place: The device, or the runtime that decides it; it is looked up for fp16 alone.
        option: What the user set.

    Raises:
        ConfigError: fp16 on another device.
        EnvironmentFailure: the device that was asked for is not there.
    """
    if precision != "fp16":
        return
    device = resolve_device(place) if isinstance(place, Runtime) else place
    if device.type != "cuda":
        raise ConfigError(f"{option} fp16 needs CUDA, found {device.type}; use fp32 or bf16")


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
