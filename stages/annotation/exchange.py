"""Hand masks to an annotation tool, and take corrected ones back.

Reads: PNG masks of class indices, the heads of images; what a tool wrote.  Writes: the files of one format; or
``<id>.png`` masks of class indices (palette PNG in VOC's colours, 255 = unsure).
Shapes: H W image pixels.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Literal, Protocol

import numpy as np
from numpy.typing import NDArray

from stages.annotation import coco, cvat, labelstudio, voc
from stages.annotation.files import some_problems
from stages.annotation.shapes import (
    BACKGROUND,
    UNSURE,
    AnnotatedImage,
    Annotations,
    Region,
    ShapeKind,
    find_regions,
    names_by_value,
    values_by_name,
)
from stages.contracts import (
    BACKGROUND_INDEX,
    IGNORE_INDEX,
    ClassList,
    ImageRecord,
    Progress,
    SilentProgress,
    encode_index_mask,
    read_image_size,
    read_index_mask,
    write_atomic,
)
from stages.data.pictures import find_pictures
from stages.errors import ConfigError, DataError, InputError

FormatName = Literal["coco", "voc", "labelstudio", "cvat"]


class _Format(Protocol):
    """What the module of a format offers."""

    def write(self, images: Iterable[tuple[ImageRecord, list[Region]]], classes: ClassList) -> dict[str, bytes]:
        """The files' bytes by name."""
        ...

    def read(self, source: Path, classes: ClassList) -> Annotations:
        """What such a file, folder or zip says."""
        ...


FORMATS: Mapping[FormatName, _Format] = {"coco": coco, "voc": voc, "labelstudio": labelstudio, "cvat": cvat}


# ---------------------------------------------------------------------------------------------------------------------
# Images and classes
# ---------------------------------------------------------------------------------------------------------------------


def list_images(folder: Path) -> tuple[ImageRecord, ...]:
    """The images below a folder by their path without suffix, as ``wsss predict`` names its masks; sizes upright.

    Raises:
        InputError: there is no folder or no image in it.
        DataError: files that are no images; all of them are named.
    """
    if not folder.is_dir():
        raise InputError(f"{folder}: expected the folder of the images; there is none")
    records: list[ImageRecord] = []
    found = find_pictures([str(folder)], folder / "annotations")
    problems = list(found.left_out)
    for picture in found.pictures:
        try:
            size = read_image_size(picture.path)
        except DataError as error:
            problems.append(error.message)
            continue
        name = picture.path.relative_to(folder).as_posix()
        records.append(ImageRecord(id=picture.name, image=name, size=size))
    if problems:
        raise DataError(f"{len(problems)} images of {folder} cannot be read", some_problems(problems))
    return tuple(records)


def check_class_names(names: Sequence[str]) -> ClassList:
    """The class list of these names.

    Raises:
        ConfigError: a name is empty, double, or has a meaning of its own.
    """
    problems = [f"'{name}' is named twice" for name in dict.fromkeys(names) if names.count(name) > 1]
    problems += [f"'{name}' is no name of a class" for name in names if name.strip() != name or not name]
    problems += [
        f"'{name}' stands for mask value {value}; give the class another name"
        for name, value in ((BACKGROUND, BACKGROUND_INDEX), (UNSURE, IGNORE_INDEX))
        if name in names
    ]
    if problems:
        raise ConfigError("the class list cannot be written for an annotation tool", problems)
    return ClassList(names=tuple(names))


# ---------------------------------------------------------------------------------------------------------------------
# Export
# ---------------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Exported:
    """What was written."""

    num_images: int
    num_objects: int
    files: tuple[str, ...]
    """Paths below the output folder that are to be handed on (of masks, their folder)."""
    image_folder: Path | None
    """The deepest folder that holds all of the images, where it is known where they lie."""


def find_masks(folder: Path) -> dict[str, Path]:
    """The PNG masks below a folder by their path without suffix.

    Raises:
        InputError: there is none.
    """
    if not folder.is_dir():
        raise InputError(f"{folder}: expected a folder of masks; there is none")
    found = {path.relative_to(folder).with_suffix("").as_posix(): path for path in sorted(folder.rglob("*.png"))}
    if not found:
        raise InputError(f"{folder}: expected masks of class indices as <image>.png, found none")
    return found


