"""How many bytes a stage writes, told from its config, the number of images and their mean size; pure.

The rates rest on what was measured, and err on the side of too much:

- attention maps: compressed 0.71 bytes per stored cell of a ResNet50 at its random start, 0.26 of true masks blurred to
  cells of 16 pixels (40 photographs of VOC); counted is the byte per cell that they take before compression.
- masks and predictions: 0.022 bytes per pixel in the mean of 40 photographs behind a CRF (irn's), 0.041 at most, and
  less without one; counted are 0.05.
- confidence (``soft``): 0.057 bytes per pixel in the mean of the same, 0.13 at most; counted are 0.15.
- generated pictures with their masks: 1.39 bytes per pixel at 64 px a side, 0.84 at 256 px; counted are 1.6.
- a file takes whole blocks: 4 KiB are added to each, which a palette and the headers of a PNG fit into as well.
- trainings: 4 bytes per weight; the checkpoint has weights, momentum and, where they are averaged, the averages, with
  validation also the best weights; it lies there twice while it is replaced, and the finished weights come on top.
- retraining rounds: the masks of each, and the finished weights of all trainings until the last one ends.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

FILE_BYTES = 4096
"""Added to each file: a block of most file systems."""

CELL_BYTES = 1.0
MASK_BYTES_PER_PX = 0.05
CONFIDENCE_BYTES_PER_PX = 0.15
PICTURE_BYTES_PER_PX = 1.6
MAP_HEADER_BYTES = 1024
"""Of an image's entries in an attention shard."""
INDEX_BYTES = 512
"""Of an image in the index."""
STATS_BYTES = 512
"""Of an image in the statistics of the masks, which may stand in two files."""
WEIGHT_BYTES = 4

BACKBONE_WEIGHTS: Mapping[str, float] = {
    "small": 0.105e6,
    "vgg16": 14.715e6,
    "resnet18": 11.19e6,
    "resnet34": 21.30e6,
    "resnet50": 23.561e6,
    "resnet101": 42.606e6,
    "resnet152": 58.30e6,
    "squeezenet1_1": 0.722e6,
    "inception_v3": 21.82e6,
    "mobilenet_v2": 2.258e6,
    "seresnet50": 26.092e6,
    "mobilenetv1_100": 3.229e6,
}
"""Numbers in the state of the plain nets without their classifiers; of others nothing is projected."""

BACKBONE_CHANNELS: Mapping[str, int] = {
    "small": 64,
    "vgg16": 512,
    "resnet18": 512,
    "resnet34": 512,
    "squeezenet1_1": 512,
    "mobilenet_v2": 1280,
    "mobilenetv1_100": 1024,
}
"""Channels of their features; 2048 of those that are not named."""

FC_WEIGHTS = 119.6e6
"""VGG16's own fc6 and fc7."""
DECODER_WEIGHTS = 17e6
"""Of DeepLabV3 on 2048 channels, the larger of the two decoders, with 256 channels of its own."""


def attention_bytes(config: Mapping[str, Any], num_images: int, num_labels: int, mean_px: float | None) -> float | None:
    """Of the stored maps of all images; none where they are not kept, None where the images' size is unknown."""
    if not config.get("keep_maps", True):
        return float(FILE_BYTES)
    if mean_px is None:
        return None
    cells = num_labels * mean_px / config["map_stride"] ** 2
    return cells * CELL_BYTES + num_images * MAP_HEADER_BYTES


def masks_bytes(config: Mapping[str, Any], num_images: int, mean_px: float | None) -> float | None:
    """Of the masks after each step, with ``soft`` also how sure they are; None where the images' size is unknown."""
    refine = config["refine"]
    num_steps = len(refine) if not isinstance(refine, str) else int(refine != "none")
    masks = prediction_bytes(num_images * (1 + num_steps), mean_px)
    if masks is None or mean_px is None:
        return None
    sure = CONFIDENCE_BYTES_PER_PX * mean_px + FILE_BYTES if config.get("soft", False) else 0.0
    return masks + num_images * (STATS_BYTES + sure)


def prediction_bytes(num_images: int, mean_px: float | None) -> float | None:
    """Of a mask of each image."""
    return None if mean_px is None else num_images * (MASK_BYTES_PER_PX * mean_px + FILE_BYTES)


def prepared_bytes(num_images: int, mean_px: float | None, *, is_generated: bool) -> float:
    """Of the index, and of generated pictures with their masks and boxes."""
    pictures = PICTURE_BYTES_PER_PX * (mean_px or 0.0) + 3 * FILE_BYTES if is_generated else 0.0
    return num_images * (INDEX_BYTES + pictures)


def classifier_bytes(config: Mapping[str, Any]) -> float | None:
    """Of the classifier's training; None for a backbone of unknown size."""
    name = config["backbone"]["name"]
    weights = BACKBONE_WEIGHTS.get(name)
    if weights is None:
        return None
    head = FC_WEIGHTS if config.get("head", "gap") == "fc" else 0.0
    branches = _branch_weights(config["method"].get("head_channels", 0), BACKBONE_CHANNELS.get(name, 2048))
    return _training_bytes(config["training"], weights + head + branches)


def _branch_weights(head_channels: int, in_channels: int) -> float:
    """Of ACoL's two heads, which SPG's one with its guides does not exceed; 0 for methods that have none."""
    return 2 * 9 * head_channels * (in_channels + head_channels)


def segmenter_bytes(config: Mapping[str, Any], num_images: int, mean_px: float | None) -> float | None:
    """Of the segmenter's trainings, with ``validation`` the best weights too, with ``rounds`` the masks of each.

    None for an encoder of unknown size, or where the masks' size is unknown.
    """
    net = config["net"]
    name = net["backbone"]["name"] if "backbone" in net else net["encoder"]
    weights = BACKBONE_WEIGHTS.get(name)
    if weights is None:
        return None
    weights += _decoder_weights(net, BACKBONE_CHANNELS.get(name, 2048))
    has_best = config.get("validation") is not None
    training, rounds = _training_bytes(config["training"], weights, has_best=has_best), config.get("rounds", 0)
    masks = prediction_bytes(num_images, mean_px) if rounds else 0.0
    return None if masks is None else training + rounds * (WEIGHT_BYTES * weights * (1 + has_best) + masks)


def _decoder_weights(net: Mapping[str, Any], in_channels: int) -> float:
    if net["name"] == "largefov":
        channels = net["channels"]
        return channels * (9 * in_channels + (channels if net["fc7"] else 0))
    if net["name"] == "deeplabv2":  # 3×3 classifiers of at most 256 classes; VOC's 21 are far less
        return len(net["dilations"]) * 9 * in_channels * 21
    return DECODER_WEIGHTS * max(1.0, net["decoder_channels"] / 256) ** 2


def _training_bytes(training: Mapping[str, Any], weights: float, *, has_best: bool = False) -> float:
    """A checkpoint that is being replaced by the next, and the finished weights, the last and the best."""
    copies = 2 + (training.get("ema_decay") is not None) + has_best
    return WEIGHT_BYTES * weights * (2 * copies + 1 + has_best)
