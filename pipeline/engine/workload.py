"""How much work a stage is, counted from what its key is made of and from how many images there are.

Reads the index of a ``prepare_data`` artifact, or before there is one the headers of some images; writes nothing;
torch-free.  A run's plan and an artifact's manifest
describe a stage in the same words (``content``), so both are counted by the same functions and can be compared.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from PIL import Image

from pipeline.engine.disk_sizes import (
    attention_bytes,
    classifier_bytes,
    masks_bytes,
    prediction_bytes,
    prepared_bytes,
    segmenter_bytes,
)
from stages.contracts import IMAGE_FORMATS, ImageIndex, ImageRecord, read_json
from stages.data.records import DataListing, ListedImage
from stages.data.splits import hold_out
from stages.training.loop import TrainingConfig

Content = Mapping[str, Any]
"""``content`` of a manifest, or what a key of a plan is the hash of."""

_OPENED_IMAGES = 32
"""Images of a listing whose headers are read to learn the size of all."""

_PHOTOGRAPH = 4 / 3
"""Longer over shorter side of an image nobody has opened yet."""

_FORWARD_SHARE = 1 / 3
"""Of a training step: the backward pass takes two products for each of the forward pass."""


@dataclass(frozen=True)
class DataFacts:
    """What decides how much work a data set is."""

    num_train: int
    num_holdout: int
    """Training images that the classifier does not see."""
    num_full_masks: int
    """Training images with a true mask to train on."""
    num_val: int
    num_scored: int
    """Images of val with a true mask."""
    num_test: int
    num_labels: int
    """Labels of all training images together: the number of attention maps."""
    mean_px: float | None
    """Mean height × width of the images, before prepare_data of some of them; None where none can be opened."""
    side_ratio: float = _PHOTOGRAPH
    """Mean of longer over shorter side."""

    def seen_px(self, short_side_px: int | None) -> float | None:
        """Mean pixels of an image resized to this shorter side (None: not resized); None where that is unknown."""
        return self.mean_px if short_side_px is None else short_side_px**2 * self.side_ratio


@dataclass(frozen=True)
class Work:
    """How much one stage has to do."""

    count: int
    unit: str
    """What is counted: steps or images."""
    cost: float | None
    """Grows in proportion to the time along one path; None where the sizes of the images are unknown."""
    path: tuple[object, ...]
    """Two builds of a stage compare only if this is equal: networks, precision, backends."""
    disk_bytes: float | None = None
    """About the most that its files take on disk (``engine.disk_sizes``); None where what decides it is unknown."""


# ---------------------------------------------------------------------------------------------------------------------
# The data
# ---------------------------------------------------------------------------------------------------------------------


def facts_of_index(prepared: Path) -> DataFacts:
    """What ``prepare_data`` found out; ``prepared`` is its output folder."""
    index = ImageIndex.model_validate(read_json(prepared / "index.json"))
    sizes = [image.size for image in index.images]
    return _facts(index.images, index.splits, len(index.splits.get("holdout", ())), sizes)


def facts_of_listing(listing: DataListing, prepare_data: Content) -> DataFacts:
    """What the lists tell before ``prepare_data``, whose content is given, has opened an image."""
    holdout = hold_out(listing, prepare_data["config"]["holdout_ratio"])
    size_px = prepare_data["data"].get("size_px")  # generated images have one size, which the config gives
    sizes = _sample_sizes(listing) if size_px is None else [(size_px, size_px)]
    return _facts(listing.images, listing.splits, len(holdout), sizes)


def _sample_sizes(listing: DataListing) -> list[tuple[int, int]]:
    """(height, width) of images that lie evenly over the list; what cannot be opened is for prepare_data to name."""
    if listing.root is None:
        return []
    step = max(1, len(listing.images) // _OPENED_IMAGES)
    sizes = []
    for image in listing.images[::step][:_OPENED_IMAGES]:
        try:
            with Image.open(listing.root / image.image, formats=IMAGE_FORMATS) as opened:
                sizes.append((opened.height, opened.width))
        except (OSError, ValueError, SyntaxError, Image.DecompressionBombError):
            continue
    return sizes


def _facts(
    images: Sequence[ListedImage | ImageRecord],
    splits: Mapping[str, Sequence[str]],
    num_holdout: int,
    sizes: Sequence[tuple[int, int]],
) -> DataFacts:
    train, val = _of(images, splits, "train"), _of(images, splits, "val")
    count = len(sizes)
    return DataFacts(
        num_train=len(train),
        num_holdout=num_holdout,
        num_full_masks=sum(image.full_mask is not None for image in train),
        num_val=len(val),
        num_scored=sum(image.mask is not None for image in val),
        num_test=len(splits.get("test", ())),
        num_labels=sum(len(image.labels or ()) for image in train),
        mean_px=sum(height * width for height, width in sizes) / count if count else None,
        side_ratio=sum(max(size) / min(size) for size in sizes) / count if count else _PHOTOGRAPH,
    )


def _of(
    images: Sequence[ListedImage | ImageRecord], splits: Mapping[str, Sequence[str]], split: str
) -> list[ListedImage | ImageRecord]:
    ids = set(splits.get(split, ()))
    return [image for image in images if image.id in ids]


# ---------------------------------------------------------------------------------------------------------------------
# The stages
# ---------------------------------------------------------------------------------------------------------------------


def count_work(content: Content, inputs: Mapping[str, Content], data: DataFacts) -> Work | None:
    """How much work a stage is; None for a stage that nobody has told how to count.

    Args:
        content: Of the stage.
        inputs: Contents of the artifacts that it reads, by stage.
        data: The images.
    """
    count = _COUNTERS.get(content["stage"])
    return None if count is None else count(content, inputs, data)


def _prepare_data(content: Content, inputs: Mapping[str, Content], data: DataFacts) -> Work:
    del inputs
    count = data.num_train + data.num_val + data.num_test
    is_generated = content["data"]["format"] == "synthetic"
    disk = prepared_bytes(count, data.mean_px, is_generated=is_generated)
    return Work(count, "images", _times(count, data.mean_px if is_generated else 1.0), (is_generated,), disk)


def _train_classifier(content: Content, inputs: Mapping[str, Content], data: DataFacts) -> Work:
    del inputs
    config = content["config"]
    path = _classifier(config)
    return _training(config, data.num_train - data.num_holdout, path, classifier_bytes(config))


def _train_segmenter(content: Content, inputs: Mapping[str, Content], data: DataFacts) -> Work:
    """The first training, and with ``rounds`` as many more with the labelling of the training images before each."""
    del inputs
    config = content["config"]
    num_samples = data.num_full_masks if config["supervision"] == "full" else data.num_train
    disk = segmenter_bytes(config, data.num_train, data.mean_px)
    first = _training(config, num_samples, _segmenter(config["net"]), disk)
    rounds = config["rounds"]
    if not rounds:
        return first
    labelling = _labelling(config, data)
    cost = None if labelling is None or first.cost is None else (rounds + 1) * first.cost + rounds * labelling
    backend = _backend(config["retraining"]["crf"])
    path = first.path if backend is None else (*first.path, backend)
    return replace(first, count=(rounds + 1) * first.count, cost=cost, path=path)


def _labelling(config: Content, data: DataFacts) -> float | None:
    """Images × the pixels of their views, in units of training: the forward pass is about a third of a step.

    A CRF is left to ``path``, as in make_masks.
    """
    augment = config["augment"]
    short_side_px = augment["crop_px"] if augment["resize"] == "squash" else augment["short_side_px"]
    return _times(data.num_train * _views(config["retraining"]) * _FORWARD_SHARE, data.seen_px(short_side_px))


def _training(config: Content, num_samples: int, path: tuple[object, ...], disk: float | None) -> Work:
    """Steps × batch × crop area."""
    training = TrainingConfig.model_validate(config["training"])
    steps = training.num_steps(num_samples)
    cost = float(steps * training.batch_size * config["augment"]["crop_px"] ** 2)
    return Work(steps, "steps", cost, (*path, training.precision), disk)


def _make_attention(content: Content, inputs: Mapping[str, Content], data: DataFacts) -> Work:
    """Images × the pixels of all their views."""
    config, classifier = content["config"], inputs["train_classifier"]["config"]
    cost = _times(data.num_train * _views(config), data.seen_px(config["short_side_px"]))
    path = _classifier(classifier)
    disk = attention_bytes(config, data.num_train, data.num_labels, data.mean_px)
    if not _keeps_maps(config):
        return Work(0, "images", 1.0, ("no maps",), disk)
    return Work(data.num_train, "images", cost, path, disk)


def _keeps_maps(make_attention: Content) -> bool:
    """Whether the maps are stored; where they are not, make_masks makes them as it goes."""
    return make_attention["keep_maps"]


def _make_masks(content: Content, inputs: Mapping[str, Content], data: DataFacts) -> Work:
    """Images × their pixels; the iterations of a CRF are not counted, since its set-up costs as much."""
    config, attention = content["config"], inputs["make_attention"]["config"]
    path: tuple[object, ...] = (config["refine"], _backend(config["crf"]), config["unary"])
    path = (*path, config["confident"] is not None)
    if not _keeps_maps(attention):
        classifier = _classifier(inputs["train_classifier"]["config"])
        path = (*path, *classifier, _views(attention), attention["short_side_px"])
    pixels = _times(data.num_train, data.mean_px)
    disk = masks_bytes(config, data.num_train, data.mean_px)
    return Work(data.num_train, "images", pixels, path, disk)


def _evaluate(content: Content, inputs: Mapping[str, Content], data: DataFacts) -> Work:
    """Predicted images × the pixels of their views; only scored images are seen at several scales."""
    config, work = content["config"], Work(0, "images", 0.0, (), 0.0)
    if config["segmentation"]:
        work = _segmentation(content, inputs, data)
    localization = config["localization"]
    if localization is None:
        return work
    cost = _times(data.num_val * _views(localization), data.seen_px(localization["short_side_px"]))
    total = None if cost is None or work.cost is None else cost + work.cost
    path = (*work.path, *_classifier(inputs["train_classifier"]["config"]))
    return Work(max(work.count, data.num_val), "images", total, path, work.disk_bytes)


def _segmentation(content: Content, inputs: Mapping[str, Content], data: DataFacts) -> Work:
    config = content["config"]
    count = sum({"val": data.num_val, "test": data.num_test}[split] for split in config["splits"])
    num_scored = data.num_scored if "val" in config["splits"] else 0
    if config["predictions"] != "single":
        num_scored = count  # every image is seen at all scales, scored or not
    views = _views(config) if config["multi_scale"] else 1.0
    cost = _times(count - num_scored + num_scored * views, data.seen_px(config["short_side_px"]))
    net = _segmenter(inputs["train_segmenter"]["config"]["net"])
    path = (*net, _backend(config["crf_config"]), "make_masks" in content["inputs"])
    return Work(count, "images", cost, path, prediction_bytes(count, data.mean_px))


_COUNTERS: Mapping[str, Callable[[Content, Mapping[str, Content], DataFacts], Work]] = {
    "prepare_data": _prepare_data,
    "train_classifier": _train_classifier,
    "make_attention": _make_attention,
    "make_masks": _make_masks,
    "train_segmenter": _train_segmenter,
    "evaluate": _evaluate,
}


def _times(factor: float, pixels: float | None) -> float | None:
    return None if pixels is None else factor * pixels


def _views(config: Content) -> float:
    """Area of all scaled and mirrored views of an image over its own."""
    return sum(scale**2 for scale in config["scales"]) * (2 if config["flip"] else 1)


def _backbone(config: Content) -> tuple[object, ...]:
    return config["name"], config["output_stride"]


def _classifier(config: Content) -> tuple[object, ...]:
    """Network and method."""
    return *_backbone(config["backbone"]), config["head"], config["method"]["name"]


def _segmenter(net: Content) -> tuple[object, ...]:
    if "backbone" in net:
        return net["name"], *_backbone(net["backbone"])
    return net["name"], net["encoder"], net["output_stride"]


def _backend(crf: Content | None) -> str | None:
    """Which CRF runs; None where none does, which is how a key says it."""
    if crf is None:
        return None
    return f"{crf['backend']} at half resolution" if crf["resolution"] == "half" else crf["backend"]
