"""Dense CRF: the field's parameter presets, unaries, and one mean field with three backends of equal result.

Reads and writes no file.  The backends are ``stages.ops.crf.native`` (pydensecrf), ``stages.ops.crf.numba_backend``
(neither needs torch) and ``stages.ops.crf.torch_backend``; ``stages.ops.crf.half`` works with each.  Costs:
``docs/crf.md``.
Shapes: L labels of the CRF (background and the classes that may occur), H W image pixels.
Source: Krähenbühl and Koltun, "Efficient Inference in Fully Connected CRFs with Gaussian Edge Potentials", NIPS 2011.
"""

from __future__ import annotations

import importlib
import importlib.machinery
import importlib.util
from collections.abc import Sequence
from functools import cache
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray
from pydantic import Field

from stages.contracts import StageConfig
from stages.errors import ConfigError
from stages.ops.crf.cuda_presence import has_cuda
from stages.ops.crf.half import HalfResolutionCrf, halve_image
from stages.ops.crf.presets import PRESETS, BatchCrf, CrfNumbers, CrfPreset

CrfBackend = Literal["pydensecrf", "numba", "torch"]

INSTALL_NUMBA = "pip install --upgrade numba"

_PROBABILITY_FLOOR = 1e-5
"""pydensecrf's ``unary_from_softmax`` clips here, so that no energy is infinite."""


class CrfConfig(StageConfig):
    """A preset, and any of its numbers replaced."""

    preset: CrfPreset = "irn"
    """Whose numbers to take."""
    bilateral_weight: float | None = Field(default=None, ge=0, le=1000)
    """Weight of the kernel over position and colour; None takes the preset's, as for the next four."""
    bilateral_sxy_px: float | None = Field(default=None, ge=0.1, le=10_000)
    """Its width in pixels."""
    bilateral_srgb: float | None = Field(default=None, ge=0.1, le=1000)
    """Its width in grey levels of 0 … 255."""
    gaussian_weight: float | None = Field(default=None, ge=0, le=1000)
    """Weight of the kernel over position alone."""
    gaussian_sxy_px: float | None = Field(default=None, ge=0.1, le=10_000)
    """Its width in pixels."""
    iterations: int = Field(default=10, ge=0, le=1000)
    """Mean-field steps; 0 gives the unary back."""
    backend: Literal["auto", "pydensecrf", "numba", "torch"] = "auto"
    """auto takes torch on a CUDA device; else the first of numba, pydensecrf and torch that can be imported."""
    resolution: Literal["full", "half"] = "full"
    """half works on half the height and width, four times faster or more, and brings the marginals back along the
    edges of the full image: an approximation."""
    tolerance: float | None = Field(default=None, gt=0, lt=1)
    """Stop after a step that moves no probability by as much; null makes all iterations."""

    def numbers(self) -> CrfNumbers:
        """The preset's numbers with the replacements."""
        preset = PRESETS[self.preset]
        own = {name: getattr(self, name) for name in CrfNumbers.__dataclass_fields__}
        return CrfNumbers(**{name: getattr(preset, name) if own[name] is None else own[name] for name in own})

    def key_content(self, device: str = "cpu") -> dict[str, Any]:
        """What a key holds of this CRF: the numbers and the backend that really runs."""
        return self.resolved(device).model_dump(mode="json")

    def resolved(self, device: str = "cpu") -> CrfConfig:
        """The same with the backend by name, so that a stage runs the one that is in its key."""
        return self.model_copy(update={"backend": resolve_crf_backend(self.backend, device)})


def resolve_crf_backend(backend: Literal["auto", "pydensecrf", "numba", "torch"], device: str = "cpu") -> CrfBackend:
    """The backend that ``backend`` means on this machine; never imports torch.

    Args:
        backend: As in the config.
        device: ``Runtime.device``, or a torch device: where it is CUDA, or auto with a CUDA device at hand, auto means
            torch.

    Raises:
        ConfigError: pydensecrf or numba is asked for and not installed, or installed and not importable.
    """
    if backend == "torch" or (backend == "auto" and _means_cuda(device)):
        return "torch"
    if backend == "auto":
        return "numba" if _has_numba() else "pydensecrf" if _has_pydensecrf() else "torch"
    if backend == "numba" and not _has_numba():
        raise ConfigError(_missing_numba())
    if backend == "pydensecrf" and not _has_pydensecrf():
        raise ConfigError(_missing_pydensecrf())
    return backend