def export_masks(
    masks: Mapping[str, Path],
    images: Sequence[ImageRecord],
    classes: ClassList,
    out: Path,
    *,
    format: FormatName,
    shapes: ShapeKind = "masks",
    root: Path | None = None,
    progress: Progress | None = None,
) -> Exported:
    """Write masks as annotations for a person to correct.

    Args:
        masks: Image id to its PNG of class indices.
        images: Where each id's image is (for the tool) and its size; more than there are masks are fine.
        classes: The classes in the order of their indices.
        out: A new or empty folder.
        format: Of which tool.
        shapes: Exact masks, one a class; or polygons, one an object, which cover it with an IoU of 0.97 or more.
        root: The folder that the paths of ``images`` are relative to.  Label Studio's addresses begin with the name of
            the images' folder then: it serves what is in a folder *below* the one that it is started with.
        progress: Hears of every image.

    Raises:
        InputError: ``out`` is in use; pycocotools is missing; voc is asked for polygons.
        ConfigError: a class has a name that the tool could not tell from background or unsure pixels.
        DataError: with every problem: a mask without an image, of another size, with values of no class.  Nothing is
            written.
    """
    classes = check_class_names(classes.names)
    if format == "voc" and shapes == "polygons":
        raise InputError("--format voc holds masks; leave out --shapes polygons, or take another format")
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise InputError(f"{out}: is in use; name a new or an empty folder")
    known = {record.id: record for record in images}
    problems = [f"{path}: there is no image '{image_id}'" for image_id, path in masks.items() if image_id not in known]
    progress, names, num_objects = progress or SilentProgress(), names_by_value(classes), 0
    chosen = [known[image_id] for image_id in masks if image_id in known]
    shared = os.path.commonpath([os.path.dirname(record.image) for record in chosen]) if chosen else ""  # noqa: PTH120 - texts with / on every system
    image_folder = None if root is None else (root / shared).resolve()
    begin = "" if image_folder is None or format != "labelstudio" else f"{image_folder.name}/"
    cut = len(shared) + 1 if shared else 0
    wanted = [record.model_copy(update={"image": begin + record.image[cut:]}) for record in chosen]

    def drawn() -> Iterator[tuple[ImageRecord, list[Region]]]:
        nonlocal num_objects
        for done, record in enumerate(wanted, start=1):
            try:
                mask = _read_mask(masks[record.id], record, names)
            except DataError as error:
                problems.append(error.message)
                continue
            regions = find_regions(mask, names, shapes)
            num_objects += len(regions)
            yield record, regions
            progress.step("export masks", done, len(wanted))

    files = FORMATS[format].write(drawn(), classes)
    if problems:
        raise DataError(
            f"{len(problems)} of {len(masks)} masks do not fit; nothing was written", some_problems(problems)
        )
    for name, data in files.items():
        write_atomic(out / name, data)
    names_of_files = tuple(dict.fromkeys(name.partition("/")[0] for name in files))
    return Exported(len(wanted), num_objects, names_of_files, image_folder)


def _read_mask(path: Path, record: ImageRecord, names: Mapping[int, str]) -> NDArray[np.uint8]:
    mask = read_index_mask(path)
    if mask.shape != record.size:
        raise DataError(f"{path}: expected {_text(record.size)} pixels as its image, found {_text(mask.shape)}")
    strange = [value for value in np.unique(mask).tolist() if value != BACKGROUND_INDEX and value not in names]
    if strange:
        raise DataError(f"{path}: expected values 0 … {len(names) - 1} and 255, found {strange[:5]}; see --classes")
    return mask


def _text(size: tuple[int, ...]) -> str:
    return " × ".join(map(str, size))


# ---------------------------------------------------------------------------------------------------------------------
# Import
# ---------------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Imported:
    """Corrected masks, read and checked; nothing is written yet."""

    masks: Mapping[str, bytes]
    """Image id to its PNG of class indices."""
    empty: tuple[str, ...]
    """Images in which nothing is drawn: they are background."""
    num_open: int
    """Images that nobody has handed in yet."""
    strange: Mapping[str, tuple[str, ...]]
    """Image id to the classes that are drawn in it and that it is not labelled with, where labels are known."""

    def write(self, out: Path, *, force: bool = False) -> None:
        """Write every mask as ``out/<id>.png``.

        Raises:
            InputError: one is there already, and ``force`` is not given; nothing is written then.
        """
        there = [image_id for image_id in self.masks if (out / f"{image_id}.png").exists()]
        if there and not force:
            raise InputError(
                f"{out}: has masks of {len(there)} of these {len(self.masks)} images; choose another --out, or replace "
                "them with --force",
                some_problems([f"{image_id}.png" for image_id in there]),
            )
        for image_id, data in self.masks.items():
            write_atomic(out / f"{image_id}.png", data)


