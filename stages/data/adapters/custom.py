"""Anybody's images: a folder of images, ``labels.csv`` and, where there are any, masks.

Reads (below ``root``): the names in the image and mask folders, labels.csv, and the id lists where given.
Opens no image.
"""

from __future__ import annotations

import difflib
from collections import Counter
from collections.abc import Collection, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Literal

from pydantic import Field, field_validator, model_validator

from stages.contracts import BACKGROUND_INDEX, IGNORE_INDEX, ClassList, StageConfig
from stages.data.joining import Sources, join_sources
from stages.data.readers import (
    LabelLine,
    check_label_lines,
    check_mask_folder,
    file_names,
    image_id_of,
    nearest,
    read_id_list,
    read_labels_csv,
)
from stages.data.records import IMAGE_SUFFIXES, IdList, Problems, Scan, empty_scan, some
from stages.data.subsets import hash_share

EVERY_FOLDER = "*"
"""As ``images``: the images lie in sub-folders."""
FREQUENT_RATIO = 10
"""A name is suspected of being a misspelling of one that stands on this many times as many lines."""


class CustomConfig(StageConfig):
    """A folder of images with image-level labels in a CSV; any class names."""

    format: Literal["custom"] = "custom"
    root: Path
    """The folder of the data set."""
    classes: tuple[str, ...] | None = Field(default=None, min_length=1, max_length=254)
    """Foreground classes in order: mask value i + 1 is the i-th.  Empty (null) takes the names in the CSV, sorted."""
    images: str = Field(default="images", min_length=1)
    """Sub-folder of the images; ``.`` for the folder itself.  The file name without ending is the image's id.
    ``*``: every sub-folder but that of the masks, one per class say; ``cat/001.jpg`` is the image ``cat_001``."""
    labels: Path | None = None
    """CSV with ``image,labels``; empty (null) takes labels.csv in ``root``."""
    masks: str | None = "masks"
    """Sub-folder of PNG masks named as the images (0 background, i + 1 the i-th class, 255 ignored); may be absent."""
    train_list: Path | None = None
    """File with one training image per line; give both lists, or neither to split by hash."""
    val_list: Path | None = None
    """File with one validation image per line; these may have no labels and no masks."""
    val_ratio: float = Field(default=0.1, gt=0, lt=1)
    """Without lists: share of the images kept for val, chosen by a hash of the id.  Where some images have masks,
    val is drawn from those."""
    on_bad_image: Literal["fail", "skip"] = "fail"
    """Whether an image that does not decode ends the run or is left out with a warning."""

    @field_validator("classes")
    @classmethod
    def _check_classes(cls, names: tuple[str, ...] | None) -> tuple[str, ...] | None:
        if names and len(set(names)) < len(names):
            raise ValueError("a class is named twice; name each class once")
        if names and ("background" in names or not all(name.strip() == name != "" for name in names)):
            raise ValueError("class names must not be empty, padded with spaces, or 'background' (value 0 is given)")
        return names

    @model_validator(mode="after")
    def _check_lists(self) -> CustomConfig:
        if (self.train_list is None) != (self.val_list is None):
            raise ValueError("give both train_list and val_list, or neither to split by hash (val_ratio)")
        return self

    @property
    def labels_path(self) -> Path:
        """The CSV that is read."""
        return self.root / "labels.csv" if self.labels is None else self.labels

    def scan(self) -> Scan:
        """List the data set and everything that is wrong with its lists and labels; never raises for a defect."""
        return _scan(self)


