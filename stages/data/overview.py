"""What was understood of a data set, so that a person sees whether it is what was meant.  Reads and writes nothing."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass

from stages.contracts import ClassList
from stages.data.records import DataListing, quoted, some

_CLASSES_SHOWN = 40
_PAIRS_SHOWN = 5


@dataclass(frozen=True)
class ClassCount:
    """In how many images a class is, by their labels."""

    name: str
    train: int
    val: int | None
    """Where val has no labels, by the masks; None where it has none either."""


@dataclass(frozen=True)
class DataOverview:
    """A data set in numbers."""

    num_images: int
    splits: Mapping[str, int]
    """Split to its number of images."""
    height_px: tuple[int, int] | None
    """Smallest and largest; None where no image was decoded."""
    width_px: tuple[int, int] | None
    classes: tuple[ClassCount, ...]
    """In the order of the classes, which is that of the values in masks."""
    masks: Mapping[str, int]
    """Split to the number of its images with a mask for scores."""
    unused_masks: tuple[str, ...]
    """Files in the folders of masks that belong to no image."""
    val_lacks: tuple[str, ...]
    """Classes of train that no image of val has; empty where it has neither labels nor masks."""
    always_with: tuple[tuple[str, str], ...]
    """(class, another one that is on every training image of the first), where it is not on all images."""

    def lines(self) -> list[str]:
        """The overview in words."""
        splits = ", ".join(f"{count:,} {split}" for split, count in self.splits.items())
        size = ""
        if self.height_px is not None and self.width_px is not None:
            size = f"; height {_range(self.height_px)}, width {_range(self.width_px)} px"
        lines = [f"{self.num_images:,} images: {splits}{size}"]
        masks = ", ".join(f"{count:,} {split}" for split, count in self.masks.items() if count)
        unused = f"; {len(self.unused_masks):,} files belong to no image" if self.unused_masks else ""
        lines.append(f"masks of {masks or 'no image'}{unused}")
        noun = "class" if len(self.classes) == 1 else "classes"
        lines.append(f"{len(self.classes):,} {noun} (images of train + val; the number is the value in masks):")
        shown = self.classes[:_CLASSES_SHOWN]
        for number, count in enumerate(shown, start=1):
            val = "?" if count.val is None else f"{count.val:,}"
            lines.append(f"  {number:>3} {quoted(count.name)[1:-1]}: {count.train:,} + {val}")
        if len(shown) < len(self.classes):
            lines.append(f"  … and {len(self.classes) - len(shown):,} more; --json lists all")
        if self.val_lacks:
            lines.append(f"val has no image of {len(self.val_lacks):,} classes: {some(self.val_lacks)}")
        pairs = [f"{quoted(one)} never without {quoted(other)}" for one, other in self.always_with[:_PAIRS_SHOWN]]
        if pairs:
            more = ", …" if len(self.always_with) > len(pairs) else ""
            lines.append(f"on training images {', '.join(pairs)}{more}")
        return lines


def _range(ends: tuple[int, int]) -> str:
    return f"{ends[0]}" if ends[0] == ends[1] else f"{ends[0]} … {ends[1]}"


def overview_of(
    listing: DataListing,
    sizes: Iterable[tuple[int, int] | None] = (),
    mask_classes: Mapping[str, Collection[int]] | None = None,
) -> DataOverview:
    """Count what is in a listing.

    Args:
        listing: The data set.
        sizes: (height, width) of its images, None where one does not decode.
        mask_classes: Image id to the class indices (1 … K) in its mask, where that was read.
    """
    known = [size for size in sizes if size is not None]
    heights, widths = zip(*known, strict=True) if known else ((), ())
    names = listing.classes.names if listing.images else ()
    split = {name: listing.split(name) for name in listing.splits if name != "train_score"}
    holders = _holders({image.id: image.labels or () for image in split.get("train", ())}, len(names))
    val = {image.id: image.labels for image in split.get("val", ()) if image.labels is not None}
    if not val and mask_classes and not listing.has_object_masks:
        label_of = {ClassList.class_index(label): label for label in range(len(names))}
        val = {i.id: [label_of[index] for index in mask_classes.get(i.id, ())] for i in split.get("val", ())}
    in_val = _holders(val, len(names))
    counts = tuple(
        ClassCount(name, len(holders[index]), len(in_val[index]) if val else None) for index, name in enumerate(names)
    )
    return DataOverview(
        num_images=len(listing.images),
        splits={name: len(images) for name, images in split.items()},
        height_px=(min(heights), max(heights)) if heights else None,
        width_px=(min(widths), max(widths)) if widths else None,
        classes=counts,
        masks={name: sum(image.mask is not None for image in images) for name, images in split.items()},
        unused_masks=listing.unused_masks,
        val_lacks=tuple(count.name for count in counts if count.train and count.val == 0),
        always_with=tuple(_always_with(names, holders, len(split.get("train", ())))),
    )


def _holders(labels: Mapping[str, Iterable[int]], num_classes: int) -> list[set[str]]:
    """The images of each class."""
    holders: list[set[str]] = [set() for _ in range(num_classes)]
    for image_id, own in labels.items():
        for label in own:
            holders[label].add(image_id)
    return holders


def _always_with(names: Sequence[str], holders: Sequence[set[str]], num_images: int) -> Iterable[tuple[str, str]]:
    """Classes of two images or more that never stand without another one, which some images lack."""
    classes_of: dict[str, list[int]] = {}
    for index, own in enumerate(holders):
        for image_id in own:
            classes_of.setdefault(image_id, []).append(index)
    for index, own in enumerate(holders):
        if len(own) < 2:
            continue
        companions = set(classes_of[next(iter(own))]) - {index}
        for other in sorted(companions):
            if len(holders[other]) < num_images and own <= holders[other]:
                yield names[index], names[other]
