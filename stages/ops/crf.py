"""Dense CRF: the field's parameter presets, unaries, and one mean field with two backends of equal result.

Reads and writes no file.  The ``pydensecrf`` backend needs no torch; the ``torch`` backend is ``stages.ops.crf_torch``.
Shapes: L labels of the CRF (background and the classes that may occur), H W image pixels.
Source: Krähenbühl and Koltun, "Efficient Inference in Fully Connected CRFs with Gaussian Edge Potentials", NIPS 2011.
"""

from __future__ import annotations

import importlib
import importlib.machinery
import importlib.util
from dataclasses import dataclass
from functools import cache
from typing import Any, Literal, Protocol

import numpy as np
from numpy.typing import NDArray
from pydantic import Field

from stages.contracts import StageConfig
from stages.errors import ConfigError

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

SEC's training divides the widths by its stride of 12; psa is also SEAM's, irn also AdvCAM's, toco also DuPL's and
SeCo's, deeplab_v2_resnet101 (from deeplab-pytorch) also CLIP-ES's.
"""

CrfBackend = Literal["pydensecrf", "torch"]

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
    backend: Literal["auto", "pydensecrf", "torch"] = "auto"
    """auto takes pydensecrf where it can be imported, else torch."""

    def numbers(self) -> CrfNumbers:
        """The preset's numbers with the replacements."""
        preset = PRESETS[self.preset]
        own = {name: getattr(self, name) for name in CrfNumbers.__dataclass_fields__}
        return CrfNumbers(**{name: getattr(preset, name) if own[name] is None else own[name] for name in own})


def resolve_crf_backend(backend: Literal["auto", "pydensecrf", "torch"]) -> CrfBackend:
    """The backend that ``backend`` means on this machine; never imports torch.

    Raises:
        ConfigError: pydensecrf is asked for and not installed, or installed and not importable.
    """
    if backend == "torch":
        return "torch"
    if _has_pydensecrf():
        return "pydensecrf"
    if backend == "auto":
        return "torch"
    problem = _import_problem() if _is_installed() else None
    if problem is not None:
        raise ConfigError(
            f"crf.backend: pydensecrf is installed but cannot be imported ({problem}); set it to auto or torch, or "
            "build it again: pip install --force-reinstall --no-cache-dir --no-deps pydensecrf2"
        )
    raise ConfigError(
        "crf.backend: pydensecrf is not installed; set it to auto or torch, or install the extra: "
        "pip install 'wsss-pipeline[crf]' (needs a C++ compiler)"
    )


def _has_pydensecrf() -> bool:
    """Whether pydensecrf works here: a key and the stage behind it must agree, so that it is there is not enough."""
    return _is_installed() and _import_problem() is None


@cache
def _import_problem() -> str | None:
    """Why pydensecrf, which is installed, cannot be imported: built for another numpy or C++ library; a few ms."""
    try:
        importlib.import_module("pydensecrf.densecrf")
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


class ImageCrf(Protocol):
    """The kernels of one image, built once and used with any number of unaries of L labels."""

    def infer(self, unary: NDArray[np.float32], iterations: int) -> NDArray[np.float32]:
        """Marginals (L, H, W) after ``iterations`` mean-field steps from the energies ``unary`` (L, H, W)."""
        ...


def open_crf(image: NDArray[np.uint8], num_labels: int, config: CrfConfig, *, device: str = "cpu") -> ImageCrf:
    """Build the kernels of one image.

    Args:
        image: RGB, uint8 (H, W, 3).
        num_labels: L ≥ 2.
        config: Numbers and backend.
        device: Where the torch backend works; pydensecrf works on the CPU.
    """
    if resolve_crf_backend(config.backend) == "pydensecrf":
        return _PydenseCrf(image, num_labels, config.numbers())
    from stages.ops.crf_torch import TorchCrf

    return TorchCrf(image, config.numbers(), device=device)


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


class _PydenseCrf:
    """pydensecrf's DenseCRF2D; a second unary reuses the lattices, which cost as much as several steps."""

    def __init__(self, image: NDArray[np.uint8], num_labels: int, numbers: CrfNumbers) -> None:
        import pydensecrf.densecrf as native  # pyright: ignore[reportMissingImports] - the optional extra

        height, width = image.shape[:2]
        self._shape = (num_labels, height, width)
        self._crf: Any = native.DenseCRF2D(width, height, num_labels)
        self._crf.addPairwiseGaussian(sxy=numbers.gaussian_sxy_px, compat=numbers.gaussian_weight)
        self._crf.addPairwiseBilateral(
            sxy=numbers.bilateral_sxy_px,
            srgb=numbers.bilateral_srgb,
            rgbim=np.array(image, dtype=np.uint8, order="C"),  # pydensecrf refuses a read-only array
            compat=numbers.bilateral_weight,
        )

    def infer(self, unary: NDArray[np.float32], iterations: int) -> NDArray[np.float32]:
        if unary.shape != self._shape:
            raise ValueError(f"expected a unary {self._shape}, got {unary.shape}")
        self._crf.setUnaryEnergy(np.array(unary.reshape(self._shape[0], -1), dtype=np.float32, order="C"))
        return np.array(self._crf.inference(iterations), dtype=np.float32).reshape(self._shape)