def _scan(config: CustomConfig) -> Scan:
    """List a custom data set and everything that is wrong with it, without opening an image."""
    problems = Problems()
    images = _images(config, problems)
    rows = _read_labels(config, problems)
    if not images or not rows:
        return empty_scan(config.root, config.classes or (), problems)
    names = _class_names(config, rows, problems)
    if not names:
        return empty_scan(config.root, (), problems)
    masks = _masks(config, images, problems)
    lists = _read_lists(config, problems) or _hash_lists(config, rows, images, masks)
    lists["train_score"] = IdList("the training images", tuple((0, i) for i in lists["train"].ids if i in masks))
    source = config.labels_path.name
    train = lists["train"].ids
    check_label_lines(rows, train=train, images=images, source=source, folder=config.images, problems=problems)
    sources = Sources(
        root=config.root,
        class_names=names,
        mask_values=_mask_values(len(names)),
        lists=lists,
        labels=_label_indices(names, rows, source, problems),
        images=images,
        masks=masks,
        full_masks={},
        image_folder=config.images,
        mask_folder=config.masks or "masks (data.masks is null)",
    )
    listing = join_sources(sources, problems)
    used = {image.id for image in listing.images}
    warnings = (*listing.warnings, *_unused_warning(images, used, source), *_misspelt_warning(config, rows, source))
    return Scan(replace(listing, warnings=warnings), problems)


def _mask_values(num_foreground: int) -> dict[int, int]:
    values = {ClassList.class_index(index): ClassList.class_index(index) for index in range(num_foreground)}
    return {BACKGROUND_INDEX: BACKGROUND_INDEX, **values, IGNORE_INDEX: IGNORE_INDEX}


def _images(config: CustomConfig, problems: Problems) -> dict[str, str]:
    """Image id to file, relative to the root."""
    is_spread = config.images == EVERY_FOLDER
    folder = config.root if is_spread else config.root / config.images
    if not folder.is_dir():
        key = "data.images" if config.root.is_dir() else "data.root"
        problems.add("root", f"{key}: folder {folder} does not exist; correct the path or create it")
        return {}
    images: dict[str, str] = {}
    for image_id, name in spread_images(folder, config.masks) if is_spread else _flat_images(config):
        if image_id in images:
            text = (
                f"{config.root / name}: {images[image_id]} gives the same image id '{image_id}'; rename one of the two"
            )
            problems.add("same id", text)
        images[image_id] = name
    if not images:
        searched = "its sub-folders have no image" if is_spread else "there is no image"
        left_out = "" if is_spread else "; sub-folders are not searched"
        problems.add("root", f"{folder}: {searched} ({', '.join(IMAGE_SUFFIXES)}){left_out}")
    return images


def _flat_images(config: CustomConfig) -> list[tuple[str, str]]:
    prefix = "" if config.images == "." else f"{config.images}/"
    return [(image_id_of(name), prefix + name) for name in image_names(config.root / config.images)]


def spread_images(root: Path, masks: str | None = "masks") -> list[tuple[str, str]]:
    """(id, file relative to ``root``) of the images in the sub-folders of ``root`` but hidden ones and ``masks``."""
    folders = sorted(path.name for path in root.iterdir() if path.is_dir() and not path.name.startswith("."))
    return [
        (f"{folder}_{image_id_of(name)}", f"{folder}/{name}")
        for folder in folders
        if folder != masks
        for name in image_names(root / folder)
    ]


def image_names(folder: Path) -> list[str]:
    """Names of the images that lie in ``folder`` itself, sorted."""
    names = sorted(file_names(folder))
    return [name for name in names if Path(name).suffix.lower() in IMAGE_SUFFIXES and not name.startswith(".")]


def _read_labels(config: CustomConfig, problems: Problems) -> dict[str, LabelLine]:
    path = config.labels_path
    if not path.is_file():
        text = f"data.labels: {path} does not exist; write a CSV with the header 'image,labels' and a line per image"
        problems.add("labels", text)
        return {}
    rows = read_labels_csv(path, config.classes or (), path.name, problems)
    if rows is not None and not rows:
        problems.add("empty list", f"{path}: has no line below its header; write a line 'image,labels' per image")
    return rows or {}


def _class_names(config: CustomConfig, rows: Mapping[str, LabelLine], problems: Problems) -> tuple[str, ...]:
    if config.classes is not None:
        return config.classes
    names = tuple(sorted({name for row in rows.values() for name in row.names}))
    if not names:
        problems.add("labels", f"{config.labels_path}: no image has a label; name the classes of each image")
    if len(names) > 254:
        problems.add("labels", f"{config.labels_path}: {len(names):,} different class names; at most 254 are possible")
        return ()
    if "background" in names:
        text = f"{config.labels_path}: 'background' is no class of yours (mask value 0 is given)"
        problems.add("labels", f"{text}; leave the labels of an image without any class empty")
    return names


