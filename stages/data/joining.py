"""Join lists, labels, images and masks of any data set into one listing, with the problems between them.

Reads and writes nothing: the adapters have read the small files and the folders' names.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from stages.contracts import ClassList, LabelledBox
from stages.data.records import DataListing, IdList, ListedImage, MaskFolder, Problems, quoted, some
from stages.errors import printable

PREDICTED_SPLITS = ("train", "val", "test")
"""The splits that must not share an image; train_score is a part of train."""


@dataclass(frozen=True)
class Sources:
    """What an adapter found; every path is relative to ``root``, with forward slashes."""

    root: Path | None
    class_names: tuple[str, ...]
    mask_values: Mapping[int, int]
    lists: Mapping[str, IdList]
    """train, val and, where given, train_score and test."""
    labels: Mapping[str, tuple[int, ...]]
    """Image id to sorted label indices."""
    images: Mapping[str, str]
    """Image id to image file."""
    masks: Mapping[str, str]
    """Image id to the mask for scores."""
    full_masks: Mapping[str, str]
    """Image id to the mask for full supervision, where it is another than in ``masks``."""
    image_folder: str
    mask_folder: str
    """How messages name the folders."""
    mask_folders: tuple[MaskFolder, ...] = ()
    """The folders that ``masks`` and ``full_masks`` are from."""
    boxes: Mapping[str, tuple[LabelledBox, ...]] = field(default_factory=dict)
    """Image id to its true boxes; of images of val only."""


def join_sources(sources: Sources, problems: Problems) -> DataListing:
    """One listing out of ``sources``; images without a file are left out of it and added to ``problems``."""
    disjoint = {split: sources.lists[split] for split in PREDICTED_SPLITS if split in sources.lists}
    _check_splits(disjoint, problems)
    for listed in dict.fromkeys(sources.lists.values()):
        _check_image_files(sources, listed, problems)
    splits = {split: _present(sources, split) for split in ("train", "val")}
    if "test" in sources.lists:
        splits["test"] = _present(sources, "test")
    images: dict[str, ListedImage] = {}
    for split, ids in splits.items():
        for image_id in ids:
            images.setdefault(image_id, _listed(sources, image_id, split))
    _check_unused_masks(sources, problems)
    warnings = _check_val_masks(sources, splits["val"], problems)
    _check_val_boxes(sources, splits["val"], problems)
    splits["train_score"], score_warnings = _train_score(sources, set(splits["train"]))
    warnings += score_warnings + _label_warnings(sources, splits["train"], problems)
    classes = ClassList(names=sources.class_names)
    values = dict(sources.mask_values)
    unused = dict.fromkeys(f"{found.folder}/{file}" for found in sources.mask_folders for file in found.unused)
    known = tuple(printable(text) for text in (*problems.warnings, *warnings))
    return DataListing(sources.root, classes, tuple(images.values()), splits, values, known, unused_masks=tuple(unused))


def _present(sources: Sources, split: str) -> tuple[str, ...]:
    listed = sources.lists.get(split)
    return tuple(image_id for image_id in listed.ids if image_id in sources.images) if listed else ()


def _check_image_files(sources: Sources, listed: IdList, problems: Problems) -> None:
    for line, image_id in listed.entries:
        if image_id not in sources.images:
            text = f"{listed.source} line {line}: image {quoted(image_id)} has no file in {sources.image_folder}"
            problems.add("missing image", f"{text}; remove the line or add the image")


def _listed(sources: Sources, image_id: str, split: str) -> ListedImage:
    mask = sources.masks.get(image_id)
    return ListedImage(
        id=image_id,
        image=sources.images[image_id],
        labels=None if split == "test" else sources.labels.get(image_id),
        mask=mask,
        full_mask=sources.full_masks.get(image_id, mask) if split == "train" else None,
        boxes=sources.boxes.get(image_id) if split == "val" else None,
    )


def _check_unused_masks(sources: Sources, problems: Problems) -> None:
    """Files that belong to no image are a warning where others do; where none does, the names are wrong."""
    for found in {found.folder: found for found in sources.mask_folders}.values():
        if not found.unused:
            continue
        count = len(found.unused)
        bare = min((image_id for image_id in sources.images if image_id not in found.masks), default=None)
        example = "" if bare is None else f"{bare}.png"
        if found.masks:
            text = f"{count:,} of {count + len(found.masks):,} files in {found.folder} belong to no image"
            text = f"{text}: {some(found.unused)}; they are not used: a mask is a PNG named as its image"
            problems.warnings.append(f"{text}, e.g. {quoted(example)}" if example else text)
        elif sources.images:
            text = f"{(sources.root or Path()) / found.folder}: none of its {count:,} masks is named as an image"
            text = f"{text} (found {found.unused[0]}, expected e.g. {example})"
            problems.add("mask names", f"{text}; rename the masks")


def _check_val_masks(sources: Sources, val: tuple[str, ...], problems: Problems) -> list[str]:
    """No val masks at all is a warning; some missing is a problem, since the score would be of fewer images."""
    missing = [image_id for image_id in val if image_id not in sources.masks]
    source = sources.lists["val"].source if "val" in sources.lists else "val"
    if missing and len(missing) == len(val):
        if sources.boxes:
            return []
        return [f"no image of {source} has a mask in {sources.mask_folder}: scores on val will be absent"]
    if missing:
        text = f"{len(missing):,} of {len(val):,} val images ({source}) have no mask in {sources.mask_folder}"
        problems.add("val mask", f"{text}: {some(missing)}; add the masks or remove the images from the list")
    return []


def _check_val_boxes(sources: Sources, val: tuple[str, ...], problems: Problems) -> None:
    """Where some val images have boxes all must, since the score would be of fewer images."""
    missing = [image_id for image_id in val if image_id not in sources.boxes]
    if sources.boxes and missing:
        text = f"{len(missing):,} of {len(val):,} val images have no box: {some(missing)}"
        problems.add("val box", f"{text}; add the boxes or remove the images from the list")


def _train_score(sources: Sources, train: set[str]) -> tuple[tuple[str, ...], list[str]]:
    """The training images that attention and pseudo-masks are scored on, and what is left out of them."""
    listed = sources.lists.get("train_score")
    wanted = listed.ids if listed else ()
    inside = [image_id for image_id in wanted if image_id in train]
    scored = tuple(image_id for image_id in inside if image_id in sources.masks)
    warnings: list[str] = []
    if listed and len(inside) < len(wanted):
        text = f"{len(wanted) - len(inside):,} of {len(wanted):,} images of {listed.source} are not trained on"
        warnings.append(f"{text}: they have no attention map and are not scored")
    if listed and len(scored) < len(inside):
        text = f"{len(inside) - len(scored):,} of {len(inside):,} images of {listed.source} have no mask"
        warnings.append(f"{text} in {sources.mask_folder}: attention and pseudo-masks are scored on {len(scored):,}")
    return scored, warnings


def _label_warnings(sources: Sources, train: tuple[str, ...], problems: Problems) -> list[str]:
    """What is odd in the labels of the training images: images of no class, or a class that never occurs.

    No label on any image is a problem: there is nothing to learn.
    """
    labels = [sources.labels.get(image_id, ()) for image_id in train]
    empty = sum(not present for present in labels)
    holders: dict[int, set[int]] = {}
    for place, present in enumerate(labels):
        for index in present:
            holders.setdefault(index, set()).add(place)
    seen = set(holders)
    is_explained = "unknown class" in problems.by_kind or not any(image_id in sources.labels for image_id in train)
    if not seen and not is_explained:
        text = f"none of the {len(train):,} training images has a label of the classes {', '.join(sources.class_names)}"
        problems.add("labels", f"{text}; correct the labels, the train list or data.classes")
        return []
    absent = [name for index, name in enumerate(sources.class_names) if index not in seen]
    warnings: list[str] = []
    if empty:
        warnings.append(f"{empty:,} of {len(labels):,} training images have none of the classes: they are background")
    if labels and absent:
        warnings.append(f"no training image has the class {', '.join(absent)}: it cannot be learnt")
    return warnings + _indistinct_classes(sources.class_names, holders, len(labels))


def _indistinct_classes(names: Sequence[str], holders: Mapping[int, set[int]], num_images: int) -> list[str]:
    """Classes that no image-level label tells from the rest, or from another class.

    Args:
        names: The classes.
        holders: Label index to the training images that have it.
        num_images: How many training images there are.
    """
    everywhere = [index for index in sorted(holders) if len(holders[index]) == num_images > 1]
    lines: list[str] = []
    if everywhere:
        shown = ", ".join(names[index] for index in everywhere)
        text = f"every one of the {num_images:,} training images has the class {shown}"
        lines.append(
            f"{text}: nothing tells it from what is beside it; add images without it (their labels may be empty)"
        )
    groups: dict[frozenset[int], list[int]] = {}
    for index in sorted(holders):
        if 1 < len(holders[index]) < num_images:
            groups.setdefault(frozenset(holders[index]), []).append(index)
    together = [
        f"{' and '.join(names[index] for index in group)} ({len(places):,} images)"
        for places, group in groups.items()
        if len(group) > 1
    ]
    if together:
        text = f"these classes are always on the same training images: {'; '.join(together[:5])}"
        lines.append(f"{text}{'; …' if len(together) > 5 else ''}: nothing tells one from the other")
    return lines


def _check_splits(lists: Mapping[str, IdList], problems: Problems) -> None:
    """Add duplicates inside a list, empty lists, and images that stand in two of the splits.

    Args:
        lists: Split name to list; all given splits must be disjoint (train_score is not one of them).
        problems: Receives what is found.
    """
    for split, listed in lists.items():
        if not listed.entries:
            problems.add("empty list", f"{listed.source}: the {split} list is empty; {listed.remedy}")
        _check_duplicates(listed, problems)
    names = list(lists)
    for position, first in enumerate(names):
        for second in names[position + 1 :]:
            _check_overlap(lists, first, second, problems)


def _check_duplicates(listed: IdList, problems: Problems) -> None:
    first_line: dict[str, int] = {}
    for line, image_id in listed.entries:
        if image_id in first_line:
            text = (
                f"{listed.source} line {line}: image {quoted(image_id)} stands on line {first_line[image_id]} already"
            )
            problems.add("duplicate", f"{text}; remove one of the two lines")
        first_line.setdefault(image_id, line)


def _check_overlap(lists: Mapping[str, IdList], first: str, second: str, problems: Problems) -> None:
    shared = sorted(set(lists[first].ids) & set(lists[second].ids))
    if shared:
        problems.add(
            "overlap",
            f"{len(shared):,} images stand in both {first} ({lists[first].source}) and {second} "
            f"({lists[second].source}): {some(shared)}; scores on trained images are worthless, "
            f"remove them from one of the lists",
        )