def _missing_pydensecrf() -> str:
    problem = _import_problem("pydensecrf.densecrf") if _is_installed() else None
    if problem is not None:
        return (
            f"crf.backend: pydensecrf is installed but cannot be imported ({problem}); set it to auto, which "
            "is equal in result, or build it again: pip install --force-reinstall --no-cache-dir --no-deps pydensecrf2"
        )
    return (
        "crf.backend: pydensecrf is not installed; set it to auto, which is equal in result, or install the extra: "
        "pip install 'wsss-pipeline[crf]' (needs a C++ compiler)"
    )


def _missing_numba() -> str:
    problem = None if importlib.util.find_spec("numba") is None else _import_problem("numba")
    found = "is not installed" if problem is None else f"cannot be imported ({problem})"
    return f"crf.backend: numba {found}; set it to auto or torch, or install one that fits this numpy: {INSTALL_NUMBA}"


def _means_cuda(device: str) -> bool:
    return device.startswith("cuda") or (device == "auto" and has_cuda())


def _has_pydensecrf() -> bool:
    """Whether pydensecrf works here: a key and the stage behind it must agree, so that it is there is not enough."""
    return _is_installed() and _import_problem("pydensecrf.densecrf") is None


def _has_numba() -> bool:
    """Whether numba works here, likewise."""
    return importlib.util.find_spec("numba") is not None and _import_problem("numba") is None


@cache
def _import_problem(module: str) -> str | None:
    """Why an installed module cannot be imported: built for another numpy or C++ library.

    pydensecrf takes a few ms, numba about half a second: it is asked for only where it would be taken.
    """
    try:
        importlib.import_module(module)
    except Exception as error:  # an extension module may raise anything
        return f"{type(error).__name__}: {error}"
    return None


def _is_installed() -> bool:
    package = importlib.util.find_spec("pydensecrf")
    if package is None or package.submodule_search_locations is None:
        return False
    locations = list(package.submodule_search_locations)
    return importlib.machinery.PathFinder.find_spec("densecrf", locations) is not None


# ---------------------------------------------------------------------------------------------------------------------
# Unaries
# ---------------------------------------------------------------------------------------------------------------------


def label_unary(labels: NDArray[np.integer[Any]], num_labels: int, confidence: float) -> NDArray[np.float32]:
    """Energies of hard labels: ``confidence`` on the label, the rest shared evenly by the others.

    Args:
        labels: CRF labels 0 … L-1, (H, W); 0 is background, a label like the others.
        num_labels: L ≥ 2.
        confidence: Probability of the given label, in (1/L, 1); below, the CRF would be told the opposite.

    Returns:
        float32 (L, H, W).

    Source:
        pydensecrf ``utils.unary_from_labels`` with ``zero_unsure=False``, as irn's ``crf_inference_label`` calls it.
    """
    if num_labels < 2 or not 1 / num_labels < confidence < 1:
        raise ValueError(f"expected L >= 2 and confidence in (1/L, 1), got L = {num_labels}, confidence = {confidence}")
    unary = np.full((num_labels, *labels.shape), -np.log((1 - confidence) / (num_labels - 1)), dtype=np.float32)
    np.put_along_axis(unary, labels[None].astype(np.intp), np.float32(-np.log(confidence)), axis=0)
    return unary


def probability_unary(probabilities: NDArray[np.float32]) -> NDArray[np.float32]:
    """Energies -log p of probabilities (L, H, W), clipped to 1e-5 … 1 as pydensecrf's ``unary_from_softmax`` does."""
    return -np.log(np.clip(probabilities, _PROBABILITY_FLOOR, 1.0)).astype(np.float32)


# ---------------------------------------------------------------------------------------------------------------------
# Mean field
# ---------------------------------------------------------------------------------------------------------------------


class ImageCrf:
    """The kernels of one image, built once and used with any number of unaries of L labels."""

    def __init__(self, batch: BatchCrf) -> None:
        """Take a batch of one image."""
        self._batch = batch

    def infer(self, unary: NDArray[np.float32], iterations: int) -> NDArray[np.float32]:
        """Marginals (L, H, W) after ``iterations`` mean-field steps from the energies ``unary`` (L, H, W)."""
        return self._batch.infer([unary], iterations)[0]


def open_crf(image: NDArray[np.uint8], num_labels: int, config: CrfConfig, *, device: str = "cpu") -> ImageCrf:
    """Build the kernels of one image.

    Args:
        image: RGB, uint8 (H, W, 3).
        num_labels: L ≥ 2.
        config: Numbers, backend, resolution, tolerance.
        device: Where the torch backend works; the others work on the CPU.
    """
    return ImageCrf(open_crf_batch([image], [num_labels], config, device=device))


