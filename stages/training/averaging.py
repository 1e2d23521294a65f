"""A moving average of a network's weights, which is often better than the last of them.

Pure tensor code; reads and writes nothing.
Source: Polyak and Juditsky, "Acceleration of Stochastic Approximation by Averaging", 1992, as an exponential average.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping

import torch
from torch import Tensor, nn
from torch.optim.swa_utils import get_ema_multi_avg_fn


class WeightAverage:
    """Parameters and buffers of a network, averaged over its steps; batch counters are the last ones."""

    def __init__(self, model: nn.Module, decay: float) -> None:
        """Begin at the network as it is.

        Args:
            model: The network.
            decay: How much of the average a step leaves, in (0, 1).
        """
        self.decay = decay
        self.tensors: dict[str, Tensor] = {name: value.detach().clone() for name, value in model.state_dict().items()}

    @torch.no_grad()
    def update(self, model: nn.Module, step: int) -> None:
        """Take the network after ``step`` (0-based) into the average.

        In the first steps the average forgets faster, by (1 + step) / (10 + step), or it would be the random start.
        """
        decay = min(self.decay, (1 + step) / (10 + step))
        averaged, current = [], []
        for name, value in model.state_dict().items():
            if value.is_floating_point():
                averaged.append(self.tensors[name])
                current.append(value.detach())
            else:
                self.tensors[name].copy_(value)
        get_ema_multi_avg_fn(decay)(averaged, current, step)

    def load(self, tensors: Mapping[str, Tensor]) -> None:
        """Go on from the average of a checkpoint."""
        for name, value in self.tensors.items():
            value.copy_(tensors[name])

    def write_into(self, model: nn.Module) -> None:
        """Give the network the averaged weights."""
        model.load_state_dict(self.tensors)

    @contextlib.contextmanager
    def shown_by(self, model: nn.Module) -> Iterator[None]:
        """Let the network have the averaged weights inside the block and its own ones again afterwards."""
        own = {name: value.detach().clone() for name, value in model.state_dict().items()}
        self.write_into(model)
        try:
            yield
        finally:
            model.load_state_dict(own)
