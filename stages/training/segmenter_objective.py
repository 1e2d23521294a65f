"""What a segmenter's training minimises: a loss by name, on crops and their masks.

Pure; reads and writes nothing.  Torch is imported by the functions only.
Shapes: B images, K foreground classes, C = K + 1, H W pixels of a crop, h w cells of the logits.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any, Literal, Self

from pydantic import Field, model_validator

from stages.contracts import IGNORE_INDEX, StageConfig
from stages.data.transforms import to_pixels
from stages.ops.crf.dense_crf import CrfConfig

if TYPE_CHECKING:
    from torch import Tensor, nn

    from stages.ops.step import StepInfo

    Criterion = Callable[..., Tensor]

LossName = Literal[
    "cross_entropy", "balanced_cross_entropy", "bootstrapped_cross_entropy", "smoothed_cross_entropy", "sec"
]

LOSS_OPTIONS = {
    "bootstrapped_cross_entropy": "bootstrap_trust",
    "smoothed_cross_entropy": "label_smoothing",
    "sec": "sec",
}
"""Loss to the field that only it reads."""


class SecConfig(StageConfig):
    """The CRF inside SEC's constrain-to-boundary loss."""

    crf: CrfConfig = CrfConfig(preset="sec")
    """Its numbers for the image's pixels."""
    crf_shrink: float = Field(default=12.0, ge=1, le=64)
    """What its widths are divided by at the network's cells.  SEC's code takes 12, though its cells are 8 px apart."""


class LossConfig(StageConfig):
    """Which loss, at which resolution, and how much each pixel counts."""

    loss: LossName = "cross_entropy"
    """balanced_cross_entropy weighs background and foreground one half each (DSRG); bootstrapped_cross_entropy trusts
    the masks in part only, smoothed_cross_entropy is never quite sure of them; sec seeds, expands and constrains."""
    loss_resolution: Literal["pixels", "cells"] = "pixels"
    """pixels: logits are upsampled to the crop; cells: masks are sampled at the logits' cells (DeepLab v1, quicker).
    ``loss: sec`` is always one of cells."""
    loss_weighting: Literal["none", "confidence"] = "none"
    """confidence: a pixel counts as much as its pseudo-label is sure, which needs ``soft: true`` in make_masks."""
    bootstrap_trust: float = Field(default=0.8, ge=0, le=1)
    """``loss: bootstrapped_cross_entropy``: the mask's share of the target; the rest is the network's own answer."""
    label_smoothing: float = Field(default=0.1, ge=0, lt=1)
    """``loss: smoothed_cross_entropy``: the share of the target that is spread over all classes."""
    sec: SecConfig = SecConfig()
    """Numbers of ``loss: sec``."""

    @model_validator(mode="after")
    def _weighs_pixels(self) -> Self:
        if self.loss == "sec" and self.loss_weighting == "confidence":
            raise ValueError(
                "loss: sec counts all cues alike: set loss_weighting: none, and make_masks.confident for sure cues only"
            )
        return self

    def loss_key_content(self, losses: Collection[LossName], device: str = "cpu") -> dict[str, Any]:
        """What of these options decides the weights, as JSON: not those of a loss that is not trained with.

        Args:
            losses: The losses that are trained with, ``loss`` among them.
            device: ``Runtime.device``, which decides what the CRF's ``backend: auto`` means.
        """
        unused = {option for loss, option in LOSS_OPTIONS.items() if loss not in losses}
        if set(losses) == {"sec"}:
            unused.add("loss_resolution")
        content = self.model_dump(mode="json", include=set(LossConfig.model_fields) - unused)
        if "sec" in content:
            content["sec"]["crf"] = self.sec.crf.key_content(device)
        return content


