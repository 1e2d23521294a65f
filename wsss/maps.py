"""Attention maps of anybody's classifier, and masks made of maps: arrays in, arrays out, nothing written.

Shapes: K classes of the model, n of them asked for, D channels, h w cells, L labels with background, H W image pixels.
Source: Zhou et al., CVPR 2016 (CAM); Selvaraju et al., ICCV 2017 (Grad-CAM); Krähenbühl and Koltun, NIPS 2011 (CRF).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
from numpy.typing import NDArray

from stages.contracts import IGNORE_INDEX, AttentionRecord
from stages.data.transforms import IMAGE_MEAN, IMAGE_STD
from stages.errors import InputError
from wsss.pictures import Picture, read_picture

if TYPE_CHECKING:
    from torch import Tensor, nn

    from stages.ops.crf.dense_crf import CrfConfig

_SUM_TOLERANCE = 1e-3
"""How far the probabilities of a pixel may be from a sum of 1: float16 rounds so far."""


# ---------------------------------------------------------------------------------------------------------------------
# Attention
# ---------------------------------------------------------------------------------------------------------------------


def attention(
    model: nn.Module,
    image: Picture,
    labels: Sequence[int] | None = None,
    *,
    method: Literal["gradcam", "cam"] = "gradcam",
    layer: str | None = None,
    scales: Sequence[float] = (1.0,),
    flip: bool = False,
    short_side_px: int | None = 384,
    mean: Sequence[float] | None = None,
    std: Sequence[float] | None = None,
) -> NDArray[np.float32]:
    """Where a convolutional classifier looks for a class.

    Args:
        model: Any image classifier, of torchvision or timm say: normalised images (1, 3, H, W) to logits (1, K).  It is
            called in evaluation mode on the device of its parameters; mode and gradients are left as they were.
        image: A path, a PIL image, or RGB as uint8 (H, W, 3).
        labels: Class numbers of the model's output; None takes the likeliest one.
        method: ``cam`` needs a linear layer behind a global average pool; ``gradcam`` needs any convolution.
        layer: Of ``gradcam``, the layer (a name of ``named_modules``) whose features count; None takes the last one
            with more than one cell.
        scales: Factors on the size of what the network sees; the maps are averaged.
        flip: Whether each scale also sees the mirror image.
        short_side_px: Shorter side of what the network sees at scale 1; None keeps the image's.
        mean: Of R, G, B in [0, 1] that the model expects; None takes the model's own (timm), else ImageNet's.
        std: Likewise.

    Returns:
        float32 (n, H, W) in [0, 1]: each map divided by its own maximum; all zero where there is no evidence.
        Differs: cells are spread over the image evenly, since nothing is known of a foreign network's padding.

    Raises:
        InputError: labels, layer or image do not fit, or the model has no such maps: what works is said.
    """
    import torch

    from stages.ops.attention import MapMean, normalise_attention
    from stages.ops.cells import CellGrid
    from stages.ops.multi_scale import network_size, resize

    if method not in ("gradcam", "cam"):
        raise InputError(f"method: expected gradcam or cam, found {method!r}")
    if layer is not None and method == "cam":
        raise InputError("layer goes with method='gradcam'; CAM has the layer before the pooling")
    if not scales or min(scales) <= 0:
        raise InputError(f"scales: expected factors above 0, found {tuple(scales)}")
    pixels = read_picture(image)
    device = next((tensor.device for tensor in model.parameters()), torch.device("cpu"))
    if std is not None and min(std) <= 0:
        raise InputError(f"std: expected numbers above 0, found {tuple(std)}")
    own = getattr(model, "pretrained_cfg", None) or {}
    shift, width = (
        torch.tensor(given or own.get(name) or default, device=device).view(1, 3, 1, 1)
        for name, given, default in (("mean", mean, IMAGE_MEAN), ("std", std, IMAGE_STD))
    )
    whole = torch.from_numpy(pixels).to(device).permute(2, 0, 1)[None].float() / 255
    size = (pixels.shape[0], pixels.shape[1])
    total: MapMean | None = None
    with _evaluating(model), torch.enable_grad():
        for scale in scales:
            seen = (resize(whole, network_size(size, short_side_px, scale)) - shift) / width
            for is_flipped in (False, True) if flip else (False,):
                trace = _run(model, seen.flip(-1) if is_flipped else seen)
                labels = _check_labels(labels, trace.logits)
                maps = _cam(model, trace, labels) if method == "cam" else _grad_cam(model, trace, labels, layer)
                span = (seen.shape[2], seen.shape[3])
                total = total or MapMean(size)
                total.add(
                    maps.detach(), image_size=span, cells=CellGrid.even(maps.shape[1:], span), is_flipped=is_flipped
                )
    assert total is not None
    return normalise_attention(total.mean()[None])[0].cpu().numpy()


@dataclass
class _Trace:
    """One forward pass: what its modules gave, in the order in which they ended."""

    logits: Tensor
    """(1, K)."""
    features: dict[str, Tensor] = field(default_factory=dict)
    """Outputs (1, D, h, w) of more than one cell, by the module's name; of a module called twice the last."""
    vectors: dict[str, Tensor] = field(default_factory=dict)
    """Inputs (1, D) of linear layers."""