def _misspelt_warning(config: CustomConfig, rows: Mapping[str, LabelLine], source: str) -> tuple[str, ...]:
    """Rare names that nearly are a frequent one: where the CSV makes the classes, a typo makes one too."""
    if config.classes is not None:
        return ()
    counts = Counter(name for row in rows.values() for name in row.names)
    odd = []
    for name, count in sorted(counts.items()):
        frequent = [other for other in counts if counts[other] >= FREQUENT_RATIO * count]
        close = difflib.get_close_matches(name, frequent, n=1, cutoff=0.75)
        if close:
            odd.append(f"'{name}' ({count:,}) beside '{close[0]}' ({counts[close[0]]:,})")
    if not odd:
        return ()
    return (f"{source}: misspelt? {', '.join(odd)}; each is a class of its own: correct the CSV, or set data.classes",)


def _masks(config: CustomConfig, images: Collection[str], problems: Problems) -> dict[str, str]:
    """Image id to mask, relative to the root; none where there is no folder of masks."""
    if config.masks is None:
        return {}
    if config.masks != CustomConfig.model_fields["masks"].default:
        check_mask_folder(config.root, config.masks, "data.masks", problems)
    names = sorted(name for name in file_names(config.root / config.masks) if name.lower().endswith(".png"))
    masks = {name[:-4]: f"{config.masks}/{name}" for name in names if name[:-4] in images}
    if names and not masks:
        example = sorted(images)[0]
        text = f"{config.root / config.masks}: none of its {len(names):,} masks is named as an image"
        problems.add("mask names", f"{text} (found {names[0]}, expected e.g. {example}.png); rename the masks")
    return masks


def _read_lists(config: CustomConfig, problems: Problems) -> dict[str, IdList] | None:
    """The lists of the config; None when it gives none."""
    if config.train_list is None or config.val_list is None:
        return None
    lists: dict[str, IdList] = {}
    for split, path in (("train", config.train_list), ("val", config.val_list)):
        lists[split] = IdList(path.name, ())
        if path.is_file():
            lists[split] = read_id_list(path, path.name, problems) or lists[split]
        else:
            problems.add("missing list", f"data.{split}_list: {path} does not exist; correct the path")
    return lists


def _hash_lists(
    config: CustomConfig, rows: Mapping[str, LabelLine], images: Collection[str], masks: Collection[str]
) -> dict[str, IdList]:
    """Split the labelled images by hash; val out of those with masks where there are any."""
    labelled = [image_id for image_id in rows if image_id in images]
    masked = [image_id for image_id in labelled if image_id in masks]
    val = set(masked if len(masked) == 1 < len(labelled) else hash_share(masked or labelled, config.val_ratio, "val"))
    remedy = "label at least two images of the folder, or give data.train_list and data.val_list"
    source = f"split of {config.labels_path.name}"
    return {
        "train": IdList(source, tuple((rows[i].line, i) for i in labelled if i not in val), remedy),
        "val": IdList(source, tuple((rows[i].line, i) for i in labelled if i in val), remedy),
    }


def _label_indices(
    names: tuple[str, ...], rows: Mapping[str, LabelLine], source: str, problems: Problems
) -> dict[str, tuple[int, ...]]:
    labels: dict[str, tuple[int, ...]] = {}
    for image_id, row in rows.items():
        for name in row.names:
            if name not in names:
                text = f"{source} line {row.line}: unknown class '{name}', {nearest(name, names)}"
                problems.add("unknown class", text)
        labels[image_id] = tuple(sorted({names.index(name) for name in row.names if name in names}))
    return labels


def _unused_warning(images: Collection[str], used: Collection[str], source: str) -> list[str]:
    """Images of the folder that stand in no list (or, without lists, have no labels) are not used."""
    unused = sorted(set(images) - set(used))
    text = f"{len(unused):,} images of the folder stand neither in a list nor in {source} and are not used"
    return [f"{text}: {some(unused)}"] if unused else []