@dataclass(frozen=True)
class SegmenterObjective:
    """The loss as the training loop calls it.

    A batch has ``images`` and ``masks``, with ``loss_weighting`` also ``confidence``; for ``loss: sec`` it may have
    ``labels`` (B, K), without which a crop has the classes that its own mask holds.
    """

    config: LossConfig

    def __call__(self, model: nn.Module, batch: dict[str, Tensor], step: StepInfo) -> dict[str, Tensor]:
        """The losses of all views of the network, summed; each mean over labelled pixels with its share of them."""
        from stages.nets.segmenters.segmenter import Segmenter

        images = batch["images"]
        views = model.training_logits(images) if isinstance(model, Segmenter) else [model(images)]
        found = [
            self._sec(view, batch) if self.config.loss == "sec" else self._pixel_loss(view, batch) for view in views
        ]
        first = found[0]
        summed = {
            name: sum((losses[name] for losses in found[1:]), start=first[name]) for name in first if name != "labelled"
        }
        # A mean over the labelled pixels: the loop weighs the passes of a step by their share.
        return summed | {name: first[name] for name in first if name == "labelled"}

    def _pixel_loss(self, logits: Tensor, batch: dict[str, Tensor]) -> dict[str, Tensor]:
        """The loss of one view's logits, and which share of the pixels it is a mean over."""
        logits, masks = match_sizes(logits, batch["masks"], self.config.loss_resolution)
        counted = (masks != IGNORE_INDEX).float()
        if "confidence" not in batch:
            losses = {"loss": self._criterion()(logits, masks), "labelled": counted.mean()}
        else:
            confidence = batch["confidence"]
            if self.config.loss_resolution == "cells":
                confidence = _at_cells(confidence, logits.shape[-2:])
            weights = confidence.float() / 255
            losses = {"loss": self._criterion()(logits, masks, weights), "labelled": (counted * weights).mean()}
        if self.config.loss == "balanced_cross_entropy":  # a sum of two means
            del losses["labelled"]
        return losses

    def _criterion(self) -> Criterion:
        from stages.ops import losses

        criteria: dict[str, Criterion] = {
            "cross_entropy": losses.segmentation_cross_entropy,
            "balanced_cross_entropy": losses.balanced_segmentation_cross_entropy,
            "bootstrapped_cross_entropy": partial(losses.bootstrapped_cross_entropy, trust=self.config.bootstrap_trust),
            "smoothed_cross_entropy": partial(losses.smoothed_cross_entropy, smoothing=self.config.label_smoothing),
        }
        return criteria[self.config.loss]

    def _sec(self, logits: Tensor, batch: dict[str, Tensor]) -> dict[str, Tensor]:
        """SEC's three losses of one view's logits, each a mean over images, and their sum."""
        import torch

        from stages.ops import sec

        cues, config = batch["masks"], self.config.sec
        with torch.autocast(logits.device.type, enabled=False):
            probabilities = sec.floored_softmax(logits)
            labels = batch["labels"] if "labels" in batch else sec.has_class(cues, logits.shape[1] - 1)
            pixels = to_pixels(batch["images"])
            refined = sec.refine_cells(probabilities, pixels, config.crf, shrink=config.crf_shrink)
            parts = {
                "seed": sec.seeding_loss(probabilities, _at_cells(cues, logits.shape[-2:])),
                "expand": sec.expansion_loss(probabilities, labels),
                "constrain": sec.constrain_loss(probabilities, refined),
            }
            return {"loss": parts["seed"] + parts["expand"] + parts["constrain"], **parts}


def match_sizes(logits: Tensor, masks: Tensor, resolution: Literal["pixels", "cells"]) -> tuple[Tensor, Tensor]:
    """Bring logits and masks to one size.

    Args:
        logits: (B, C, h, w), any float dtype.
        masks: (B, H, W), integers.
        resolution: pixels upsamples the logits bilinearly; cells takes the mask's value at each cell's centre.

    Returns:
        float32 logits and masks of one size, (H, W) or (h, w).
    """
    from torch.nn import functional

    if resolution == "cells":
        return logits.float(), _at_cells(masks, logits.shape[-2:])
    upsampled = functional.interpolate(logits.float(), size=masks.shape[-2:], mode="bilinear", align_corners=False)
    return upsampled, masks


def _at_cells(values: Tensor, size: Sequence[int]) -> Tensor:
    """The value of (B, H, W) at the centre of each of the (h, w) cells."""
    from torch.nn import functional

    cells = functional.interpolate(values[:, None].float(), size=tuple(size), mode="nearest-exact")
    return cells[:, 0].to(values.dtype)