def open_crf_batch(
    images: Sequence[NDArray[np.uint8]], num_labels: Sequence[int], config: CrfConfig, *, device: str = "cpu"
) -> BatchCrf:
    """Build the kernels of images of any sizes: at once by the torch backend (for CUDA), else one by one.

    Args:
        images: RGB, uint8 (H, W, 3) each; at least one.
        num_labels: L ≥ 2 of each image.
        config: Numbers, backend, resolution, tolerance.
        device: Where the torch backend works; the others work on the CPU.

    Returns:
        Kernels that give each image what it would get alone, but for float32 rounding.

    Raises:
        ValueError: no image, an image that is not uint8 (H, W, 3), or fewer than two labels; ``infer`` of what is
            returned, for a unary of another shape or with NaN or infinity.
    """
    if not images or len(images) != len(num_labels) or min(num_labels) < 2:
        raise ValueError(f"expected one image or more, L >= 2 for each, got {len(images)} images, L = {[*num_labels]}")
    for image in images:
        if image.dtype != np.uint8 or image.ndim != 3 or image.shape[2] != 3 or not image.size:
            raise ValueError(f"expected an RGB image, uint8 (H, W, 3), got {image.dtype} {image.shape}")
    shapes = [(count, *image.shape[:2]) for count, image in zip(num_labels, images, strict=True)]
    if config.resolution == "full":
        return _CheckedCrf(shapes, _open_unchecked(images, num_labels, config, config.numbers(), device))
    small = [halve_image(image) for image in images]
    coarse = _open_unchecked(small, num_labels, config, config.numbers().halved(), device)
    return _CheckedCrf(shapes, HalfResolutionCrf(images, coarse))


def _open_unchecked(
    images: Sequence[NDArray[np.uint8]], num_labels: Sequence[int], config: CrfConfig, numbers: CrfNumbers, device: str
) -> BatchCrf:
    backend = resolve_crf_backend(config.backend, device)
    if backend == "pydensecrf":
        from stages.ops.crf.native import PydenseCrf

        return PydenseCrf(images, num_labels, numbers, tolerance=config.tolerance)
    if backend == "numba":
        from stages.ops.crf.numba_backend import NumbaCrf

        return NumbaCrf(images, numbers, tolerance=config.tolerance)
    from stages.ops.crf.torch_backend import TorchCrf

    return TorchCrf(images, numbers, device=device, tolerance=config.tolerance)


class _CheckedCrf:
    """Refuses unaries that do not fit or would spoil every pixel that their kernels reach; a ``BatchCrf``."""

    def __init__(self, shapes: Sequence[tuple[int, ...]], batch: BatchCrf) -> None:
        self._shapes = shapes
        self._batch = batch

    def infer(self, unaries: Sequence[NDArray[np.float32]], iterations: int) -> list[NDArray[np.float32]]:
        self._check(unaries)
        return self._batch.infer(unaries, iterations)

    def infer_sets(
        self, sets: Sequence[Sequence[NDArray[np.float32]]], iterations: int
    ) -> list[list[NDArray[np.float32]]]:
        for unaries in sets:
            self._check(unaries)
        return self._batch.infer_sets(sets, iterations)

    def _check(self, unaries: Sequence[NDArray[np.float32]]) -> None:
        for unary, shape in zip(unaries, self._shapes, strict=True):
            if unary.shape != shape:
                raise ValueError(f"expected a unary {shape}, got {unary.shape}")
            bad = int((~np.isfinite(unary)).any(axis=0).sum())
            if bad:
                raise ValueError(
                    f"expected finite energies, found NaN or infinity in {bad} of {unary[0].size} pixels of a unary; "
                    "leave such maps or probabilities out before the CRF"
                )


def dense_crf(
    image: NDArray[np.uint8], unary_prob: NDArray[np.float32], config: CrfConfig, *, device: str = "cpu"
) -> NDArray[np.float32]:
    """Refine probabilities by the colours of the image.

    Args:
        image: RGB, uint8 (H, W, 3).
        unary_prob: Probabilities over axis 0, (L, H, W); one label alone has nothing to change and comes back as ones.
        config: Numbers, iterations, backend.
        device: Where the torch backend works.

    Returns:
        float32 (L, H, W), summing to 1 over axis 0.
    """
    if unary_prob.shape[1:] != image.shape[:2]:
        raise ValueError(f"expected probabilities (L, *{image.shape[:2]}) as the image, got {unary_prob.shape}")
    if len(unary_prob) == 1:
        return np.ones_like(unary_prob, dtype=np.float32)
    crf = open_crf(image, len(unary_prob), config, device=device)
    return crf.infer(probability_unary(unary_prob), config.iterations)
