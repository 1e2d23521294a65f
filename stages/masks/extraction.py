"""Run a trained classifier over images at several scales, mirrored too, and merge each image's attention maps.

Images come in batches whose inputs have one size at every scale; results are per image and do not depend on the company
that an image has in its batch beyond the last bits of float arithmetic.  Nothing is written.
Shapes: B images, K foreground classes, n labels of one image, H W pixels, h w cells.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from stages.contracts import AttentionRecord, ImageRecord
from stages.data.transforms import to_network_input
from stages.data.whole_images import fill_padded, padded_size, resize_image, scaled_size
from stages.errors import EnvironmentFailure, InputError
from stages.methods.base import ScoreMapMethod
from stages.nets.folding import fold_batch_norm
from stages.ops.attention import MapMean, map_size, quantise_attention
from stages.ops.devices import Precision, autocast

if TYPE_CHECKING:
    from stages.methods.base import Method
    from stages.nets.classifier import Classifier

Normalisation = Literal["max", "minmax"]
"""How a map becomes 0 … 255: ``max`` divides the attention by its maximum, ``minmax`` stretches class scores, negative
ones too, from their minimum to their maximum (the attention of a method that is no ``ScoreMapMethod``)."""

PAD_MULTIPLE_PX = 32
"""Inputs are padded to multiples of this: every output stride divides it, and images of like size share a batch."""

MAX_BATCH_IMAGES = 16
"""Images that are held as network inputs at once, whatever the budget."""

BUDGET_PX = {"cpu": 1 << 20, "mps": 2 << 20, "cuda": 8 << 20}
"""Input pixels of one forward pass by device type: one 500 × 375 image at scale 2 on a CPU, ten of them on a GPU (where
a pass that does not fit is halved)."""


@dataclass(frozen=True)
class Views:
    """How many looks are taken at an image."""

    scales: tuple[float, ...]
    flip: bool
    short_side_px: int | None

    def sizes(self, size: tuple[int, int]) -> tuple[tuple[int, int], ...]:
        """Size of an image of ``size`` at every scale, before padding."""
        return tuple(scaled_size(size, short_side_px=self.short_side_px, scale=scale) for scale in self.scales)

    def padded(self, size: tuple[int, int]) -> tuple[tuple[int, int], ...]:
        """Size of the network's input at every scale."""
        return tuple(padded_size(scaled, PAD_MULTIPLE_PX) for scaled in self.sizes(size))


