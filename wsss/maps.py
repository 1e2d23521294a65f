"""Attention maps of anybody's classifier, and masks made of maps: arrays in, arrays out, nothing written.

Shapes: K classes of the model, n of them asked for, D channels, h w cells, L labels with background, H W image pixels.
Source: Zhou et al., CVPR 2016 (CAM); Selvaraju et al., ICCV 2017 (Grad-CAM); Krähenbühl and Koltun, NIPS 2011 (CRF).
"""

from __future__ import annotations

import math
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
            called in evaluation mode on the device and in the precision of its parameters; mode and gradients are left
            as they were.  It may be called, and may have been made, under ``torch.inference_mode``.
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
    if not isinstance(model, torch.nn.Module):
        raise InputError(f"model: expected a torch.nn.Module, found {type(model).__name__}")
    factors = _numbers("scales", scales, least=0, most=_LARGEST_SCALE)
    if short_side_px is not None and not (isinstance(short_side_px, int) and 1 <= short_side_px <= _LONGEST_SIDE_PX):
        raise InputError(f"short_side_px: expected 1 … {_LONGEST_SIDE_PX} or None, found {short_side_px!r}")
    own = getattr(model, "pretrained_cfg", None) or {}
    found_mean, found_std = (
        _numbers(name, own.get(name) or default if given is None else given, least=least, count=3)
        for name, given, default, least in (("mean", mean, IMAGE_MEAN, None), ("std", std, IMAGE_STD, 0.0))
    )
    pixels = read_picture(image)
    tensors = [tensor for tensor in model.parameters() if tensor.is_floating_point()]
    device, dtype = (tensors[0].device, tensors[0].dtype) if tensors else (torch.device("cpu"), torch.float32)
    size = (pixels.shape[0], pixels.shape[1])
    total: MapMean | None = None
    with torch.inference_mode(mode=False), _evaluating(model), torch.enable_grad():
        shift, width = (torch.tensor(numbers, device=device).view(1, 3, 1, 1) for numbers in (found_mean, found_std))
        whole = torch.from_numpy(pixels).to(device).permute(2, 0, 1)[None].float() / 255
        for scale in factors:
            seen = ((resize(whole, network_size(size, short_side_px, scale)) - shift) / width).to(dtype)
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


_LARGEST_SCALE = 16.0
_LONGEST_SIDE_PX = 16_384
"""Beyond these a network sees nothing but memory running out."""


def _numbers(
    name: str, given: object, *, least: float | None, most: float = math.inf, count: int | None = None
) -> tuple[float, ...]:
    """``given`` as finite numbers above ``least`` and up to ``most``, ``count`` of them or at least one.

    Raises:
        InputError: it is something else.
    """
    above = "" if least is None else f" above {least:g}"
    upto = f" and up to {most:g}" if most < math.inf else ""
    try:
        found = tuple(float(number) for number in given)  # type: ignore[attr-defined] - what is not iterable is refused
    except (TypeError, ValueError):
        found = ()
    is_right = len(found) == count if count else len(found) > 0
    if not is_right or not all(math.isfinite(n) and (least is None or n > least) and n <= most for n in found):
        text = f"{name}: expected {count or 'a list of'} finite numbers{above}{upto}"
        raise InputError(f"{text}, found {given!r:.200}")
    return found


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
        # what was made under inference_mode cannot be differentiated through; its copy can
        tensors = (*model.named_parameters(), *model.named_buffers())
        copies = {name: tensor.clone() for name, tensor in tensors if tensor.is_inference()}
        # without a gradient to the input, a frozen model would leave nothing to differentiate
        images = images.detach().requires_grad_()
        logits = torch.func.functional_call(model, copies, (images,)) if copies else model(images)
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
    found = _whole_numbers(labels)
    if not found or any(not 0 <= label < count for label in found):
        raise InputError(f"labels: expected class numbers 0 … {count - 1}, found {labels!r:.200}")
    return found


def _whole_numbers(labels: object) -> list[int]:
    """Labels as a list; empty where they are none or anything else."""
    given = list(labels) if isinstance(labels, Sequence | np.ndarray) else []
    is_whole = all(isinstance(label, int | np.integer) and not isinstance(label, bool) for label in given)
    return [int(label) for label in given] if is_whole else []


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
        # half precision would lose small slopes in the mean
        weights = slope.float().mean(dim=(2, 3), keepdim=True)
        maps.append((weights * features.float()).sum(dim=1)[0].relu())
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
    with torch.no_grad():
        for features in reversed(trace.features.values()):
            pooled = features.float().mean(dim=(2, 3)).to(features.dtype)
            for name, head in heads.items():
                vector = trace.vectors[name]
                if _agree(pooled, vector) and _agree(head(vector), trace.logits):
                    weight = head.get_parameter("weight")[list(labels)].float()
                    return torch.einsum("nd,dhw->nhw", weight, features[0].float()).relu()
            if _agree(pooled, trace.logits):  # fully convolutional: the maps are there
                return features[0, list(labels)].float().relu()
    raise InputError(
        "method='cam' needs logits that are a linear layer of the mean over a feature map, and this model has "
        "something between the two; method='gradcam' works with it"
    )


def _agree(first: Tensor, second: Tensor) -> bool:
    import torch

    if first.shape != second.shape or first.dtype != second.dtype:
        return False
    rounding = max(torch.finfo(first.dtype).eps, 1e-4)  # of half precision far more than of 32 bits
    return torch.allclose(first.float(), second.float(), rtol=10 * rounding, atol=rounding)


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
    if crf is not None and not isinstance(crf, str | CrfConfig):
        raise InputError(f"crf: expected a CrfConfig, None or one of {', '.join(PRESETS)}, found {type(crf).__name__}")
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
    (map_height, map_width), (height, width) = maps.shape[1:], pixels.shape[:2]
    is_lying = (map_height > map_width) != (height > width) and map_height != map_width and height != width
    if is_lying and abs(map_height * height - map_width * width) <= max(map_height * width, map_width * height) / 10:
        raise InputError(
            f"maps: expected (n, h, w) in the shape of an image of {height}×{width} (height×width), found "
            f"{maps.shape}: height and width are exchanged; take maps.transpose(0, 2, 1)"
        )
    numbers = list(range(len(maps))) if labels is None else _whole_numbers(labels)
    if len(numbers) != len(maps) or len(set(numbers)) < len(numbers) or not all(0 <= n < 254 for n in numbers):
        text = f"labels: expected {len(maps)} different class numbers 0 … 253, one a map"
        raise InputError(f"{text}, found {numbers if labels is None else labels!r:.200}")
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

    if not isinstance(confidence, float | int) or not 0.5 < confidence < 1:
        raise InputError(f"confidence: expected above 0.5 and below 1, found {confidence!r}")
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