@contextmanager
def _evaluating(model: nn.Module) -> Iterator[None]:
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, mode in modes:
            module.training = mode


def _run(model: nn.Module, images: Tensor) -> _Trace:
    import torch
    from torch import nn

    trace = _Trace(torch.empty(0))

    def note(name: str, module: nn.Module, inputs: tuple[Any, ...], output: object) -> None:
        is_pool = isinstance(module, nn.AdaptiveAvgPool2d | nn.AdaptiveMaxPool2d) or "Pool" in type(module).__name__
        is_pool &= not isinstance(module, nn.MaxPool2d | nn.AvgPool2d)
        if isinstance(output, torch.Tensor) and output.ndim == 4 and output[0, 0].numel() > 1 and not is_pool:
            trace.features.pop(name, None)
            trace.features[name] = output
        elif isinstance(module, nn.Linear) and inputs[0].ndim == 2:
            trace.vectors[name] = inputs[0]

    with ExitStack() as hooks:
        for name, module in model.named_modules():
            if name:
                handle = module.register_forward_hook(
                    lambda module, inputs, output, name=name: note(name, module, inputs, output)
                )
                hooks.callback(handle.remove)
        # without a gradient to the input, a frozen model would leave nothing to differentiate
        logits = model(images.detach().requires_grad_())
    if not isinstance(logits, torch.Tensor) or logits.ndim != 2 or len(logits) != 1:
        found = tuple(logits.shape) if isinstance(logits, torch.Tensor) else type(logits).__name__
        raise InputError(f"expected a classifier that gives logits (1, K), found {found}")
    if not torch.isfinite(logits).all():
        raise InputError("the model gives logits that are not finite: are its weights or its normalisation wrong?")
    trace.logits = logits
    return trace


def _check_labels(labels: Sequence[int] | None, logits: Tensor) -> list[int]:
    count = logits.shape[1]
    if labels is None:
        return [int(logits.argmax())]
    found = [int(label) for label in labels if isinstance(label, int | np.integer)]
    if not found or len(found) < len(labels) or any(not 0 <= label < count for label in found):
        raise InputError(f"labels: expected class numbers 0 … {count - 1}, found {list(labels)}")
    return found


def _grad_cam(model: nn.Module, trace: _Trace, labels: Sequence[int], layer: str | None) -> Tensor:
    """(n, h, w) ≥ 0."""
    import torch

    if layer is not None and layer not in trace.features:
        if layer not in dict(model.named_modules()):
            from pipeline.config.yaml_models import did_you_mean

            guess = did_you_mean(layer, list(trace.features))
            raise InputError(f"layer: the model has no '{layer}'{guess or ';'} its last is {_last(trace)}")
        raise InputError(f"layer: '{layer}' gives no map (1, D, h, w); the last that does is {_last(trace)}")
    features = trace.features[layer or _last(trace)]
    maps = []
    for label in labels:
        (slope,) = torch.autograd.grad(trace.logits[0, label], features, retain_graph=True)
        maps.append((slope.mean(dim=(2, 3), keepdim=True) * features).sum(dim=1)[0].relu())
    return torch.stack(maps)


def _last(trace: _Trace) -> str:
    if not trace.features:
        raise InputError(
            "the model has no layer whose output is a map (1, D, h, w): neither CAM nor Grad-CAM can be had of it "
            "(a transformer?); use a convolutional classifier"
        )
    return next(reversed(trace.features))