def plan_batches(records: Sequence[ImageRecord], views: Views, budget_px: int) -> Iterator[list[ImageRecord]]:
    """Group images whose padded inputs agree at every scale; a batch's largest inputs fit one forward pass.

    Args:
        records: Images, in any order; decided from their sizes alone, no file is opened.
        views: The looks taken.
        budget_px: Input pixels of one forward pass.
    """
    groups: dict[tuple[tuple[int, int], ...], list[ImageRecord]] = {}
    for record in records:
        groups.setdefault(views.padded(record.size), []).append(record)
    for padded, group in groups.items():
        largest = max(height * width for height, width in padded) * (1 + views.flip)
        count = min(MAX_BATCH_IMAGES, max(1, budget_px // largest))
        for start in range(0, len(group), count):
            yield group[start : start + count]


def build_inputs(images: Sequence[NDArray[np.uint8]], views: Views) -> list[NDArray[np.uint8]]:
    """The network inputs of a batch: per scale uint8 (B or 2B, H, W, 3), the B mirrored images behind the B plain ones.

    An image is mirrored before it is padded, so that the padding is always at the right and at the bottom.
    """
    inputs = []
    for number, (height, width) in enumerate(views.padded(images[0].shape[:2])):
        stack = np.empty((len(images) * (1 + views.flip), height, width, 3), dtype=np.uint8)
        for position, image in enumerate(images):
            scaled = resize_image(image, views.sizes(image.shape[:2])[number])
            fill_padded(stack[position], scaled)
            if views.flip:
                fill_padded(stack[len(images) + position], scaled[:, ::-1])
        inputs.append(stack)
    return inputs


class AttentionExtractor:
    """A trained classifier with its method on a device; turns network inputs into finished attention records."""

    def __init__(
        self,
        classifier: Classifier,
        method: Method,
        *,
        views: Views,
        map_stride: int,
        num_foreground: int,
        device: torch.device,
        warn: Callable[[str], None],
        precision: Precision = "fp32",
        normalisation: Normalisation = "max",
    ) -> None:
        """Take over a classifier that is in evaluation mode on ``device``; ``warn`` hears of halved batches.

        Its BatchNorm is folded into its convolutions where the method does not look into the network: a fifth to a
        third less time on a CPU, and the same maps to the last bits of float arithmetic.
        """
        if not method.attention_needs_gradient:
            fold_batch_norm(classifier.backbone)
        self.views = views
        self.budget_px = BUDGET_PX.get(device.type, BUDGET_PX["cpu"])
        self._classifier = classifier.to(memory_format=torch.channels_last)
        self._method = method
        self._map_stride = map_stride
        self._num_foreground = num_foreground
        self._device = device
        self._warn = warn
        self._precision: Precision = precision
        self._normalisation: Normalisation = normalisation

    def records(
        self, batch: Sequence[ImageRecord], inputs: Sequence[NDArray[np.uint8]], *, is_nan_borne: bool = False
    ) -> list[AttentionRecord]:
        """Attention of the images of one planned batch, in its order; with ``minmax`` a peak is that above the minimum.

        Args:
            batch: The images; all of them have labels.
            inputs: What ``build_inputs`` made of them.
            is_nan_borne: Give a map that is NaN or infinite as all zero with NaN for its peak, instead of raising.

        Raises:
            InputError: a map is NaN or infinite and that is not borne; the image is named.
            EnvironmentFailure: the device cannot hold a single input.
        """
        means = [MapMean(map_size(record.size, self._map_stride)) for record in batch]
        for number, stack in enumerate(inputs):
            for position, maps in enumerate(self._attention(stack, batch)):
                record = batch[position % len(batch)]
                means[position % len(batch)].add(
                    maps,
                    image_size=self.views.sizes(record.size)[number],
                    cells=self._classifier.backbone.cells(maps.shape[1:], stack.shape[1:3]),
                    is_flipped=position >= len(batch),
                )
        merged = [self._from_zero(mean.mean()).cpu().numpy() for mean in means]
        finish = _finish_broken if is_nan_borne else _finish
        return [finish(record, maps) for record, maps in zip(batch, merged, strict=True)]

    def _from_zero(self, maps: Tensor) -> Tensor:
        """Maps (n, h, w) whose smallest value is 0 with ``minmax``; else as they are."""
        return maps - maps.amin(dim=(1, 2), keepdim=True) if self._normalisation == "minmax" else maps

    def _attention(self, stack: NDArray[np.uint8], batch: Sequence[ImageRecord]) -> Iterator[Tensor]:
        """Per input of the stack the maps (n, h, w) of its image's labels."""
        done = 0
        while done < len(stack):
            count = self._chunk(stack)
            labels = [_labels(batch[index % len(batch)]) for index in range(done, min(done + count, len(stack)))]
            maps = self._forward(stack[done : done + count], labels)
            if maps is None:
                self._halve(count, stack)
                continue
            for row, present in zip(maps, labels, strict=True):
                yield row[list(present)]
            done += len(labels)

    def _chunk(self, stack: NDArray[np.uint8]) -> int:
        """Inputs of this size that one forward pass takes."""
        return max(1, min(len(stack), self.budget_px // (stack.shape[1] * stack.shape[2])))

    def _forward(self, inputs: NDArray[np.uint8], labels: Sequence[tuple[int, ...]]) -> Tensor | None:
        """Attention (B, K, h, w) of some inputs as float32, or None when the device's memory did not suffice."""
        try:
            images = to_network_input(torch.from_numpy(inputs), self._device)
            images = images.contiguous(memory_format=torch.channels_last)
            hot = torch.zeros(len(labels), self._num_foreground, device=self._device)
            for row, present in enumerate(labels):
                hot[row, list(present)] = 1.0
            is_plain = not self._method.attention_needs_gradient
            with torch.inference_mode(is_plain), autocast(self._device.type, self._precision):
                if self._normalisation == "minmax" and isinstance(self._method, ScoreMapMethod):
                    return self._method.score_maps(self._classifier, images).float()
                return self._method.attention(self._classifier, images, hot).detach().float()
        except torch.OutOfMemoryError:
            return None

    def _halve(self, count: int, stack: NDArray[np.uint8]) -> None:
        """Go on with half the inputs per pass after ``count`` were too many."""
        height, width = stack.shape[1:3]
        if count == 1:
            raise EnvironmentFailure(
                f"the device's memory does not hold one input of {height} × {width} pixels; leave out the largest of "
                f"make_attention.scales {list(self.views.scales)}, set make_attention.short_side_px, or run on the CPU"
            )
        self.budget_px = count // 2 * height * width
        if self._device.type == "cuda":
            torch.cuda.empty_cache()
        self._warn(f"out of device memory with {count} inputs of {height} × {width} pixels: going on with {count // 2}")


def _labels(record: ImageRecord) -> tuple[int, ...]:
    return record.labels or ()


def _finish_broken(record: ImageRecord, maps: NDArray[np.float32]) -> AttentionRecord:
    """The same of maps that may be NaN, each of which becomes one without evidence."""
    is_broken = np.logical_not(np.isfinite(maps).all(axis=(1, 2)))
    if not is_broken.any():
        return _finish(record, maps)
    found = _finish(record, np.where(is_broken[:, None, None], np.float32(0), maps))
    return replace(found, peaks=np.where(is_broken, np.float32("nan"), found.peaks))


def _finish(record: ImageRecord, maps: NDArray[np.float32]) -> AttentionRecord:
    """Quantise the merged maps of one image."""
    try:
        quantised, peaks = quantise_attention(maps)
    except ValueError as error:
        raise InputError(
            f"image '{record.id}': {error}; the classifier's weights are broken: train it again with a lower "
            "learning_rate or in fp32"
        ) from error
    return AttentionRecord(record.id, record.size, _labels(record), quantised, peaks)
