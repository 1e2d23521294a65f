"""Which image belongs to which split: choices by hash, and the checks of lists against each other.

A choice by hash depends on the image id alone: adding images never moves those that were there.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from stages.data.records import DataListing, Problems


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


def hash_fraction(image_id: str, purpose: str) -> float:
    """A number in [0, 1) that depends on ``image_id`` and ``purpose`` alone, spread evenly over ids."""
    digest = hashlib.sha256(f"{purpose}:{image_id}".encode()).digest()
    return int.from_bytes(digest[:8], "big") / 2**64


def hash_half(image_id: str) -> Literal["train_select", "train_report"]:
    """The half of the training images that choices are made on, or the one that scores are reported on."""
    return "train_select" if hashlib.sha256(image_id.encode()).digest()[0] < 128 else "train_report"


def hash_share(ids: Iterable[str], ratio: float, purpose: str) -> tuple[str, ...]:
    """About ``ratio`` of ``ids`` in their order, chosen by hash.

    Never all of them; of two or more at least one when ``ratio`` > 0.
    """
    candidates = tuple(ids)
    chosen = tuple(image_id for image_id in candidates if hash_fraction(image_id, purpose) < ratio)
    if ratio <= 0 or len(candidates) < 2:
        return ()
    if len(chosen) == len(candidates):
        last = max(candidates, key=lambda image_id: hash_fraction(image_id, purpose))
        return tuple(image_id for image_id in candidates if image_id != last)
    if chosen:
        return chosen
    return (min(candidates, key=lambda image_id: hash_fraction(image_id, purpose)),)


def hold_out(listing: DataListing, ratio: float) -> tuple[str, ...]:
    """Training images kept from the classifier to measure its labels: a share by hash, where val has no labels."""
    val = set(listing.splits["val"])
    has_val_labels = any(image.labels is not None for image in listing.images if image.id in val)
    return () if has_val_labels else hash_share(listing.splits["train"], ratio, "holdout")


def check_splits(lists: Mapping[str, IdList], problems: Problems) -> None:
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
            text = f"{listed.source} line {line}: image '{image_id}' stands on line {first_line[image_id]} already"
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


def some(ids: Sequence[str], limit: int = 5) -> str:
    """The first few of ``ids`` for a message; a file name that is not UTF-8 is spelled so that it can be written."""
    shown = ", ".join(f"'{image_id}'" for image_id in ids[:limit])
    shown = shown.encode(errors="backslashreplace").decode()
    return shown if len(ids) <= limit else f"{shown}, …"
