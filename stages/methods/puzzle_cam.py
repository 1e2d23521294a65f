"""Puzzle-CAM: the maps of an image's four quarters, put together, are to agree with the map of the whole image.

Shapes: B images, K foreground classes, P (image, class) pairs, H W pixels, h w cells.
Source: Jo and Yu, "Puzzle-CAM: Improved Localization via Matching Partial and Full Features", ICIP 2021 (arXiv
2101.11253), §2; shjo-april/PuzzleCAM (16a920c) train_classification_with_puzzle.py, core/puzzle_utils.py.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

from pydantic import Field

from stages.methods.base import Method, MethodConfig
from stages.methods.cam import Cam

if TYPE_CHECKING:
    from torch import Tensor

    from stages.nets.classifier import Classifier
    from stages.ops.step import StepInfo


class PuzzleCamConfig(MethodConfig):
    """CAM whose maps agree with those of the image's quarters."""

    name: Literal["puzzle_cam"] = "puzzle_cam"
    """The method's key in METHODS."""
    alpha: float = Field(default=4.0, ge=0, le=100)
    """Weight of the difference between the two maps at its largest.  Source: the paper and its command, 4, for 20
    classes; the difference is divided by the number of classes."""
    ramp_ratio: float = Field(default=0.5, ge=0, le=1)
    """Share of the training over which that weight grows in a straight line from 0; 0 is the whole weight at once.
    Source: the paper and its command, half the training."""

    def build(self) -> Method:
        """The Puzzle-CAM method."""
        return PuzzleCam(self)


class PuzzleCam(Cam):
    """L_cl + L_p-cl + α · L_re; attention is CAM's, of the whole image.

    Differs: the maps are compared at pixels, bilinearly enlarged, because most backbones' cells stand elsewhere in the
    quarters than in the whole image; at an odd side the quarters share its middle line.
    """

    def __init__(self, config: PuzzleCamConfig) -> None:
        self.config = config

    def objective(
        self, classifier: Classifier, images: Tensor, labels: Tensor, step: StepInfo, *, masks: Tensor | None = None
    ) -> dict[str, Tensor]:
        """Classification of the image and of its quarters, and the difference of their maps."""
        del masks
        output = classifier(images)
        scores = classifier(cut_quarters(images)).scores.unflatten(0, (4, len(images)))
        losses = {
            "classification": classifier.classification_loss(output.logits, labels),
            "quarters": classifier.classification_loss(scores.mean(dim=(0, 3, 4)), labels),
            "difference": self._difference(classifier, images, labels, output.scores, scores),
        }
        ramp_steps = self.config.ramp_ratio * step.num_steps
        alpha = self.config.alpha * (min(step.step / ramp_steps, 1) if ramp_steps else 1)
        return {"loss": losses["classification"] + losses["quarters"] + alpha * losses["difference"], **losses}

    def _difference(
        self, classifier: Classifier, images: Tensor, labels: Tensor, whole: Tensor, quarters: Tensor
    ) -> Tensor:
        """L_re: the mean over images, classes and pixels of |whole - merged|, where absent classes count as 0."""
        from stages.ops.cells import cells_to_pixels

        image, label = (labels > 0).nonzero(as_tuple=True)
        size = (images.shape[2], images.shape[3])
        side = quarter_size(size)
        cells_of = classifier.backbone.cells
        enlarged = cells_to_pixels(whole[image, label], size, cells_of(whole.shape[2:], size))
        parts = cells_to_pixels(quarters[:, image, label], side, cells_of(quarters.shape[3:], side))
        # L_cl, which this is added to, is a mean over the K classes too, but for a softmax's
        share = 1 if classifier.is_exclusive else labels.shape[1]
        pixels = size[0] * size[1] * share * len(images)
        return (enlarged - merge_quarters(parts, size)).abs().sum() / pixels


def quarter_size(size: tuple[int, int]) -> tuple[int, int]:
    """Rows and columns of the quarters of an image of ``size`` (H, W): half of each side, rounded up."""
    return -(-size[0] // 2), -(-size[1] // 2)


def cut_quarters(images: Tensor) -> Tensor:
    """The top left quarters of the images (B, 3, H, W), then the top right, bottom left and bottom right ones.

    Returns:
        (4B, 3, ⌈H/2⌉, ⌈W/2⌉).

    Source:
        core/puzzle_utils.py ``tile_features``.
    """
    import torch

    rows, columns = quarter_size((images.shape[2], images.shape[3]))
    top, bottom = images[:, :, :rows], images[:, :, -rows:]
    return torch.cat([top[..., :columns], top[..., -columns:], bottom[..., :columns], bottom[..., -columns:]])


def merge_quarters(quarters: Tensor, size: tuple[int, int]) -> Tensor:
    """Maps of four quarters (4, ..., ⌈H/2⌉, ⌈W/2⌉) as one of ``size`` (H, W); what two share is the later one's.

    Source:
        core/puzzle_utils.py ``merge_features``.
    """
    import torch

    rows, columns = size[0] // 2, size[1] // 2
    top, bottom = (torch.cat([left[..., :columns], right], dim=-1) for left, right in (quarters[:2], quarters[2:]))
    return torch.cat([top[..., :rows, :], bottom], dim=-2)
