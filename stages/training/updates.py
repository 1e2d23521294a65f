"""How a step changes the weights: the optimiser, the passes that its batch is computed in, the average over steps.

Pure; reads and writes nothing.  Torch is imported by the functions only.
A step's loss is a mean over the images of its batch, or over their labelled pixels.  Passes are weighed so that their
sum is that mean, whatever the number of passes and devices.  There are two exceptions: BatchNorm in training mode
measures each pass alone, and in a loss that is the sum of several means (``balanced_cross_entropy``: background and
foreground) each pass counts by its images.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from stages.training.config import TrainingConfig
from stages.training.distributed import num_ranks

if TYPE_CHECKING:
    import torch
    from torch import Tensor, nn


def build_optimizer(config: TrainingConfig, groups: Sequence[Mapping[str, Any]], model: nn.Module) -> torch.optim.SGD:
    """SGD over the parameters of ``groups`` that learn; biases apart where the config treats them otherwise.

    Args:
        config: Learning rate, momentum, decay.
        groups: Each with "params" and optionally "lr_factor" (default 1) and "weight_decay".
        model: The network, which tells biases from weights.
    """
    import torch

    trained = [
        {**group, "params": [p for p in group["params"] if p.requires_grad], "lr_factor": group.get("lr_factor", 1.0)}
        for group in groups
    ]
    if config.bias_lr_factor != 1 or not config.bias_weight_decay:
        biases = _find_biases(model)
        trained = [part for group in trained for part in _part_biases(group, biases, config)]
    return torch.optim.SGD(
        [group for group in trained if group["params"]],
        lr=config.learning_rate,
        momentum=config.momentum,
        weight_decay=config.weight_decay,
        nesterov=config.nesterov,
    )


def _find_biases(model: nn.Module) -> frozenset[int]:
    """Identities of the biases of convolutions and linear layers: of whatever has a weight of two axes or more."""
    found = set()
    for layer in model.modules():
        own = dict(layer.named_parameters(recurse=False))
        if "bias" in own and "weight" in own and own["weight"].ndim > 1:
            found.add(id(own["bias"]))
    return frozenset(found)


def _part_biases(group: Mapping[str, Any], biases: frozenset[int], config: TrainingConfig) -> list[dict[str, Any]]:
    """``group`` without its biases, and these with their own rate and decay."""
    apart: dict[str, Any] = {
        **group,
        "params": [p for p in group["params"] if id(p) in biases],
        "lr_factor": group["lr_factor"] * config.bias_lr_factor,
    }
    if not config.bias_weight_decay:
        apart["weight_decay"] = 0.0
    return [{**group, "params": [p for p in group["params"] if id(p) not in biases]}, apart]


# ---------------------------------------------------------------------------------------------------------------------
# Passes
# ---------------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Pass:
    """A part of the step's batch as this rank has it."""

    batch: Mapping[str, Any]
    rank_share: float
    """This rank's share of the pass's images; 1 on one device."""
    step_share: float
    """The pass's share of the step's images."""


def cut_passes(batch: Mapping[str, Any], count: int, num_images: int) -> Iterator[Pass]:
    """Cut this rank's slice of a step's batch into ``count`` parts, in order.

    Args:
        batch: Arrays with this rank's images along the first axis, at least ``count`` of them.
        count: Passes of a step.
        num_images: Images of the step, over all ranks.
    """
    num_own = len(next(iter(batch.values())))
    for number in range(count):
        own = _part(num_own, number, count)
        part = batch if count == 1 else {name: array[own] for name, array in batch.items()}
        total = _images_in_pass(number, count, num_images)
        yield Pass(part, (own.stop - own.start) / total, total / num_images)


def _part(size: int, number: int, count: int) -> slice:
    """Part ``number`` of ``count`` of a row of ``size``; sizes are equal or one apart."""
    return slice(size * number // count, size * (number + 1) // count)


def _images_in_pass(number: int, count: int, num_images: int) -> int:
    """Images of a pass over all ranks."""
    total, ranks = 0, num_ranks()
    for rank in range(ranks):
        slice_ = _part(num_images, rank, ranks)
        part = _part(slice_.stop - slice_.start, number, count)
        total += part.stop - part.start
    return total


class StepLosses:
    """The losses of a step, from those of its passes."""

    def __init__(self, count: int) -> None:
        """Expect ``count`` passes."""
        self._count = count
        self._values: list[dict[str, Tensor]] = []
        self._weights: list[Tensor | float] = []
        self._total: Tensor | None = None

    def add(self, losses: dict[str, Tensor], one: Pass) -> Tensor | float:
        """Keep a pass's losses without "labelled"; returns the factor for their gradient."""
        from stages.ops.collectives import sum_losses, sum_over_devices

        labelled = losses.pop("labelled", None)
        self._values.append(sum_losses({name: value.detach() for name, value in losses.items()}, one.rank_share))
        if self._count == 1:
            return 1.0
        weight: Tensor | float = one.step_share
        if labelled is not None:
            weight = sum_over_devices(labelled.detach().float() * one.rank_share) * one.step_share
            self._total = weight if self._total is None else self._total + weight
        self._weights.append(weight)
        return weight

    def scale_gradients(self, parameters: Iterable[nn.Parameter]) -> None:
        """Once all passes are added, scale the gradients to those of the mean over the step's labelled pixels."""
        if self._total is None:
            return
        factor = 1 / self._total.clamp(min=1e-12)  # a step without a labelled pixel has no gradient to scale
        for parameter in parameters:
            if parameter.grad is not None:
                parameter.grad.mul_(factor)

    def means(self) -> dict[str, Tensor]:
        """The step's losses."""
        if self._count == 1:
            return self._values[0]
        total: Tensor | float = 1.0 if self._total is None else self._total.clamp(min=1e-12)
        names = self._values[0]
        return {
            name: sum(
                (values[name] * weight for values, weight in zip(self._values, self._weights, strict=True)),
                start=names[name] * 0,
            )
            / total
            for name in names
        }


# ---------------------------------------------------------------------------------------------------------------------
# The average over steps
# ---------------------------------------------------------------------------------------------------------------------


class WeightAverage:
    """Parameters and buffers of a network, averaged over its steps; batch counters are the last ones.

    Source: Polyak and Juditsky, "Acceleration of Stochastic Approximation by Averaging", 1992, as an exponential
    average.
    """

    def __init__(self, model: nn.Module, decay: float) -> None:
        """Begin at the network as it is.

        Args:
            model: The network.
            decay: Share of the average that a step keeps, in (0, 1).
        """
        self.decay = decay
        self.tensors: dict[str, Tensor] = {name: value.detach().clone() for name, value in model.state_dict().items()}

    def update(self, model: nn.Module, step: int) -> None:
        """Take the network after ``step`` (0-based) into the average.

        The first steps keep less of the average, (1 + step) / (10 + step), or the random start would stay in it.
        """
        import torch
        from torch.optim.swa_utils import get_ema_multi_avg_fn

        decay = min(self.decay, (1 + step) / (10 + step))
        averaged, current = [], []
        with torch.no_grad():
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
        """Give the network the averaged weights inside the block, and its own back afterwards."""
        own = {name: value.detach().clone() for name, value in model.state_dict().items()}
        self.write_into(model)
        try:
            yield
        finally:
            model.load_state_dict(own)
