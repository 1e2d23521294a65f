"""Masks that a person has corrected: a folder of ``<image id>.png``, as ``wsss masks import`` writes it.

The segmenter learns them in place of pseudo-masks.  They lie beside the data set, not in it: no score knows them.
Reads: the names in the folder, the bytes of its masks for cache keys, their pixels to check them.  Writes nothing.
"""

from __future__ import annotations

import contextlib
import hashlib
from collections.abc import Iterable, Mapping
from pathlib import Path

from stages.contracts import BACKGROUND_INDEX, IGNORE_INDEX, ClassList, ImageRecord, read_image_size
from stages.data.check import check_mask
from stages.data.names import ImageNames
from stages.data.readers import file_names
from stages.data.records import PROBLEMS_SHOWN, DataListing, Problems, quoted, some
from stages.errors import ConfigError, DataError

_OPTION = "corrected_masks"


def find_corrected(folder: Path, train: Iterable[str]) -> dict[str, Path]:
    """The masks in ``folder`` by the id of their image, in the order of the ids.

    Args:
        folder: The option ``train_segmenter.corrected_masks``.
        train: Ids of the images that the segmenter is trained on.

    Raises:
        ConfigError: with every problem: no such folder, no mask in it, a mask of another image, two masks of one.
    """
    names, problems = ImageNames(dict.fromkeys(train, "")), Problems()
    found: dict[str, Path] = {}
    for path in _mask_files(folder):
        image_id = names.get(path.stem)
        if image_id is None:
            text = f"{path}: no training image is called {quoted(path.stem)}, and only those are learned"
            problems.add("unknown", f"{_OPTION}: {text}; rename the mask or take it out of the folder")
        elif image_id in found:
            problems.add("twice", f"{_OPTION}: {path}: {found[image_id].name} is of the same image; remove one of them")
        else:
            found[image_id] = path
    if problems:
        raise ConfigError(f"{_OPTION}: masks that cannot be used", problems.lines(PROBLEMS_SHOWN))
    return dict(sorted(found.items()))


def digest_corrected(folder: Path) -> dict[str, str]:
    """The sha256 of each mask in ``folder`` by its name without ending.

    Raises:
        ConfigError: there is no such folder, no mask in it, or one that cannot be read.
    """
    try:
        return {path.stem: hashlib.sha256(path.read_bytes()).hexdigest() for path in _mask_files(folder)}
    except OSError as error:
        raise ConfigError(f"{_OPTION}: {error.filename} cannot be read ({error.strerror}); restore it") from error


def _mask_files(folder: Path) -> list[Path]:
    names = [name for name in sorted(file_names(folder)) if name.lower().endswith(".png") and not name.startswith(".")]
    if not names:
        found = "has no PNG mask" if folder.is_dir() else "there is no such folder"
        raise ConfigError(f"{_OPTION}: {folder}: {found}; name the folder that `wsss masks import --out` wrote")
    return [folder / name for name in names]


def check_corrected(masks: Mapping[str, Path], images: Iterable[ImageRecord], classes: ClassList) -> list[str]:
    """Read every corrected mask to its last pixel.

    Args:
        masks: From ``find_corrected``.
        images: Whose sizes and labels they must fit; a mask of no one of them is not looked at.
        classes: The class list.

    Returns:
        What is allowed but should be known, a line each.

    Raises:
        DataError: with every mask that does not read, has another size than its image, or values of no class.
    """
    names = classes.names_with_background
    values = {value: value for value in (*range(len(names)), IGNORE_INDEX)}
    problems, moved, strange = Problems(), list[str](), list[str]()
    for image in images:
        if image.id not in masks:
            continue
        found, texts, odd = check_mask(masks[image.id], image.size, values, is_deep=True)
        for text in texts:
            problems.add("mask", f"{_OPTION}: {text}")
        moved += odd
        own = {ClassList.class_index(label) for label in image.labels or ()} | {BACKGROUND_INDEX, IGNORE_INDEX}
        other = [names[value] for value in map(int, () if found is None else found) if value in values.keys() - own]
        if image.labels is not None and other:
            strange.append(f"{image.id} ({', '.join(other)})")
    if problems:
        count = sum(map(len, problems.by_kind.values()))
        text = f"{count:,} of the corrected masks cannot be learned; nothing was trained on them"
        raise DataError(text, problems.lines(PROBLEMS_SHOWN))
    warnings = [f"{_OPTION}: {len(moved):,} masks have colours in another order, e.g. {moved[0]}"] if moved else []
    if strange:
        text = f"{len(strange):,} masks have a class that their image is not labelled with: {some(strange, 3)}"
        warnings.append(f"{_OPTION}: {text}; complete the labels, so that the classifier learns the class too")
    return warnings


def check_corrected_listed(folder: Path, listing: DataListing) -> list[str]:
    """``find_corrected`` and ``check_corrected`` before the images are indexed: their heads tell their sizes.

    Pictures that wsss draws itself are not there yet; an image that does not read is told of elsewhere.

    Raises:
        ConfigError: as ``find_corrected``.
        DataError: as ``check_corrected``.
    """
    masks, records = find_corrected(folder, listing.splits["train"]), list[ImageRecord]()
    for image in listing.split("train"):
        if listing.root is None or image.id not in masks:
            continue
        with contextlib.suppress(DataError):
            size = read_image_size(listing.root / image.image)
            records.append(ImageRecord(id=image.id, image=image.image, size=size, labels=image.labels))
    return check_corrected(masks, records, listing.classes)
