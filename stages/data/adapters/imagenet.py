"""Images in ImageNet's layout: a folder for each training class; val with a label list and, to localise, boxes.

Reads (below ``root``): the names in ``train/<class>/`` and in ``val/`` or ``val/<class>/``; val's labels from lines
``path,class``, its boxes from lines ``path,x0,y0,x1,y1`` or from a folder of ILSVRC's XML annotations.  Opens no image.
Source: Russakovsky et al., "ImageNet Large Scale Visual Recognition Challenge", IJCV 2015; the lists are
wsolevaluation's class_labels.txt and localization.txt.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Literal

from pydantic import Field, field_validator

from stages.contracts import IMAGE_SUFFIXES, Box, StageConfig
from stages.data.boxes import read_box_annotation, read_box_list
from stages.data.class_names import check_class_names, nearest
from stages.data.joining import Sources, join_sources
from stages.data.names import ImageNames, image_id_of, odd_character
from stages.data.readers import file_names, read_text
from stages.data.records import IdList, Problems, Scan, empty_scan, quoted, some

_LABELS, _BOXES = "val_labels.txt", "localization.txt"


class ImageNetConfig(StageConfig):
    """Single-label images in class folders, without masks."""

    format: Literal["imagenet"] = "imagenet"
    root: Path
    """The folder that holds ``train`` and ``val``."""
    classes: tuple[str, ...] | None = Field(default=None, min_length=1, max_length=65_535)
    """Class folders in the order of the label indices (others are left out); empty (null) takes all, sorted."""
    train: str = Field(default="train", min_length=1)
    """Sub-folder with one folder of images for each class."""
    val: str = Field(default="val", min_length=1)
    """Sub-folder of the images that are scored: in class folders, or all in one."""
    val_labels: Path | None = None
    """Lines ``path,class``, a class being a folder of ``train`` or its place among them from 0; empty (null) takes
    val_labels.txt in ``root`` where there is one.  Not needed with class folders or XML annotations."""
    val_boxes: Path | None = None
    """File with lines ``path,x0,y0,x1,y1``, or a folder of ILSVRC's XML annotations; empty (null) takes
    localization.txt in ``root`` where there is one."""
    on_bad_image: Literal["fail", "skip"] = "fail"
    """Whether an image that does not decode ends the run or is left out with a warning."""

    @field_validator("classes")
    @classmethod
    def _check_classes(cls, names: tuple[str, ...] | None) -> tuple[str, ...] | None:
        if names and len(set(names)) < len(names):
            raise ValueError("a class is named twice; name each class once")
        return names

    def scan(self) -> Scan:
        """List the data set and everything that is wrong with its lists and labels; never raises for a defect."""
        return _scan(self)


@dataclass
class _Found:
    """Images by id, collected over folders."""

    root: Path
    problems: Problems
    images: dict[str, str] = field(default_factory=dict)
    """Image id to file, relative to the root."""
    labels: dict[str, tuple[int, ...]] = field(default_factory=dict)
    left_out: set[str] = field(default_factory=set)
    """Images of val whose class is known and not among those of the config."""

    def add_folder(self, folder: str, label: int | None) -> list[str]:
        """Take the images of a folder below the root; returns their ids, sorted."""
        ids = []
        for name in sorted(file_names(self.root / folder)):
            if Path(name).suffix.lower() not in IMAGE_SUFFIXES or name.startswith("."):
                continue
            image_id, path = image_id_of(name), f"{folder}/{name}"
            odd = odd_character(image_id)
            if odd is not None:
                self.problems.add("bad id", f"{path}: cannot be an image id: {odd}; rename the file")
                continue
            if image_id in self.images:
                text = f"{path}: {self.images[image_id]} gives the same image id '{image_id}'; rename one of the two"
                self.problems.add("same id", text)
                continue
            self.images[image_id] = path
            ids.append(image_id)
            if label is not None:
                self.labels[image_id] = (label,)
        return ids


def _scan(config: ImageNetConfig) -> Scan:
    """List the images and everything that is wrong with them, without opening one."""
    problems = Problems()
    names = _class_names(config, problems)
    if not names:
        return empty_scan(config.root, (), problems)
    found = _Found(config.root, problems)
    train: list[str] = []
    for label, name in enumerate(names):
        ids = found.add_folder(f"{config.train}/{name}", label)
        train += ids
        if not ids:
            problems.add("empty class", f"{config.root / config.train / name}: there is no image; remove the class")
    val = _val_images(config, names, found)
    boxes = _boxes(config, names, val, found)  # first: annotations may give labels
    val = _labelled(config, names, val, found)
    remedy = f"{config.root / config.val} has no image with a label of the classes"
    sources = Sources(
        root=config.root,
        class_names=names,
        mask_values={},
        lists={
            "train": IdList(config.train, tuple(enumerate(train, start=1)), f"put images into {config.train}/<class>/"),
            "val": IdList(config.val, tuple(enumerate(val, start=1)), remedy),
        },
        labels=found.labels,
        images=found.images,
        masks={},
        full_masks={},
        image_folder=config.val,
        mask_folder="(format imagenet has no masks)",
        boxes={i: tuple((found.labels[i][0], box) for box in boxes[i]) for i in val if i in boxes},
    )
    listing = join_sources(sources, problems)
    warnings = tuple(text for text in listing.warnings if boxes or "mask" not in text)
    if not boxes and not problems:
        text = f"{config.root}: there is no {_BOXES} and data.val_boxes is not set: boxes of val are not known"
        warnings = (*warnings, text)
    return Scan(replace(listing, warnings=warnings, is_single_label=True), problems)


def _class_names(config: ImageNetConfig, problems: Problems) -> tuple[str, ...]:
    folder = config.root / config.train
    if not folder.is_dir():
        key = "data.train" if config.root.is_dir() else "data.root"
        problems.add("root", f"{key}: folder {folder} does not exist; correct the path")
        return ()
    there = _class_folders(folder)
    if not there:
        problems.add("root", f"{folder}: there is no class folder; put the images of each class into its own folder")
    if config.classes is None:
        counts = {name: sum(1 for _ in (folder / name).iterdir()) for name in there}
        check_class_names(counts, str(folder), problems, remedy="take the folder out of train")
        return tuple(there)
    known = ImageNames(dict.fromkeys(there, ""))
    for name in config.classes:
        if known.get(name) is None:
            text = f"data.classes: {folder} has no folder {quoted(name)}, {nearest(name, there[:50])}"
            problems.add("unknown class", text)
    return tuple(there_name for name in config.classes if (there_name := known.get(name)) is not None)


def _class_folders(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir() if path.is_dir() and not path.name.startswith("."))


def _val_images(config: ImageNetConfig, names: Sequence[str], found: _Found) -> list[str]:
    """Ids of val, with the labels that class folders give."""
    folder = config.root / config.val
    if not folder.is_dir():
        found.problems.add("root", f"data.val: folder {folder} does not exist; correct the path")
        return []
    ids = found.add_folder(config.val, None)
    for label, name in enumerate(names):
        ids += found.add_folder(f"{config.val}/{name}", label)
    return ids


# ---------------------------------------------------------------------------------------------------------------------
# Labels and boxes of val
# ---------------------------------------------------------------------------------------------------------------------


def _labelled(config: ImageNetConfig, names: Sequence[str], val: Sequence[str], found: _Found) -> list[str]:
    """The images of val that have a label of the classes; an image without any label is a problem."""
    path = config.val_labels or config.root / _LABELS
    if path.is_file():
        _read_labels(path, config, names, set(val), found)
    elif config.val_labels is not None:
        found.problems.add("labels", f"data.val_labels: {path} does not exist; correct the path")
        return []
    missing = [image_id for image_id in val if image_id not in found.labels and image_id not in found.left_out]
    if missing:
        text = f"{len(missing):,} of {len(val):,} images of {config.val} have no label: {some(missing)}"
        remedy = f"write lines 'path,class' to {path}, sort them into class folders, or name XML annotations"
        found.problems.add("no labels", f"{text}; {remedy} (data.val_boxes)")
    return [image_id for image_id in val if image_id in found.labels]


def _read_labels(path: Path, config: ImageNetConfig, names: Sequence[str], val: set[str], found: _Found) -> None:
    """Take the labels of a list."""
    folders = _class_folders(config.root / config.train)
    known, classes = ImageNames(dict.fromkeys(val, "")), ImageNames(dict.fromkeys(folders, ""))
    lines: dict[str, int] = {}
    read: dict[str, tuple[str, str]] = {}
    for number, line in enumerate(read_text(path, path.name, found.problems) or [], start=1):
        where = f"{path.name} line {number}"
        if not line.strip():
            continue
        name, _, label = (part.strip() for part in line.partition(","))
        try:
            image_id = known.find(name.rsplit("/", 1)[-1])
            if not label:
                raise ValueError("no class")  # noqa: TRY301 - one message for all that is wrong
        except ValueError as error:
            text = f"{where}: expected 'path,class', found {quoted(line.strip())} ({error})"
            found.problems.add("bad line", f"{text}; correct the line")
            continue
        if image_id in lines:
            text = f"{where}: image {quoted(image_id)} has its label on line {lines[image_id]} already"
            found.problems.add("duplicate", f"{text}; remove one of the two")
        elif image_id in val:
            read[image_id] = where, label
        elif config.classes is None:
            text = f"{where}: image {quoted(image_id)} has no file in {config.val}"
            found.problems.add("label without image", f"{text}; remove the line or add the image")
        lines.setdefault(image_id, number)
    places = {label for _, label in read.values() if classes.get(label) is None and _is_place(label, folders)}
    numbers = {label for _, label in read.values() if label in folders and _is_place(label, folders)}
    if places and numbers:
        text = f"{path.name}: {quoted(min(numbers))} is a folder of {config.train} and {quoted(min(places))} is none"
        found.problems.add("numbers", f"{text}: are they names, or positions from 0?  Write the folders' names")
    for image_id, (where, label) in read.items():
        name = folders[int(label)] if label in places else classes.get(label) or label
        _take_label(image_id, name, where, config, names, found)


def _is_place(label: str, folders: Sequence[str]) -> bool:
    """Whether ``label`` is a place among the folders, counted from 0."""
    return label.isdecimal() and len(label) < 10 and int(label) < len(folders)


def _take_label(
    image_id: str, name: str, where: str, config: ImageNetConfig, names: Sequence[str], found: _Found
) -> None:
    if name in names:
        found.labels[image_id] = (names.index(name),)
    elif config.classes is not None:
        found.left_out.add(image_id)
    else:
        text = f"{where}: unknown class {quoted(name)}; expected a folder of {config.train} or 0 … {len(names) - 1}"
        found.problems.add("unknown class", text)


def _boxes(
    config: ImageNetConfig, names: Sequence[str], val: Sequence[str], found: _Found
) -> Mapping[str, Sequence[Box]]:
    """Boxes by image id; XML annotations also give the labels of images that no class folder gives."""
    path = config.val_boxes or config.root / _BOXES
    if path.is_dir():
        return _read_annotations(path, config, names, val, found)
    if not path.is_file():
        if config.val_boxes is not None:
            found.problems.add("boxes", f"data.val_boxes: {path} does not exist; correct the path")
        return {}
    boxes: dict[str, list[Box]] = {}
    known = set(val)
    for line in read_box_list(path, path.name, found.problems, ImageNames(dict.fromkeys(val, ""))):
        if line.id in known:
            boxes.setdefault(line.id, []).append(line.box)
        else:
            text = f"{path.name} line {line.line}: image {quoted(line.id)} has no file in {config.val}"
            found.problems.add("box without image", f"{text}; remove the line or add the image")
    return boxes


def _read_annotations(
    folder: Path, config: ImageNetConfig, names: Sequence[str], val: Sequence[str], found: _Found
) -> dict[str, list[Box]]:
    """Boxes of the objects of each image's class: that of its folder, else that of its first object."""
    there = ImageNames({name[:-4]: name for name in file_names(folder) if name.endswith(".xml")})
    boxes: dict[str, list[Box]] = {}
    for image_id in val:
        stem = there.get(image_id)
        if stem is None:
            continue  # the join says which images have no box
        objects = read_box_annotation(folder / f"{stem}.xml", found.problems)
        if objects and image_id not in found.labels:
            _take_label(image_id, objects[0][0], f"{folder / stem}.xml", config, names, found)
        own = [names[label] for label in found.labels.get(image_id, ())]
        boxes[image_id] = [box for name, box in objects if name in own]
    return {image_id: own for image_id, own in boxes.items() if own}
