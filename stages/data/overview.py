"""What was understood of a data set, so that a person sees whether it is what was meant.  Reads and writes nothing."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from stages.data.records import DataListing, ListedImage, quoted, some

_CLASSES_SHOWN = 40
_PAIRS_SHOWN = 5


@dataclass(frozen=True)
class ClassCount:
    """In how many images a class is, by its image-level labels."""

    name: str
    train: int
    val: int


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
    """Classes of train that no label of val has; empty where val has no labels."""
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
        lines += [f"  {n:>3} {quoted(c.name)[1:-1]}: {c.train:,} + {c.val:,}" for n, c in enumerate(shown, start=1)]
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


def overview_of(listing: DataListing, sizes: Iterable[tuple[int, int] | None]) -> DataOverview:
    """Count what is in a listing; ``sizes`` are (height, width) of its images, None where one does not decode."""
    known = [size for size in sizes if size is not None]
    heights, widths = zip(*known, strict=True) if known else ((), ())
    names = listing.classes.names if listing.images else ()
    split = {name: listing.split(name) for name in listing.splits if name != "train_score"}
    holders = {name: _holders(split.get(name, ()), len(names)) for name in ("train", "val")}
    has_val_labels = any(image.labels is not None for image in split.get("val", ()))
    counts = tuple(
        ClassCount(name, len(holders["train"][index]), len(holders["val"][index])) for index, name in enumerate(names)
    )
    return DataOverview(
        num_images=len(listing.images),
        splits={name: len(images) for name, images in split.items()},
        height_px=(min(heights), max(heights)) if heights else None,
        width_px=(min(widths), max(widths)) if widths else None,
        classes=counts,
        masks={name: sum(image.mask is not None for image in images) for name, images in split.items()},
        unused_masks=listing.unused_masks,
        val_lacks=tuple(count.name for count in counts if has_val_labels and count.train and not count.val),
        always_with=tuple(_always_with(names, holders["train"], len(split.get("train", ())))),
    )


def _holders(images: Iterable[ListedImage], num_classes: int) -> list[set[str]]:
    """The images of each class."""
    holders: list[set[str]] = [set() for _ in range(num_classes)]
    for image in images:
        for label in image.labels or ():
            holders[label].add(image.id)
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
