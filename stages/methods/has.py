"""HaS: hide random squares of the training images, so that the classifier has to look at every part of an object.

Shapes: B images, K foreground classes, H W pixels.
Source: Singh and Lee, "Hide-and-Seek: Forcing a Network to be Meticulous for Weakly-supervised Object and Action
Localization", ICCV 2017, §3.1; clovaai/wsolevaluation (b5c1e8a) wsol/method/has.py.
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


class HasConfig(MethodConfig):
    """CAM, trained on images with hidden squares."""

    name: Literal["has"] = "has"
    """The method's key in METHODS."""
    grid_px: int = Field(default=4, ge=1, le=4096)
    """Side of a square in pixels of the training crop.  Source: wsolevaluation config.py, has_grid_size 4 (pixels, for
    crops of 224); the paper takes 16, 32, 44 or 56, and a random search on CUB 65 to 170."""
    drop_rate: float = Field(default=0.5, ge=0, le=1)
    """Probability that a square is hidden.  Source: the paper; wsolevaluation, has_drop_rate 0.5."""

    def build(self) -> Method:
        """The HaS method."""
        return Has(self)


class Has(Cam):
    """CAM of a classifier that never saw a whole training image; in evaluation it sees all of it.

    Differs: one size of squares, where the paper's best nets draw one of several for each image ("HaS-Mixed").
    """

    def __init__(self, config: HasConfig) -> None:
        self.config = config

    def objective(
        self, classifier: Classifier, images: Tensor, labels: Tensor, step: StepInfo, *, masks: Tensor | None = None
    ) -> dict[str, Tensor]:
        """Classification loss of the images with hidden squares."""
        hidden = hide_squares(images, grid_px=self.config.grid_px, drop_rate=self.config.drop_rate)
        return super().objective(classifier, hidden, labels, step)


def hide_squares(images: Tensor, *, grid_px: int, drop_rate: float) -> Tensor:
    """Copies of the images with some squares of a grid set to 0, each image and square by a draw of its own.

    Args:
        images: (B, 3, H, W), normalised: zero is the mean colour, which keeps the first layer's statistics.
        grid_px: Side of a square; those at the right and lower edge may be cut off.
        drop_rate: Probability that a square is hidden.

    Source:
        §3.1 (also for the mean colour).  Differs from wsolevaluation's code, which takes the width for the height and
        so leaves squares of a non-square image out.
    """
    import torch

    height, width = images.shape[2:]
    cells = torch.rand(len(images), 1, -(-height // grid_px), -(-width // grid_px), device=images.device)
    kept = (cells >= drop_rate).to(images.dtype)
    kept = kept.repeat_interleave(grid_px, dim=2).repeat_interleave(grid_px, dim=3)
    return images * kept[:, :, :height, :width]
