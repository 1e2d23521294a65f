"""What the adapters find in a data set before anything is decoded: lists, images, splits, problems.

Pure records; nothing is read or written here.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from stages.contracts import ClassList, LabelledBox
from stages.errors import printable

PROBLEMS_SHOWN = 25
"""Problems of one kind that an error shows; ``wsss data check`` shows all."""


@dataclass(frozen=True)
class ListedImage:
    """One image of a split, not yet opened; paths are relative to the data root, with forward slashes."""

    id: str
    image: str
    labels: tuple[int, ...] | None = None
    """Sorted label indices (0 … K-1); None where unknown."""
    mask: str | None = None
    full_mask: str | None = None
    boxes: tuple[LabelledBox, ...] | None = None
    """True boxes as the data set's list has them, perhaps reaching beyond the image; None where there is no list."""


@dataclass(frozen=True)
class DataListing:
    """A data set as its lists, label files and folders describe it."""

    root: Path | None
    """Folder that the paths are relative to; None for the synthetic set, which prepare_data generates."""
    classes: ClassList
    images: tuple[ListedImage, ...]
    """Every image of every split once: train, then val, then test, in list order."""
    splits: dict[str, tuple[str, ...]]
    """Ids by split: train, train_score, val, test (as in ImageIndex; the hold-out is prepare_data's)."""
    mask_values: dict[int, int]
    """Raw mask value to class index (0 … K or 255)."""
    warnings: tuple[str, ...] = ()
    """What is allowed but should be known, e.g. that there are no masks to score with."""
    has_voc_palette: bool = False
    """Whether a mask with VOC's colours must have them in VOC's order; else its colours mean nothing."""
    has_object_masks: bool = False
    """Whether masks only say object or not (as in ImageIndex)."""
    is_single_label: bool = False
    """Whether each image has one label by the format's rules (as in ImageIndex)."""
    unused_masks: tuple[str, ...] = ()
    """Files in the folders of masks that belong to no image, relative to the root."""

    def split(self, name: str, *, without: Collection[str] = ()) -> list[ListedImage]:
        """The images of a split in list order."""
        images = {image.id: image for image in self.images}
        return [images[image_id] for image_id in self.splits.get(name, ()) if image_id not in without]

    @property
    def files(self) -> tuple[str, ...]:
        """Relative paths whose contents are digested: every image and mask once, sorted."""
        names = {path for image in self.images for path in (image.image, image.mask, image.full_mask) if path}
        return tuple(sorted(names))


@dataclass(frozen=True)
class MaskFolder:
    """A folder of masks, matched with the images."""

    folder: str = ""
    """Relative to the root."""
    masks: Mapping[str, str] = field(default_factory=dict)
    """Image id to mask, relative to the root."""
    unused: tuple[str, ...] = ()
    """Files, relative to the folder, that belong to no image."""


@dataclass
class Problems:
    """Collects defects by kind, so that ten thousand of one kind do not hide the single one of another."""

    by_kind: dict[str, list[str]] = field(default_factory=dict)
    warnings: list[str] = field(default_factory=list)
    """What is allowed but should be known; goes into the listing."""

    def add(self, kind: str, text: str) -> None:
        """Keep one problem; ``kind`` groups those that are cut together."""
        self.by_kind.setdefault(kind, []).append(_one_line(text))

    def __bool__(self) -> bool:
        """Whether there is any problem."""
        return bool(self.by_kind)

    def lines(self, limit: int | None = None) -> list[str]:
        """All problems in the order of their kinds, at most ``limit`` of a kind and then their number."""
        lines: list[str] = []
        for texts in self.by_kind.values():
            shown = texts if limit is None else texts[:limit]
            lines.extend(shown)
            if len(texts) > len(shown):
                lines.append(
                    f"… and {len(texts) - len(shown):,} more like the last one; `wsss data check --json` lists all"
                )
        return lines


@dataclass(frozen=True)
class Scan:
    """A listing with the problems found on the way; the listing holds what could be listed all the same."""

    listing: DataListing
    problems: Problems


def empty_scan(root: Path | None, names: tuple[str, ...], problems: Problems) -> Scan:
    """A scan that found nothing to list, only problems."""
    classes = ClassList(names=names or ("none",))
    splits: dict[str, tuple[str, ...]] = {"train": (), "train_score": (), "val": ()}
    return Scan(DataListing(root, classes, (), splits, {}, tuple(problems.warnings)), problems)


@dataclass(frozen=True)
class IdList:
    """The ids of one split as a file lists them."""

    source: str
    """How messages name the file, e.g. ``ImageSets/Segmentation/val.txt``."""
    entries: tuple[tuple[int, str], ...]
    """(line number, image id)."""
    remedy: str = "put one image id on each line"
    """What to do where the list is empty."""

    @property
    def ids(self) -> tuple[str, ...]:
        """The ids in list order, each once."""
        return tuple(dict.fromkeys(image_id for _, image_id in self.entries))


def some(ids: Sequence[str], limit: int = 5) -> str:
    """The first few of ``ids`` for a message."""
    shown = ", ".join(map(quoted, ids[:limit]))
    return shown if len(ids) <= limit else f"{shown}, …"


def quoted(text: str, limit: int = 80) -> str:
    """Something that was found, for a message: in quotes, with its end left out where it is long."""
    return f"'{_one_line(text if len(text) <= limit else f'{text[:limit]}…')}'"


def _one_line(text: str) -> str:
    return printable(text).replace("\n", r"\n").replace("\t", r"\t")
