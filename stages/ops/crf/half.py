"""Dense CRF at half resolution: a quarter of the pixels, then marginals that follow the edges of the full image.

Reads and writes no file.  An approximation: ``docs/crf.md`` states what it changes and costs.
Shapes: L labels, H W image pixels.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from stages.ops.crf.guided_upsampling import GuidedUpsampler, halve
from stages.ops.crf.presets import BatchCrf


def halve_image(image: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """Mean colours of blocks of 2 × 2: uint8 (H, W, 3) to (H/2, W/2, 3), rounded up."""
    means = halve(np.moveaxis(image, -1, 0))
    return np.ascontiguousarray(np.moveaxis(np.rint(means).astype(np.uint8), 0, -1))


class HalfResolutionCrf:
    """Images whose mean field works at half size, on means of the energies; a ``BatchCrf``."""

    def __init__(self, images: Sequence[NDArray[np.uint8]], coarse: BatchCrf) -> None:
        """Prepare the way back.

        Args:
            images: RGB, uint8 (H, W, 3) each.
            coarse: The kernels of ``halve_image`` of each.
        """
        self._coarse = coarse
        self._upsamplers = [GuidedUpsampler(image) for image in images]

    def infer(self, unaries: Sequence[NDArray[np.float32]], iterations: int) -> list[NDArray[np.float32]]:
        """Marginals (L, H, W) of each image from its energies (L, H, W); without a step, those of full resolution."""
        return self.infer_sets([unaries], iterations)[0]

    def infer_sets(
        self, sets: Sequence[Sequence[NDArray[np.float32]]], iterations: int
    ) -> list[list[NDArray[np.float32]]]:
        """As ``infer`` for each set."""
        if iterations == 0:
            return [[_softmax(-unary) for unary in unaries] for unaries in sets]
        coarse = self._coarse.infer_sets([[halve(unary) for unary in unaries] for unaries in sets], iterations)
        return [self._upsample_all(marginals) for marginals in coarse]

    def _upsample_all(self, coarse: Sequence[NDArray[np.float32]]) -> list[NDArray[np.float32]]:
        return [_upsample(upsampler, marginals) for upsampler, marginals in zip(self._upsamplers, coarse, strict=True)]


def _upsample(upsampler: GuidedUpsampler, marginals: NDArray[np.float32]) -> NDArray[np.float32]:
    """All labels but the last, which gets the rest; linear models of colour may leave 0 … 1."""
    free = upsampler(marginals[:-1])
    fine = np.concatenate([free, 1 - free.sum(axis=0, keepdims=True)])
    np.clip(fine, 0, 1, out=fine)
    fine /= fine.sum(axis=0)
    return fine


def _softmax(logits: NDArray[np.float32]) -> NDArray[np.float32]:
    powers = np.exp(logits - logits.max(axis=0))
    return powers / powers.sum(axis=0)
