"""Where a training stands: what the loop tells every objective."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True)
class StepInfo:
    """One step of a training, as its objective sees it."""

    step: int
    """0 … num_steps - 1."""
    num_steps: int
    """Steps of the whole training."""
    epoch: int
    """0-based number of the pass over the data that this step belongs to."""
    device: torch.device
    """Where the model and the batch are."""
