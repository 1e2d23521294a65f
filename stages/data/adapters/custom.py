"""Anybody's images: a folder of images, ``labels.csv`` and, where there are any, masks.

Reads (below ``root``): the names in the image and mask folders, labels.csv, and the id lists where given.
Opens no image.
"""

from __future__ import annotations

import os
import unicodedata
from collections import Counter
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Literal

from pydantic import Field, field_validator, model_validator

from stages.contracts import BACKGROUND_INDEX, IGNORE_INDEX, IMAGE_SUFFIXES, ClassList, StageConfig
from stages.data.class_names import check_class_names, nearest, odd_names_warnings
from stages.data.joining import Sources, join_sources
from stages.data.names import ImageNames, image_id_of, numbers_as_numbers
from stages.data.readers import (
    LabelLine,
    check_label_lines,
    check_mask_folder,
    file_names,
    match_masks,
    read_id_list,
    read_labels_csv,
)
from stages.data.records import IdList, MaskFolder, Problems, Scan, empty_scan, quoted, some
from stages.data.subsets import hash_share

EVERY_FOLDER = "*"
"""As ``images``: the images lie in sub-folders."""


class CustomConfig(StageConfig):
    """A folder of images with image-level labels in a CSV; any class names."""

    format: Literal["custom"] = "custom"
    root: Path
    """The folder of the data set."""
    classes: tuple[str, ...] | None = Field(default=None, min_length=1, max_length=254)
    """Foreground classes in order: mask value i + 1 is the i-th.  Empty (null) takes the names in the CSV, sorted, 2
    before 10."""
    images: str = Field(default="images", min_length=1)
    """Sub-folder of the images, searched to the bottom; ``.`` for the folder itself, without what is below it.  The
    file name without ending is the image's id.  ``*``: every sub-folder but that of the masks, one per class say;
    ``cat/001.jpg`` is the image ``cat_001``."""
    labels: Path | None = None
    """CSV with ``image,labels``; empty (null) takes labels.csv in ``root``."""
    masks: str | None = "masks"
    """Sub-folder of PNG masks named as the images (0 background, i + 1 the i-th class, 255 ignored); may be absent."""
    train_list: Path | None = None
    """File with one training image per line; give both lists, or neither to split by hash."""
    val_list: Path | None = None
    """File with one validation image per line; these may have no labels and no masks."""
    val_ratio: float = Field(default=0.1, gt=0, lt=1)
    """Without lists: share of the images kept for val, chosen by a hash of the id, and more where a class of two or
    more images would have none there.  Where some images have masks, val is drawn from those."""
    on_bad_image: Literal["fail", "skip"] = "fail"
    """Whether an image that does not decode ends the run or is left out with a warning."""

    @field_validator("classes")
    @classmethod
    def _check_classes(cls, names: tuple[str, ...] | None) -> tuple[str, ...] | None:
        names = names and tuple(unicodedata.normalize("NFC", name) for name in names)
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
    found = _find_images(config, problems)
    known = ImageNames(found.images, found.several, config.root)
    rows = _read_labels(config, known, problems)
    images = found.images
    if not images or not rows:
        return empty_scan(config.root, config.classes or (), problems)
    names = _class_names(config, rows, problems)
    if not names:
        return empty_scan(config.root, (), problems)
    mask_folder = _masks(config, images, problems)
    masks = mask_folder.masks
    lists = _read_lists(config, known, problems) or _hash_lists(config, rows, images, masks)
    lists["train_score"] = IdList("the training images", tuple((0, i) for i in lists["train"].ids if i in masks))
    source = config.labels_path.name
    train = lists["train"].ids
    check_label_lines(rows, train=train, images=images, source=source, folder=config.images, problems=problems)
    if config.classes is None:
        has_words = not any(";" in row.cell for row in rows.values())
        problems.warnings += odd_names_warnings([row.names for row in rows.values()], source, has_words=has_words)
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
        mask_folders=(mask_folder,),
    )
    listing = join_sources(sources, problems)
    unused = _unused_warning(found, {image.id for image in listing.images}, source)
    return Scan(replace(listing, warnings=(*listing.warnings, *unused)), problems)


def _mask_values(num_foreground: int) -> dict[int, int]:
    values = {ClassList.class_index(index): ClassList.class_index(index) for index in range(num_foreground)}
    return {BACKGROUND_INDEX: BACKGROUND_INDEX, **values, IGNORE_INDEX: IGNORE_INDEX}


@dataclass
class _Found:
    """The images of the folder and of those below it; paths are relative to the root."""

    images: dict[str, str] = field(default_factory=dict)
    """Image id to file."""
    several: dict[str, list[str]] = field(default_factory=dict)
    """Ids that files of several sub-folders would have."""
    below: set[str] = field(default_factory=set)
    """Those of ``images`` that lie in sub-folders."""


