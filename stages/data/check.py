"""Decode a data set's images and masks and say everything that is wrong with them.

Reads: every image, and of every mask either all pixels or the header alone.  Writes nothing.
"""

from __future__ import annotations

import multiprocessing
import os
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from stages.contracts import (
    BACKGROUND_INDEX,
    IGNORE_INDEX,
    MASK_FORMATS,
    MASK_MODES,
    OBJECT_MASK_MODES,
    ClassList,
    Progress,
    mask_mode_problem,
    open_quietly,
    read_image,
    turned_mask_problem,
    voc_palette,
)
from stages.data.boxes import box_problems, box_warnings
from stages.data.config import DataConfig
from stages.data.overview import DataOverview, overview_of
from stages.data.records import DataListing, ListedImage, Problems, quoted, some
from stages.errors import DataError, EnvironmentFailure

_BATCH = 32
_FILES_PER_PROCESS = 400
"""A further process pays for its start-up only from about this many files on."""

_NO_CLASS = -1

MIN_SIDE_PX = 16
"""A network of output stride 8 or more has nothing to look at in a smaller image."""

_REMOVE_TAG = "exiftool -Orientation= FILE"
_OR_SKIP = ", or set data.on_bad_image=skip"


@dataclass(frozen=True)
class CheckedImage:
    """What decoding one image and its masks showed."""

    id: str
    size: tuple[int, int] | None
    """(height, width) in pixels; None where the image does not decode."""
    image_problems: tuple[str, ...] = ()
    mask_problems: tuple[str, ...] = ()
    mask_classes: tuple[int, ...] | None = None
    """Class indices (1 … K) in the mask for scores, sorted; None where its pixels were not read."""
    mask_rest: tuple[int, ...] = ()
    """Which of background (0) and 255 are in that mask, and -1 where it has values that are no class."""
    moved_palettes: tuple[str, ...] = ()
    """Its masks that have VOC's colours in another order, where that may be meant."""
    turned: str | None = None
    """The image's file where its EXIF tag turns it and nothing tells whether masks and boxes are turned too."""


@dataclass(frozen=True)
class _Task:
    """What a worker process needs to check one image."""

    root: Path
    image: ListedImage
    mask_values: Mapping[int, int]
    is_deep: bool
    """Whether the masks' pixels are read; else only their headers."""
    is_compared: bool
    """Whether the mask's classes are told all the same."""
    has_voc_palette: bool
    mask_modes: tuple[str, ...]


@dataclass(frozen=True)
class DataCheck:
    """What ``check_data`` found."""

    problems: Problems
    """Everything that is wrong, with path, finding and remedy; empty when the data set is fine."""
    overview: DataOverview
    """What was understood of it."""


def check_data(config: DataConfig, progress: Progress, *, processes: int = 0) -> DataCheck:
    """Everything that is wrong with a data set: lists, labels, every image and every pixel of every mask.

    Args:
        config: The data set; a synthetic one is made by wsss itself and has nothing to check.
        progress: Counts images; warnings (what is allowed but should be known) go to it.
        processes: Worker processes; 0 takes one per core where there are many images.
    """
    scan = config.scan()
    listing, problems = scan.listing, scan.problems
    for text in listing.warnings:
        progress.warn(text)
    if listing.root is None:
        return DataCheck(problems, overview_of(listing))
    deep = {image.id for image in listing.images}
    checked = list(check_images(listing, listing.root, deep, progress, processes=processes))
    sizes = [image.size for image in checked]
    for text in (*image_warnings(listing, checked), *box_warnings(zip(listing.images, sizes, strict=True))):
        progress.warn(text)
    for image in checked:
        for kind, texts in (("image", image.image_problems), ("mask", image.mask_problems)):
            for text in texts:
                problems.add(kind, text)
    for text in check_any_object(listing, checked):
        problems.add("no object", text)
    shown = {image.id: image.mask_classes for image in checked if image.mask_classes is not None}
    return DataCheck(problems, overview_of(listing, sizes, shown))