def _cam(model: nn.Module, trace: _Trace, labels: Sequence[int]) -> Tensor:
    """(n, h, w) ≥ 0, where the logits are a linear function of the mean of some features."""
    import torch

    _last(trace)
    heads = {name: module for name, module in model.named_modules() if name in trace.vectors}
    for features in reversed(trace.features.values()):
        pooled = features.mean(dim=(2, 3))
        for name, head in heads.items():
            vector = trace.vectors[name]
            if _agree(pooled, vector) and _agree(head(vector), trace.logits):
                weight = head.get_parameter("weight")
                return torch.einsum("nd,dhw->nhw", weight[list(labels)], features[0]).relu()
        if _agree(pooled, trace.logits):  # fully convolutional: the maps are there
            return features[0, list(labels)].relu()
    raise InputError(
        "method='cam' needs logits that are a linear layer of the mean over a feature map, and this model has "
        "something between the two; method='gradcam' works with it"
    )


def _agree(first: Tensor, second: Tensor) -> bool:
    import torch

    return first.shape == second.shape and torch.allclose(first.float(), second.float(), rtol=1e-3, atol=1e-4)


# ---------------------------------------------------------------------------------------------------------------------
# Masks
# ---------------------------------------------------------------------------------------------------------------------


def refine(
    image: Picture,
    *,
    maps: NDArray[Any] | None = None,
    mask: NDArray[Any] | None = None,
    probabilities: NDArray[Any] | None = None,
    labels: Sequence[int] | None = None,
    threshold: float = 0.3,
    confidence: float = 0.7,
    crf: CrfConfig | str | None = "irn",
) -> NDArray[np.uint8]:
    """Fit maps, a mask or probabilities to the edges of an image by a dense CRF.

    Args:
        image: A path, a PIL image, or RGB as uint8 (H, W, 3).
        maps: Attention (n, h, w) in [0, 1], or uint8 of 255 steps, of any resolution; what exceeds ``threshold`` of its
            own maximum is its class.
        mask: Labels (H, W) of integers 0 … 254; 255 is unsure and starts from equal probabilities.
        probabilities: (L, H, W) in [0, 1] that sum to 1 over L, background first.  Energies and logits are refused.
        labels: Of ``maps``: the n class numbers (0 … 253); map i becomes ``labels[i] + 1`` in the mask.  None: i + 1.
        threshold: Of ``maps``, in [0, 1).
        confidence: Of ``maps`` and ``mask``: probability that a label which the CRF starts from is right.
        crf: A ``CrfConfig``, the name of a preset (irn, sec, deeplab_v1, …), or None for the threshold alone.

    Returns:
        Mask, uint8 (H, W): of ``maps`` 0 for background and class numbers + 1; else the numbers that were given, of
        ``probabilities`` 0 … L-1.

    Raises:
        InputError: none or several of the three are given, or shape, type or range do not fit.
    """
    from stages.ops.crf.dense_crf import CrfConfig, dense_crf
    from stages.ops.crf.presets import PRESETS

    given = [name for name, it in (("maps", maps), ("mask", mask), ("probabilities", probabilities)) if it is not None]
    if len(given) != 1:
        raise InputError(f"expected one of maps, mask and probabilities, found {' and '.join(given) or 'none'}")
    if isinstance(crf, str) and crf not in PRESETS:
        raise InputError(f"crf: expected a CrfConfig, None or one of {', '.join(PRESETS)}, found {crf!r}")
    config = CrfConfig.model_validate({"preset": crf}) if isinstance(crf, str) else crf
    for name, it in (("maps", maps), ("mask", mask), ("probabilities", probabilities)):
        if it is not None and not isinstance(it, np.ndarray):
            raise InputError(
                f"{name}: expected a numpy array, found {type(it).__name__}; convert it with numpy.asarray"
            )
    pixels = read_picture(image)
    size = (pixels.shape[0], pixels.shape[1])
    if labels is not None and maps is None:
        raise InputError("labels go with maps; a mask and probabilities have their own")
    if maps is not None:
        return _refine_maps(pixels, maps, labels, threshold, confidence, config)
    if mask is not None:
        return _refine_mask(pixels, _check_mask(mask, size), confidence, config)
    assert probabilities is not None
    found = _check_probabilities(probabilities, size)
    found = found if config is None else dense_crf(pixels, found, config)
    return found.argmax(axis=0).astype(np.uint8)