def _find_images(config: CustomConfig, problems: Problems) -> _Found:
    """All images; a file in the folder itself goes before one of its name in a sub-folder."""
    is_spread = config.images == EVERY_FOLDER
    folder = config.root if is_spread else config.root / config.images
    if not folder.is_dir():
        key = "data.images" if config.root.is_dir() else "data.root"
        problems.add("root", f"{key}: folder {folder} does not exist; correct the path or create it")
        return _Found()
    found = _Found()
    prefix = "" if is_spread or config.images == "." else f"{config.images}/"
    flat = [(image_id_of(name), prefix + name) for name in image_names(folder)]
    for image_id, file in spread_images(folder, config.masks) if is_spread else flat:
        if image_id in found.images:
            known = found.images[image_id]
            text = f"{config.root / file}: {known} gives the same image id '{image_id}'; rename one of the two"
            problems.add("same id", text)
        found.images[image_id] = file
    inner: dict[str, list[str]] = {}
    for place in _sub_folders(folder) if prefix else ():
        for name in image_names(folder / place):
            inner.setdefault(image_id_of(name), []).append(f"{prefix}{place}/{name}")
    for image_id, files in inner.items():
        if image_id not in found.images and len(files) == 1:
            found.images[image_id] = files[0]
            found.below.add(image_id)
        elif image_id not in found.images:
            found.several[image_id] = files
    if not found.images and not found.several:
        text = f"{folder}: there is no image ({', '.join(IMAGE_SUFFIXES)})"
        where = "in its sub-folders" if is_spread else "in it or below" if prefix else "; sub-folders are not searched"
        problems.add("root", f"{text} {where}".replace(" ;", ";"))
    return found


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


def _sub_folders(folder: Path) -> list[str]:
    """Folders below ``folder``, relative to it, each once though links lead there; hidden ones are left out."""
    seen = {folder.resolve()}
    places: list[str] = []
    for path, inner, _ in os.walk(folder, followlinks=True):
        kept: list[str] = []
        for name in sorted(inner):
            real = (Path(path) / name).resolve()
            if not name.startswith(".") and real not in seen:
                seen.add(real)
                kept.append(name)
        inner[:] = kept
        places += [(Path(path) / name).relative_to(folder).as_posix() for name in kept]
    return sorted(places)


def _read_labels(config: CustomConfig, names: ImageNames, problems: Problems) -> dict[str, LabelLine]:
    path = config.labels_path
    if not path.is_file():
        text = f"data.labels: {path} does not exist; write a CSV with the header 'image,labels' and a line per image"
        problems.add("labels", text)
        return {}
    rows = read_labels_csv(path, config.classes or (), path.name, problems, names)
    if rows is not None and not rows and not problems:
        problems.add("empty list", f"{path}: has no line below its header; write a line 'image,labels' per image")
    return rows or {}


def _class_names(config: CustomConfig, rows: Mapping[str, LabelLine], problems: Problems) -> tuple[str, ...]:
    if config.classes is not None:
        return config.classes
    counts = Counter(name for row in rows.values() for name in set(row.names))
    names = tuple(numbers_as_numbers(counts))
    if not names:
        problems.add("labels", f"{config.labels_path}: no image has a label; name the classes of each image")
    if len(names) > 254:
        problems.add("labels", f"{config.labels_path}: {len(names):,} different class names; at most 254 are possible")
        return ()
    if "background" in names:
        text = f"{config.labels_path}: 'background' is no class of yours (mask value 0 is given)"
        problems.add("labels", f"{text}; leave the labels of an image without any class empty")
    counts.pop("background", None)
    check_class_names({name: counts[name] for name in names if name in counts}, config.labels_path.name, problems)
    return names


def _masks(config: CustomConfig, images: Mapping[str, str], problems: Problems) -> MaskFolder:
    """The masks; none where there is no folder of them."""
    if config.masks is None:
        return MaskFolder()
    if config.masks != CustomConfig.model_fields["masks"].default:
        check_mask_folder(config.root, config.masks, "data.masks", problems)
    folder = "." if config.images == EVERY_FOLDER else config.images
    return match_masks(config.root, config.masks, images, folder)


def _read_lists(config: CustomConfig, names: ImageNames, problems: Problems) -> dict[str, IdList] | None:
    """The lists of the config; None when it gives none."""
    if config.train_list is None or config.val_list is None:
        return None
    lists: dict[str, IdList] = {}
    for split, path in (("train", config.train_list), ("val", config.val_list)):
        lists[split] = IdList(path.name, ())
        if path.is_file():
            lists[split] = read_id_list(path, path.name, problems, names) or lists[split]
        else:
            problems.add("missing list", f"data.{split}_list: {path} does not exist; correct the path")
    return lists


def _hash_lists(
    config: CustomConfig, rows: Mapping[str, LabelLine], images: Collection[str], masks: Collection[str]
) -> dict[str, IdList]:
    """Split the labelled images by hash; val out of those with masks where there are any."""
    labelled = [image_id for image_id in rows if image_id in images]
    masked = [image_id for image_id in labelled if image_id in masks]
    classes = {image_id: rows[image_id].names for image_id in labelled}
    is_single = len(masked) == 1 < len(labelled)
    val = set(masked if is_single else hash_share(masked or labelled, config.val_ratio, "val", classes))
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
                text = f"{source} line {row.line}: unknown class {quoted(name)}, {nearest(name, names)}"
                problems.add("unknown class", text)
        labels[image_id] = tuple(sorted({names.index(name) for name in row.names if name in names}))
    return labels


def _unused_warning(found: _Found, used: Collection[str], source: str) -> list[str]:
    """Images that stand in no list (or, without lists, have no labels) are not used.

    Sub-folders of which nothing is used hold something else.
    """
    unused = set(found.images) - set(used)
    if found.below.isdisjoint(used):
        unused -= found.below
    text = f"{len(unused):,} images of the folder stand neither in a list nor in {source} and are not used"
    return [f"{text}: {some(sorted(unused))}"] if unused else []