def check_images(
    listing: DataListing,
    root: Path,
    deep: Collection[str],
    progress: Progress,
    *,
    compared: Collection[str] = (),
    processes: int = 0,
) -> Iterator[CheckedImage]:
    """Decode every image of ``listing``, in its order, with several processes where it has many.

    Args:
        listing: What to check.
        root: Folder that the listing's paths are relative to.
        deep: Ids whose masks are read to the last pixel; of the others' masks only the header is read, so that
            no pixel of a training mask is looked at where weak supervision is promised.
        progress: Counts images.
        compared: Ids whose masks' classes are told too, for ``image_warnings``; nothing else in such a mask is checked.
        processes: Worker processes; 0 chooses.

    Raises:
        EnvironmentFailure: a worker was killed.
    """
    modes = OBJECT_MASK_MODES if listing.has_object_masks else MASK_MODES
    tasks = [
        _Task(
            root,
            image,
            listing.mask_values,
            is_deep=image.id in deep,
            is_compared=image.id in compared,
            has_voc_palette=listing.has_voc_palette,
            mask_modes=modes,
        )
        for image in listing.images
    ]
    batches = [tasks[start : start + _BATCH] for start in range(0, len(tasks), _BATCH)]
    done = 0
    progress.step("checking images", done, len(tasks))
    wanted = processes or min(os.cpu_count() or 1, 1 + len(tasks) // _FILES_PER_PROCESS)
    for checked in _check_batches(batches, wanted):
        done += len(checked)
        progress.step("checking images", done, len(tasks))
        yield from checked


def _check_batches(batches: Sequence[Sequence[_Task]], processes: int) -> Iterator[list[CheckedImage]]:
    if processes <= 1:
        yield from map(_check_batch, batches)
        return
    # spawn, not fork: the caller may have threads (Prefect, torch) whose locks a fork would copy in a locked state
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(max_workers=min(processes, len(batches)), mp_context=context) as pool:
        try:
            yield from pool.map(_check_batch, batches)
        except BrokenProcessPool as error:
            raise EnvironmentFailure(
                "a process that checks images was killed, most likely for memory; lower runtime.processes and run again"
            ) from error


def _check_batch(tasks: Sequence[_Task]) -> list[CheckedImage]:
    return [_check_one(task) for task in tasks]


def _check_one(task: _Task) -> CheckedImage:
    path = task.root / task.image.image
    size, image_problems, orientation = check_image(path)
    image_problems += box_problems(task.image, size) if size is not None else []
    mask_problems: list[str] = []
    moved_palettes: list[str] = []
    values: NDArray[np.uint8] | None = None
    masks = [relative for relative in dict.fromkeys((task.image.mask, task.image.full_mask)) if relative is not None]
    for relative in masks:
        found, texts, moved = check_mask(
            task.root / relative,
            size,
            task.mask_values,
            is_deep=task.is_deep,
            modes=task.mask_modes,
            is_lying=orientation >= 5,
        )
        mask_problems += [*texts, *moved] if task.has_voc_palette else texts
        moved_palettes += moved
        values = found if relative == task.image.mask else values
    if values is None and task.is_compared and task.image.mask is not None:
        path = task.root / task.image.mask
        values, _, _ = check_mask(path, size, task.mask_values, is_deep=True, modes=task.mask_modes)
    mask_classes, mask_rest = None, tuple[int, ...]()
    if values is not None:
        classes = {task.mask_values.get(int(value), _NO_CLASS) for value in values}
        mask_classes = tuple(sorted(classes - {BACKGROUND_INDEX, IGNORE_INDEX, _NO_CLASS}))
        mask_rest = tuple(sorted(classes & {BACKGROUND_INDEX, IGNORE_INDEX, _NO_CLASS}))
    moved_palettes = [] if task.has_voc_palette else moved_palettes
    # of an image that lies on its side, a mask's size tells
    is_told = orientation >= 5 and size is not None and size[0] != size[1] and not task.image.boxes
    is_unsure = orientation != 1 and bool(masks or task.image.boxes) and not is_told
    return CheckedImage(
        task.image.id,
        size,
        tuple(image_problems),
        tuple(mask_problems),
        mask_classes,
        mask_rest,
        tuple(moved_palettes),
        task.image.image if is_unsure else None,
    )


def check_image(path: Path) -> tuple[tuple[int, int] | None, list[str], int]:
    """Decode an image to its last row, as whoever uses it does.

    Returns:
        (height, width) in pixels as ``read_rgb`` gives it, or None where it is of no use; what is wrong with it; and
        its EXIF orientation, 1 … 8.
    """
    if not os.path.lexists(path):
        return None, [f"{path}: the image is missing; add it or remove it from the lists and labels"], 1
    try:
        pixels, orientation = read_image(path)
    except DataError as error:
        return None, [error.message + _OR_SKIP], 1
    size = pixels.shape[0], pixels.shape[1]
    if min(size) < MIN_SIDE_PX:
        text = f"{path}: expected at least {MIN_SIDE_PX} pixels on each side, found {size[0]}×{size[1]} (height×width)"
        return None, [f"{text}; replace the file{_OR_SKIP}"], orientation
    return size, [], orientation


def check_mask(
    path: Path,
    size: tuple[int, int] | None,
    mask_values: Mapping[int, int],
    *,
    is_deep: bool,
    modes: Sequence[str] = MASK_MODES,
    is_lying: bool = False,
) -> tuple[NDArray[np.uint8] | None, list[str], list[str]]:
    """Check a mask's mode and size, and with ``is_deep`` its values and palette.

    Args:
        path: A PNG of class indices.
        size: (height, width) of its image; None where that is unknown.
        mask_values: The allowed raw values.
        is_deep: Whether the pixels may be read.
        modes: Pixel modes that are taken.
        is_lying: Whether its image lies on its side and is turned by its EXIF tag.

    Returns:
        The raw values in it, sorted (None when they were not read); what is wrong with it; and a line where it has
        VOC's colours in another order, which in VOC's own data is wrong too.
    """
    try:
        with open_quietly(path, MASK_FORMATS) as mask:
            texts = _check_header(path, mask, size, modes, is_lying=is_lying)
            if not is_deep or mask_mode_problem(path, mask, modes) is not None:
                return None, texts, []
            values = np.unique(np.asarray(mask.getchannel(0) if mask.mode == "LA" else mask, dtype=np.uint8))
            palette = mask.getpalette("RGB") if mask.mode == "P" else None
    except MemoryError:
        raise
    except Exception as error:  # a decoder answers damaged bytes with whatever it trips over
        return None, [f"{path}: is no readable mask ({error}); restore the file"], []
    moved = _check_palette(path, values, palette, mask_values)
    return values, texts + _check_values(path, values, mask_values), moved


def _check_header(
    path: Path, mask: Image.Image, size: tuple[int, int] | None, modes: Sequence[str], *, is_lying: bool
) -> list[str]:
    texts: list[str] = []
    if (other := mask_mode_problem(path, mask, modes)) is not None:
        texts.append(other)
    if (turned := turned_mask_problem(path, mask)) is not None:
        texts.append(turned)
    if size is not None and is_lying and size[0] != size[1] and (mask.width, mask.height) == size:
        texts.append(
            f"{path}: is a mask of the unturned pixels, and its image is turned by its EXIF tag, as viewers show it; "
            f"remove the image's tag ({_REMOVE_TAG}), or turn the mask"
        )
    elif size is not None and (mask.height, mask.width) != size:
        texts.append(
            f"{path}: expected {size[0]}×{size[1]} pixels (height×width) as its image has, "
            f"found {mask.height}×{mask.width}; make the mask at the image's size"
        )
    return texts


def _check_palette(
    path: Path, values: NDArray[np.uint8], palette: Sequence[int] | None, mask_values: Mapping[int, int]
) -> list[str]:
    """Values that are the wrong class if a program renumbered the palette."""
    moved = _renumbered(values, palette, mask_values)
    if not moved:
        return []
    shown = ", ".join(f"{value} has the colour of {meant}" for value, meant in list(moved.items())[:3])
    return [
        f"{path}: its palette is not VOC's but a re-ordered one ({shown}): an image program re-quantised the "
        "mask and its indices no longer mean VOC's classes; save the indices again from the original"
    ]


def _check_values(path: Path, values: NDArray[np.uint8], mask_values: Mapping[int, int]) -> list[str]:
    """Values that are no class."""
    unknown = [int(value) for value in values if int(value) not in mask_values]
    if unknown:
        allowed = f"0 … {max(value for value in mask_values if value != IGNORE_INDEX)} and {IGNORE_INDEX}"
        listed = ", ".join(map(str, unknown[:8])) + (", …" if len(unknown) > 8 else "")
        return [f"{path}: values {listed} are no class (allowed: {allowed}); save class indices, not grey levels"]
    return []


def _renumbered(
    values: NDArray[np.uint8], palette: Sequence[int] | None, mask_values: Mapping[int, int]
) -> dict[int, int]:
    """Used values whose colour is VOC's colour of another class (or void): ``{found: meant}``."""
    if palette is None:
        return {}
    moved: dict[int, int] = {}
    for value in map(int, values):
        colour = tuple(palette[3 * value : 3 * value + 3])
        meant = _voc_colours().get(colour)
        if meant is not None and meant != value and meant in mask_values:
            moved[value] = meant
    return moved


@cache
def _voc_colours() -> dict[tuple[int, ...], int]:
    """VOC's colour to its index."""
    return {tuple(map(int, colour)): index for index, colour in enumerate(voc_palette())}


def image_warnings(listing: DataListing, checked: Collection[CheckedImage]) -> list[str]:
    """What is allowed in images and masks but should be known, a line for each kind."""
    return [
        *_palette_warnings(checked),
        *_turned_warnings(checked),
        *_label_mask_warnings(listing, checked),
        *_numbering_warnings(listing, checked),
        *_bare_mask_warnings(listing, checked),
    ]


def _palette_warnings(checked: Iterable[CheckedImage]) -> list[str]:
    """One line where masks of one's own have VOC's colours in another order: meant, or an image program's doing."""
    moved = [text for image in checked for text in image.moved_palettes]
    if not moved:
        return []
    return [f"{len(moved):,} masks have VOC's colours in another order; fine where that is meant, but e.g. {moved[0]}"]


def _turned_warnings(checked: Iterable[CheckedImage]) -> list[str]:
    """One line where images are turned by their EXIF tag and masks or boxes may be of the pixels as they are stored."""
    turned = [image.turned for image in checked if image.turned is not None]
    if not turned:
        return []
    return [
        f"{len(turned):,} images are turned by their EXIF tag and used as viewers show them, and nothing tells whether "
        f"their masks or boxes are turned too: {some(turned)}; look at one: where they fit the unturned pixels, remove "
        f"the tag ({_REMOVE_TAG}), else turn the pixels for good (mogrify -auto-orient FILE)"
    ]


def _label_mask_warnings(listing: DataListing, checked: Iterable[CheckedImage]) -> list[str]:
    """A line where masks have classes that are not among their images' labels.

    The classes are probably in another order than the masks' values then; if only a few masks are so, labels lack.
    """
    if listing.has_object_masks:
        return []
    images = {image.id: image for image in listing.images}
    names = listing.classes.names_with_background
    num_masks, examples = 0, list[str]()
    for image in checked:
        labels = images[image.id].labels
        if image.mask_classes is None or labels is None:
            continue
        num_masks += 1
        own = [ClassList.class_index(label) for label in labels]
        if not set(image.mask_classes) <= set(own):
            found = ", ".join(names[index] for index in image.mask_classes)
            meant = ", ".join(names[index] for index in own) or "nothing"
            examples.append(f"{quoted(image.id)} (mask {found}; labels {meant})")
    if not examples:
        return []
    shown = ", ".join(examples[:3]) + (", …" if len(examples) > 3 else "")
    text = f"in {len(examples):,} of {num_masks:,} masks there is a class that is not among its image's labels: {shown}"
    if listing.has_voc_palette:
        return [f"{text}; are labels missing, or do the masks belong to other images?"]
    order = ", ".join(f"{index} {name}" for index, name in enumerate(names[:6]) if index)
    order += ", …" if len(names) > 6 else ""
    return [f"{text}; is the order of the classes right? set data.classes (now: {order}), or complete the labels"]


def _numbering_warnings(listing: DataListing, checked: Iterable[CheckedImage]) -> list[str]:
    """Lines where masks probably have other values for background and classes than they should."""
    read = _sound_masks(checked)
    if not read or listing.has_object_masks:
        return []
    remedy = "save background as 0 and the i-th class as i, counted from 1"
    lines: list[str] = []
    if not any(BACKGROUND_INDEX in image.mask_rest for image in read):
        num_void = sum(IGNORE_INDEX in image.mask_rest for image in read)
        void = f", and {num_void:,} have {IGNORE_INDEX}, which counts nowhere" if num_void else ""
        text = f"none of the {len(read):,} masks has a pixel 0, which is background{void}"
        lines.append(f"{text}; is background another value?  Then {remedy}")
    labels = {image.id: frozenset(map(ClassList.class_index, image.labels or ())) for image in listing.images}
    labelled = [image for image in read if labels[image.id]]
    num_fits = sum(labels[image.id] == set(image.mask_classes or ()) for image in labelled)
    from_zero = [image for image in labelled if labels[image.id] == _classes_from_zero(image, listing.classes)]
    has_several = len({labels[image.id] for image in from_zero}) > 1
    if has_several and len(from_zero) > max(num_fits, _MOST * len(labelled)):
        text = f"{len(from_zero):,} of {len(labelled):,} masks fit their image's labels if value 0 is the first class, "
        lines.append(f"{text}{num_fits:,} as they are; {remedy}")
    return lines


def _sound_masks(checked: Iterable[CheckedImage]) -> list[CheckedImage]:
    """The images whose mask was read and has allowed values alone."""
    known = [image for image in checked if image.mask_classes is not None and not image.mask_problems]
    return [image for image in known if _NO_CLASS not in image.mask_rest]


_MOST = 0.9
"""Share of masks that do not come to say the same by chance."""


def _classes_from_zero(image: CheckedImage, classes: ClassList) -> set[int]:
    """The class indices in a mask if its values counted the classes from 0 and background were the last or 255."""
    values = {*(image.mask_classes or ()), *image.mask_rest} - {IGNORE_INDEX}
    return {value + 1 for value in values if value < classes.num_foreground}


def _bare_mask_warnings(listing: DataListing, checked: Iterable[CheckedImage]) -> list[str]:
    """Lines where masks have one value all over, or none of the classes though their images have labels."""
    read = _sound_masks(checked)
    if listing.has_object_masks or not any(image.mask_classes for image in read):
        return []  # where none has a class, that is a problem of its own
    lines: list[str] = []
    full = [image for image in read if len((*(image.mask_classes or ()), *image.mask_rest)) == 1]
    full = [image for image in full if image.mask_rest != (BACKGROUND_INDEX,)]
    if full:
        text = f"{len(full):,} of {len(read):,} masks have one value all over, a class or {IGNORE_INDEX}"
        lines.append(f"{text}: {some([image.id for image in full])}; are the objects' outlines lost?")
    has_labels = {image.id: bool(image.labels) for image in listing.images}
    labelled = [image for image in read if has_labels[image.id]]
    bare = [image.id for image in labelled if not image.mask_classes]
    if bare:
        text = f"{len(bare):,} of {len(labelled):,} masks of images with labels have none of the classes: {some(bare)}"
        lines.append(f"{text}; are objects saved as 0 or {IGNORE_INDEX}, or are they not drawn?")
    return lines


def check_any_object(listing: DataListing, checked: Iterable[CheckedImage]) -> list[str]:
    """Masks of which not one has an object: usually 0/255 masks of one class, whose 255 means 'ignore'."""
    read = [image.mask_classes for image in checked if image.mask_classes is not None and not image.mask_problems]
    if not read or any(read):
        return []
    return [
        f"{listing.root}: none of the {len(read):,} masks has a pixel of a class (only background and {IGNORE_INDEX}, "
        "which is ignored); save the i-th class as value i, counted from 1"
    ]
