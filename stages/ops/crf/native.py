"""Mean field of the dense CRF by pydensecrf's compiled DenseCRF2D, on one core of the CPU.

Reads and writes no file; pydensecrf is the optional extra and is imported by the class.
Shapes: L labels, H W image pixels.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

if TYPE_CHECKING:
    from stages.ops.crf.presets import CrfNumbers


class PydenseCrf:
    """The kernels of some images, which take turns; a ``BatchCrf``."""

    def __init__(
        self,
        images: Sequence[NDArray[np.uint8]],
        num_labels: Sequence[int],
        numbers: CrfNumbers,
        *,
        tolerance: float | None = None,
    ) -> None:
        """Build the lattices.

        Args:
            images: RGB, uint8 (H, W, 3) each.
            num_labels: L ≥ 2 of each image.
            numbers: Weights and widths.
            tolerance: An image stops after a step that moved no probability by as much; None makes all steps.
        """
        self._crfs = [
            _NativeCrf(image, count, numbers, tolerance) for image, count in zip(images, num_labels, strict=True)
        ]

    @property
    def steps(self) -> list[int]:
        """Mean-field steps of each image in the last ``infer``."""
        return [crf.steps for crf in self._crfs]

    def infer(self, unaries: Sequence[NDArray[np.float32]], iterations: int) -> list[NDArray[np.float32]]:
        """Marginals (L, H, W) of each image after at most ``iterations`` steps from its energies (L, H, W)."""
        return [crf.infer(unary, iterations) for crf, unary in zip(self._crfs, unaries, strict=True)]

    def infer_sets(
        self, sets: Sequence[Sequence[NDArray[np.float32]]], iterations: int
    ) -> list[list[NDArray[np.float32]]]:
        """As ``infer`` for each set, one after the other."""
        return [self.infer(unaries, iterations) for unaries in sets]


class _NativeCrf:
    """One image's DenseCRF2D; a second unary reuses the lattices, which cost as much as several steps."""

    def __init__(self, image: NDArray[np.uint8], num_labels: int, numbers: CrfNumbers, tolerance: float | None) -> None:
        import pydensecrf.densecrf as native  # pyright: ignore[reportMissingImports] - the optional extra

        height, width = image.shape[:2]
        self._shape = (num_labels, height, width)
        self._tolerance = tolerance
        self.steps = 0
        self._crf: Any = native.DenseCRF2D(width, height, num_labels)
        self._crf.addPairwiseGaussian(sxy=numbers.gaussian_sxy_px, compat=numbers.gaussian_weight)
        self._crf.addPairwiseBilateral(
            sxy=numbers.bilateral_sxy_px,
            srgb=numbers.bilateral_srgb,
            rgbim=np.array(image, dtype=np.uint8, order="C"),  # pydensecrf refuses a read-only array
            compat=numbers.bilateral_weight,
        )

    def infer(self, unary: NDArray[np.float32], iterations: int) -> NDArray[np.float32]:
        self._crf.setUnaryEnergy(np.array(unary.reshape(self._shape[0], -1), dtype=np.float32, order="C"))
        if self._tolerance is not None:
            return self._infer_until_still(iterations, self._tolerance)
        self.steps = iterations
        return np.array(self._crf.inference(iterations), dtype=np.float32).reshape(self._shape)

    def _infer_until_still(self, iterations: int, tolerance: float) -> NDArray[np.float32]:
        """The same steps one by one, until one changes next to nothing."""
        state, *scratch = self._crf.startInference()
        marginals = np.asarray(state)  # a view, which each step writes to
        self.steps = 0
        while self.steps < iterations:
            before = marginals.copy(order="K")
            self._crf.stepInference(state, *scratch)
            self.steps += 1
            if np.abs(marginals - before).max() < tolerance:
                break
        return np.array(marginals, dtype=np.float32, order="C").reshape(self._shape)
