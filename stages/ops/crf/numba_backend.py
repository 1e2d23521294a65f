"""Mean field of the dense CRF by loops that numba compiles, on one core of the CPU.

For CPUs: quicker than pydensecrf, and installed from wheels.  Probabilities agree with pydensecrf's within 1e-3, save
single pixels near a tie, where the iterations amplify either one's float32 rounding.  The first process of a user
compiles for some seconds; the others find the code (``stages.ops.crf.numba_compiled``).
Reads and writes no file but numba's cache.
Shapes: L labels, S labellings of one image, H W image pixels.
Source: Krähenbühl and Koltun, 2011.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from stages.ops.crf.numba_lattice import Lattice, build_lattice
from stages.ops.crf.numba_steps import blur, sweep

if TYPE_CHECKING:
    from stages.ops.crf.presets import CrfNumbers

_KEPT_PX = 1 << 20
"""Images of fewer pixels share the lattice of their positions with others of their size: about 25 bytes a pixel."""

Energies = NDArray[np.float32]


class NumbaCrf:
    """The kernels of some images, which take turns; a ``BatchCrf``."""

    def __init__(
        self,
        images: Sequence[NDArray[np.uint8]],
        numbers: CrfNumbers,
        *,
        tolerance: float | None = None,
    ) -> None:
        """Build the lattices.

        Args:
            images: RGB, uint8 (H, W, 3) each.
            numbers: Weights and widths.
            tolerance: A labelling keeps the marginals of the step that moved none by as much; None makes all steps.
        """
        self._crfs = [_ImageCrf(image, numbers, tolerance) for image in images]

    @property
    def steps(self) -> list[int]:
        """Mean-field steps of each image in the last call, of its slowest labelling."""
        return [crf.steps for crf in self._crfs]

    def infer(self, unaries: Sequence[Energies], iterations: int) -> list[NDArray[np.float32]]:
        """Marginals (L, H, W) of each image after at most ``iterations`` steps from its energies (L, H, W)."""
        return self.infer_sets([unaries], iterations)[0]

    def infer_sets(self, sets: Sequence[Sequence[Energies]], iterations: int) -> list[list[NDArray[np.float32]]]:
        """As ``infer`` for each set, all labellings of an image in one pass over its lattices."""
        by_image = [crf.infer(each, iterations) for crf, each in zip(self._crfs, zip(*sets, strict=True), strict=True)]
        return [list(marginals) for marginals in zip(*by_image, strict=True)]


class _ImageCrf:
    """One image's lattices."""

    def __init__(self, image: NDArray[np.uint8], numbers: CrfNumbers, tolerance: float | None) -> None:
        size = (image.shape[0], image.shape[1])
        open_near = _shared_lattice if size[0] * size[1] <= _KEPT_PX else _position_lattice
        colours = np.moveaxis(image, -1, 0).reshape(3, -1).astype(np.float32) / np.float32(numbers.bilateral_srgb)
        positions = _positions(*size) / np.float32(numbers.bilateral_sxy_px)
        far = build_lattice(np.concatenate([positions, colours]), numbers.bilateral_weight)
        self._lattices = (open_near(*size, numbers.gaussian_sxy_px, numbers.gaussian_weight), far)
        self._tolerance = tolerance
        self.steps = 0

    def infer(self, unaries: Sequence[Energies], iterations: int) -> list[NDArray[np.float32]]:
        """Marginals (L, H, W) of each labelling from its energies (L, H, W)."""
        num_labels, shape = len(unaries[0]), unaries[0].shape
        energy = np.concatenate([unary.reshape(num_labels, -1) for unary in unaries], dtype=np.float32)
        field = _MeanField(self._lattices, np.ascontiguousarray(energy), num_labels)
        if self._tolerance is not None:
            return [each.reshape(shape) for each in self._until_still(field, iterations, self._tolerance)]
        for _ in range(iterations):
            field.step()
        self.steps = iterations
        return [each.reshape(shape).copy() for each in field.read()]

    def _until_still(self, field: _MeanField, iterations: int, tolerance: float) -> list[NDArray[np.float32]]:
        """The marginals (L, H·W) of each labelling at the step where it came to rest."""
        before = found = [each.copy() for each in field.read()]
        is_moving = [True] * len(found)
        self.steps = 0
        while any(is_moving) and self.steps < iterations:
            field.step()
            self.steps += 1
            after = field.read()
            found = [new.copy() if moves else old for new, old, moves in zip(after, found, is_moving, strict=True)]
            is_moving = [
                moves and np.abs(new - old).max() >= tolerance
                for new, old, moves in zip(after, before, is_moving, strict=True)
            ]
            before = after
        return found


class _MeanField:
    """All labellings of one image, between two steps."""

    def __init__(self, lattices: tuple[Lattice, Lattice], energy: Energies, num_labels: int) -> None:
        self._lattices = lattices
        self._energy = energy
        self._num_labels = num_labels
        rows = [(len(energy) + 3) // 4 * (lattice.neighbours.shape[1] + 1) for lattice in lattices]
        self._blurred, self._given, self._spare = ([np.zeros((count, 4), np.float32) for count in rows] for _ in "abc")

    def step(self) -> None:
        """Give the probabilities to the lattices and blur them."""
        for given in self._given:
            given[:] = 0
        self._sweep(self._given, np.empty((0, 0), np.float32))
        for number, lattice in enumerate(self._lattices):
            old = self._blurred[number]
            self._blurred[number], self._spare[number] = blur(
                self._given[number], self._spare[number], lattice.neighbours
            )
            self._given[number] = old

    def read(self) -> list[NDArray[np.float32]]:
        """The marginals (L, H·W) of each labelling after the steps so far."""
        marginals = np.empty_like(self._energy)
        self._sweep([np.empty((0, 4), np.float32)] * 2, marginals)
        return [marginals[start : start + self._num_labels] for start in range(0, len(marginals), self._num_labels)]

    def _sweep(self, given: Sequence[NDArray[np.float32]], marginals: NDArray[np.float32]) -> None:
        near, far = ((lattice.corners, lattice.weights) for lattice in self._lattices)
        taken, into = (self._blurred[0], self._blurred[1]), (given[0], given[1])
        sweep(self._energy, self._num_labels, near, far, taken, into, marginals)


def _positions(height: int, width: int) -> NDArray[np.float32]:
    """Column and row of each pixel, (2, H·W)."""
    rows, columns = np.mgrid[:height, :width]
    return np.stack([columns, rows]).reshape(2, -1).astype(np.float32)


def _position_lattice(height: int, width: int, sxy_px: float, weight: float) -> Lattice:
    """The kernel over position alone."""
    return build_lattice(_positions(height, width) / np.float32(sxy_px), weight)


# images of a data set have few sizes: most of them find theirs here
_shared_lattice = lru_cache(maxsize=4)(_position_lattice)
