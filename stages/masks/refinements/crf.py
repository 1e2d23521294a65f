"""The dense CRF as a refinement (``stages.ops.crf``)."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from stages.masks.refinements.base import Image, Probabilities, Refinement, Start
from stages.ops.crf.dense_crf import CrfConfig, label_unary, open_crf_batch, probability_unary


class _Crf:
    """The kernels of some images; a ``BatchRefinement``."""

    def __init__(self, images: Sequence[Image], num_labels: Sequence[int], config: CrfConfig, device: str) -> None:
        self._batch = open_crf_batch(images, num_labels, config, device=device)
        self._num_labels, self._iterations = num_labels, config.iterations

    def refine(self, starts: Sequence[Start]) -> list[list[Probabilities]]:
        """All starts at once, which a backend may take in one pass."""
        return self._batch.infer_sets([self._energies(start) for start in starts], self._iterations)

    def _energies(self, start: Start) -> list[NDArray[np.float32]]:
        """What the CRF starts from: the labels so far with a confidence, or the probabilities so far."""
        if start.unary != "labels":
            return [probability_unary(each) for each in start.probabilities()]
        pairs = zip(start.labels(), self._num_labels, strict=True)
        return [label_unary(labels, count, start.label_confidence) for labels, count in pairs]


CRF = Refinement("dense CRF: pixels of like colour and place agree, over the whole image", _Crf)