def _refine_maps(
    pixels: NDArray[np.uint8],
    maps: NDArray[Any],
    labels: Sequence[int] | None,
    threshold: float,
    confidence: float,
    crf: CrfConfig | None,
) -> NDArray[np.uint8]:
    from pydantic import ValidationError

    from stages.masks.refinements.chain import refine_mask
    from stages.masks.refinements.config import RefinementConfig
    from stages.ops.attention import quantise_attention

    if maps.ndim != 3 or 0 in maps.shape or maps.dtype.kind not in "fu":
        raise InputError(f"maps: expected (n, h, w) of floats in [0, 1] or uint8, found {maps.dtype} {maps.shape}")
    values = (maps / (255 if maps.dtype == np.uint8 else 1)).astype(np.float32)
    if not (np.isfinite(values).all() and values.min() >= 0 and values.max() <= 1 + 1e-6):
        raise InputError(f"maps: expected values in [0, 1], found {values.min():.4g} … {values.max():.4g}")
    numbers = list(range(len(maps))) if labels is None else [int(label) for label in labels]
    if len(numbers) != len(maps) or len(set(numbers)) < len(numbers) or not all(0 <= n < 254 for n in numbers):
        raise InputError(f"labels: expected {len(maps)} different class numbers 0 … 253, one a map, found {numbers}")
    order = np.argsort(numbers)
    quantised, peaks = quantise_attention(values[order])
    record = AttentionRecord(
        id="image",
        size=(pixels.shape[0], pixels.shape[1]),
        labels=tuple(numbers[position] for position in order),
        maps=quantised,
        peaks=peaks,
    )
    options = {"refine": "none"} if crf is None else {"refine": "crf", "crf": crf}
    try:
        config = RefinementConfig.model_validate({"threshold": threshold, "label_confidence": confidence, **options})
    except ValidationError as error:
        lines = [f"{e['loc'][0]}: {e['msg']}, found {e['input']!r}" for e in error.errors()]
        raise InputError("the options of refine are wrong", lines) from error
    return refine_mask(pixels, record, config)


def _check_mask(mask: NDArray[Any], size: tuple[int, int]) -> NDArray[np.uint8]:
    if mask.dtype.kind not in "iub" or mask.shape != size:
        raise InputError(f"mask: expected integers of the image's {size}, found {mask.dtype} {mask.shape}")
    if mask.min() < 0 or mask.max() > IGNORE_INDEX:
        raise InputError(f"mask: expected labels 0 … 255, found {mask.min()} … {mask.max()}")
    return mask.astype(np.uint8)


def _refine_mask(
    pixels: NDArray[np.uint8], mask: NDArray[np.uint8], confidence: float, crf: CrfConfig | None
) -> NDArray[np.uint8]:
    from stages.ops.crf.dense_crf import label_unary, open_crf

    if not 0.5 < confidence < 1:
        raise InputError(f"confidence: expected above 0.5 and below 1, found {confidence}")
    present = np.unique(mask[mask != IGNORE_INDEX])
    if crf is None or len(present) < 2:
        return mask if len(present) != 1 or crf is None else np.full_like(mask, present[0])
    is_unsure = mask == IGNORE_INDEX
    positions = np.searchsorted(present, np.where(is_unsure, present[0], mask))
    unary = label_unary(positions, len(present), confidence)
    unary[:, is_unsure] = np.log(len(present))
    found = open_crf(pixels, len(present), crf).infer(unary, crf.iterations)
    return present[found.argmax(axis=0)]


def _check_probabilities(probabilities: NDArray[Any], size: tuple[int, int]) -> NDArray[np.float32]:
    if probabilities.ndim != 3 or probabilities.shape[1:] != size or probabilities.dtype.kind != "f":
        raise InputError(
            f"probabilities: expected floats (L, {size[0]}, {size[1]}) as the image, background first, found "
            f"{probabilities.dtype} {probabilities.shape}"
        )
    if not 2 <= len(probabilities) <= IGNORE_INDEX:
        raise InputError(f"probabilities: expected 2 … {IGNORE_INDEX} labels, found {len(probabilities)}")
    sums = probabilities.sum(axis=0, dtype=np.float64)
    if not (np.isfinite(probabilities).all() and probabilities.min() >= 0 and abs(sums - 1).max() <= _SUM_TOLERANCE):
        raise InputError(
            "probabilities: expected values in [0, 1] that sum to 1 over the labels, found "
            f"{probabilities.min():.4g} … {probabilities.max():.4g} with sums {sums.min():.4g} … {sums.max():.4g}; "
            "of logits take the softmax, of energies exp(-energy) divided by its sum"
        )
    return probabilities.astype(np.float32)
