"""Several processes of one training, one for each device: which one this is, and how they connect.

torchrun starts the processes and tells each its rank in the environment; without it there is one process, rank 0 of 1.
Rank 0 is the main one: it alone writes files and reports.  Every rank calls the same stage with the same arguments,
reads its slice of each batch, and exchanges gradients (``stages.ops.collectives``), so that n devices take the same
steps as one (``docs/devices.md``).  Torch is imported by the functions only.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from typing import TYPE_CHECKING, TypeVar

from stages.contracts import Runtime
from stages.errors import ConfigError, EnvironmentFailure
from stages.ops.devices import resolve_device

if TYPE_CHECKING:
    from collections.abc import Sequence

    import torch

Item = TypeVar("Item")


def num_ranks() -> int:
    """Processes that torchrun started for this training; 1 without torchrun."""
    return _from_torchrun("WORLD_SIZE", 1)


def this_rank() -> int:
    """Number of this process, 0 … num_ranks() - 1."""
    return _from_torchrun("RANK", 0)


def is_main() -> bool:
    """Whether this process writes files and reports."""
    return this_rank() == 0


def _from_torchrun(name: str, default: int) -> int:
    # other launchers set the same names for programs of their own
    return int(os.environ.get(name, default)) if "TORCHELASTIC_RUN_ID" in os.environ else default


def own_slice(batch: Sequence[Item]) -> Sequence[Item]:
    """This rank's part of a batch: ranks in order, sizes equal or one apart."""
    size, rank = num_ranks(), this_rank()
    return batch[len(batch) * rank // size : len(batch) * (rank + 1) // size]


@contextlib.contextmanager
def join_ranks(runtime: Runtime) -> Iterator[torch.device]:
    """Connect with the other ranks inside the block; a connection that is open already is used and left open.

    Yields:
        This process's device: with several ranks on CUDA one each, in order.

    Raises:
        EnvironmentFailure: the device that was asked for is not there.
    """
    import torch
    from torch import distributed

    from stages.ops.collectives import wait_for_all

    device = resolve_device(runtime)
    if num_ranks() > 1 and device.type == "cuda":
        device = torch.device("cuda", _from_torchrun("LOCAL_RANK", 0))
        torch.cuda.set_device(device)
    if num_ranks() == 1 or distributed.is_initialized():
        yield device
        return
    is_cuda = device.type == "cuda"
    distributed.init_process_group("cpu:gloo,cuda:nccl" if is_cuda else "gloo", device_id=device if is_cuda else None)
    # An error leaves the connection to the end of the process: closing it would let the other ranks fail before the
    # reason is written down, with errors that say less.
    yield device
    wait_for_all()
    distributed.destroy_process_group()


@contextlib.contextmanager
def main_first() -> Iterator[None]:
    """Let the main rank finish the block before the others enter it."""
    from stages.ops.collectives import wait_for_all

    if not is_main():
        wait_for_all()
    yield
    if is_main():
        wait_for_all()


# ---------------------------------------------------------------------------------------------------------------------
# How many
# ---------------------------------------------------------------------------------------------------------------------


def device_problems(runtime: Runtime, batch_size: int) -> list[str]:
    """What is wrong with ``runtime.devices`` as far as the config alone can tell."""
    if runtime.devices in (1, "auto"):
        return []
    problems = []
    if runtime.device == "mps" or ":" in runtime.device:
        problems.append(
            f"runtime.device '{runtime.device}' is one device, runtime.devices asks for {runtime.devices}; "
            "set runtime.device=cuda (CUDA_VISIBLE_DEVICES chooses among them), or runtime.devices=1"
        )
    if runtime.devices > batch_size:
        problems.append(
            f"runtime.devices is {runtime.devices}, but one step has training.batch_size {batch_size} images, which "
            f"the devices share; set runtime.devices to at most {batch_size}, or raise training.batch_size"
        )
    return problems


def resolve_devices(runtime: Runtime, batch_size: int) -> int:
    """How many devices a training runs on; ``auto`` takes at most one for each image of a step.

    Args:
        runtime: ``device`` and ``devices``.
        batch_size: Images of one step.

    Raises:
        ConfigError: the devices cannot share the batch, or one device is named where several are asked for.
        EnvironmentFailure: there are fewer devices than were asked for.
    """
    if runtime.devices == 1:
        return 1
    problems = device_problems(runtime, batch_size)
    if problems:
        raise ConfigError(problems[0], problems[1:])
    import torch

    device = resolve_device(runtime)
    if runtime.devices == "auto":
        is_whole = device.type == "cuda" and device.index is None
        return min(torch.cuda.device_count(), batch_size) if is_whole else 1
    found = torch.cuda.device_count() if device.type == "cuda" else 0
    if found < runtime.devices and runtime.device != "cpu":
        raise EnvironmentFailure(
            f"runtime.devices is {runtime.devices}, but torch finds {found} CUDA device{'s' * (found != 1)}; lower it "
            f"(auto takes what is there), or set runtime.device=cpu for {runtime.devices} processes on the CPU"
        )
    return runtime.devices
