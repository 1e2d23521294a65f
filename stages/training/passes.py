"""A step's batch in several passes, one after the other: the gradient of the whole batch in the memory of a part.

Pure; reads and writes nothing.  Torch is imported by the functions only.
A step's loss is a mean over the images of its batch, or over their labelled pixels.  Passes are weighed so that their
sum is that mean, whatever the number of passes and devices; only BatchNorm in training mode, which measures a pass
alone, and a loss that is the sum of several means (``balanced_cross_entropy``: background and foreground; there each
pass counts by its images) tell the difference.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from stages.training.distributed import num_ranks

if TYPE_CHECKING:
    from torch import Tensor, nn


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
        """Keep a pass's losses, take "labelled" out of them, and say what their gradient is to be multiplied by."""
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
        """Make the gradients those of the mean over the step's labelled pixels, once all passes are added."""
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
