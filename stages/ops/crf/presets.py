"""What all backends of the dense CRF share: the numbers of the field's codes, by name, and the protocol of kernels."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal, Protocol

import numpy as np
from numpy.typing import NDArray

CrfPreset = Literal[
    "sec",
    "psa",
    "irn",
    "deeplab_v1",
    "toco",
    "deeplab_v2_vgg16",
    "deeplab_v2_resnet101",
    "weclip",
    "mctformer",
    "weaktr",
    "weaktr_coco",
    "sec_mxnet",
]


@dataclass(frozen=True)
class CrfNumbers:
    """The numbers of one CRF: Potts weights, and kernel widths in pixels and in grey levels (0 … 255)."""

    bilateral_weight: float
    bilateral_sxy_px: float
    bilateral_srgb: float
    gaussian_weight: float
    gaussian_sxy_px: float

    def halved(self) -> CrfNumbers:
        """The same kernels on an image of half the size: widths in pixels halve, weights and grey levels stay."""
        return replace(self, bilateral_sxy_px=self.bilateral_sxy_px / 2, gaussian_sxy_px=self.gaussian_sxy_px / 2)


PRESETS: dict[CrfPreset, CrfNumbers] = {
    "sec": CrfNumbers(10, 80, 13, 3, 3),
    "psa": CrfNumbers(10, 80, 13, 3, 3),
    "irn": CrfNumbers(10, 50, 5, 3, 3),
    "deeplab_v1": CrfNumbers(4, 121, 5, 3, 3),
    "toco": CrfNumbers(4, 121, 5, 1, 1),
    "deeplab_v2_vgg16": CrfNumbers(4, 65, 3, 2, 2),
    "deeplab_v2_resnet101": CrfNumbers(4, 67, 3, 3, 1),
    "weclip": CrfNumbers(4, 64, 5, 3, 3),
    "mctformer": CrfNumbers(3, 83, 5, 3, 4),
    "weaktr": CrfNumbers(3, 83, 5, 3, 3),
    "weaktr_coco": CrfNumbers(4, 67, 3, 3, 1),
    "sec_mxnet": CrfNumbers(10, 80, 10, 3, 3),
}
"""What the field's codes use, all with 10 iterations.

SEC's training divides the widths by 12 (its cells are 8 px apart); psa is also SEAM's, irn also AdvCAM's, toco also
DuPL's and SeCo's, deeplab_v2_resnet101 (from deeplab-pytorch) also CLIP-ES's.
"""


class BatchCrf(Protocol):
    """The kernels of some images, built once and used with any number of unaries."""

    def infer(self, unaries: Sequence[NDArray[np.float32]], iterations: int) -> list[NDArray[np.float32]]:
        """Marginals (L, H, W) of each image after ``iterations`` steps from its energies (L, H, W)."""
        ...

    def infer_sets(
        self, sets: Sequence[Sequence[NDArray[np.float32]]], iterations: int
    ) -> list[list[NDArray[np.float32]]]:
        """As ``infer`` for each of several sets of unaries, such as irn's two labellings of each image.

        The numba backend takes all sets through an image's lattices at once, which costs little more than one of two
        labels; the others take one set after the other.
        """
        ...