def import_masks(
    source: Path,
    images: Sequence[ImageRecord],
    classes: ClassList,
    *,
    format: FormatName,
    progress: Progress | None = None,
) -> Imported:
    """Read corrected annotations as masks of class indices.

    Shapes that overlap are painted in the order of the file (CVAT: of ``z_order``).  ``unsure`` becomes 255,
    ``background`` 0, as does everything that nobody drew.

    Args:
        source: A file, a folder, or a zip of the tool.
        images: The images that it may be about, with their sizes and, where they are known, their labels.
        classes: The classes in the order of their indices.
        format: Of which tool.
        progress: Hears of every image.

    Raises:
        InputError: there is no such file, or no image in it; pycocotools is missing.
        DataError: with every problem: other classes, an image that is unknown, twice there or of another size, shapes
            that are damaged.
    """
    classes, progress = check_class_names(classes.names), progress or SilentProgress()
    found = FORMATS[format].read(source, classes)
    known = {record.id: record for record in images}
    problems = _class_problems(found.classes, classes)
    masks: dict[str, bytes] = {}
    empty: list[str] = []
    strange: dict[str, tuple[str, ...]] = {}
    for done, image in enumerate(found.images, start=1):
        image_id = _match(image.file, known)
        if image_id is None or image_id in masks:
            what = "is of no image of the data set" if image_id is None else "is there twice; keep one of the two"
            problems.append(f"{image.file}: {what}")
            continue
        mask = _paint(image, known[image_id], classes, problems)
        masks[image_id] = encode_index_mask(mask)
        if not mask.any():
            empty.append(image_id)
        if unlabelled := _unlabelled(mask, known[image_id], classes):
            strange[image_id] = unlabelled
        progress.step("import masks", done, len(found.images))
    if problems:
        unique = list(dict.fromkeys(problems))
        raise DataError(f"{source}: does not fit the data set; nothing was written", some_problems(unique))
    if not masks:
        waiting = f"; {found.num_open} wait for somebody to submit them" if found.num_open else ""
        raise InputError(f"{source}: has no annotated image{waiting}")
    return Imported(masks, tuple(empty), found.num_open, strange)


def _class_problems(found: Sequence[str] | None, classes: ClassList) -> list[str]:
    """What is wrong with the classes that a file declares; a missing one could not be drawn by anybody."""
    if found is None:
        return []
    declared = [name for name in found if name not in (BACKGROUND, UNSURE)]
    unknown = [name for name in declared if name not in classes.names]
    missing = [name for name in classes.names if name not in declared]
    expected = f"expected the classes {', '.join(classes.names)}"
    problems = [f"{expected}; the file has {', '.join(unknown)}, which are none of them"] if unknown else []
    return problems + ([f"{expected}; the file lacks {', '.join(missing)}"] if missing else [])


def _match(file: str, known: Mapping[str, ImageRecord]) -> str | None:
    """The image that a tool means: its path, or the end of it, with or without the suffix."""
    parts = PurePosixPath(file).parts
    for start in range(len(parts)):
        path = PurePosixPath(*parts[start:])
        for name in (path.as_posix(), path.with_suffix("").as_posix()):
            if name in known:
                return name
    return None


def _paint(image: AnnotatedImage, record: ImageRecord, classes: ClassList, problems: list[str]) -> NDArray[np.uint8]:
    """The mask (H, W) of what was drawn; what is wrong is added to ``problems``."""
    mask = np.zeros(record.size, dtype=np.uint8)
    if image.size is not None and image.size != record.size:
        problems.append(f"{image.file}: expected {_text(record.size)} pixels as its image, found {_text(image.size)}")
        return mask
    values = values_by_name(classes)
    for drawn in image.drawn:
        if drawn.name not in values:
            problems.append(f"{image.file}: '{drawn.name}' is no class; expected {', '.join(classes.names)}")
            continue
        try:
            mask[drawn.fill(record.size)] = values[drawn.name]
        except KeyError as error:
            problems.append(f"{image.file}: {drawn.name}: a shape lacks {error}")
        except ValueError as error:
            problems.append(f"{image.file}: {drawn.name}: {error}")
    return mask


def _unlabelled(mask: NDArray[np.uint8], record: ImageRecord, classes: ClassList) -> tuple[str, ...]:
    if record.labels is None:
        return ()
    drawn = [label for label in range(classes.num_foreground) if (mask == ClassList.class_index(label)).any()]
    return tuple(classes.names[label] for label in drawn if label not in record.labels)
