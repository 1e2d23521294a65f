"""Choose some images of a data set: those of a list, so many drawn by a seed, or a share by hash.

Reads the list; opens no image and no mask.  A share by hash is never less than asked for, so that small sets get theirs
too.  n images more or less move at most about as many others.
"""

from __future__ import annotations

import hashlib
import math
from collections import Counter
from collections.abc import Collection, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, Protocol, Self, TypeVar

from pydantic import Field, model_validator

from stages.contracts import StageConfig
from stages.data.names import ImageNames
from stages.data.readers import read_id_list
from stages.data.records import PROBLEMS_SHOWN, DataListing, Problems, quoted
from stages.errors import ConfigError

Label = TypeVar("Label", int, str)


class SweepConfig(StageConfig):
    """Training images with true masks on which ``threshold`` is chosen; all are recorded as mask supervision."""

    num_images: int | None = Field(default=100, ge=1)
    """How many, drawn by ``seed`` among the training images that have a true mask and a label."""
    seed: int = Field(default=0, ge=0, lt=2**32)
    """Which ones; a larger subset of one seed contains the smaller."""
    image_list: Path | None = None
    """File with one image id a line, instead of ``num_images`` and ``seed``."""

    @model_validator(mode="before")
    @classmethod
    def _prefer_list(cls, values: Any) -> Any:  # noqa: ANN401 - pydantic hands over whatever the user wrote
        """A list stands instead of the default number."""
        if isinstance(values, dict) and values.get("image_list") is not None:
            return {"num_images": None, **values}
        return values

    @model_validator(mode="after")
    def _check_choice(self) -> Self:
        if (self.num_images is None) == (self.image_list is None):
            raise ValueError(
                f"give exactly one of num_images and image_list, got {self.num_images} and {self.image_list}"
            )
        return self


class Candidate(Protocol):
    """What the choice rests on; listed images and those of an index have it."""

    @property
    def id(self) -> str:
        """The image's id."""
        ...

    @property
    def labels(self) -> tuple[int, ...] | None:
        """Its label indices."""
        ...

    @property
    def mask(self) -> str | None:
        """Its official true mask, where it has one."""
        ...


def choose_masked(
    candidates: Sequence[Candidate],
    *,
    count: int | None,
    path: Path | None,
    draw: str,
    options: tuple[str, str],
    lacks: str,
    unknown: str,
) -> tuple[str, ...]:
    """Ids of images with labels and a true mask: those of a list, else a draw.

    Args:
        candidates: The training images, in list order.
        count: How many to draw.
        path: The list, in place of the draw.
        draw: Names the draw, its seed included; another name is another draw.
        options: What ``count`` and ``path`` are called in the config.
        lacks: What is wrong with a listed image that cannot be used.
        unknown: What is wrong with one that is none of the candidates.

    Raises:
        ConfigError: fewer images have masks than are asked for, or a listed one cannot be used.
    """
    masked = [image.id for image in candidates if image.mask is not None and image.labels]
    if path is not None:
        return _check_listed(path, options[1], {image.id for image in candidates}, set(masked), lacks, unknown)
    if count is None or count > len(masked):
        raise ConfigError(
            f"{options[0]} asks for {count} images with true masks; {len(masked)} of the "
            f"{len(candidates)} training images have one: lower it, or give them masks"
        )
    return tuple(sorted(masked, key=lambda image_id: hashlib.sha256(f"{draw}: {image_id}".encode()).digest())[:count])


def read_ids(path: Path, option: str) -> tuple[str, ...]:
    """The ids of a list, one on each line, each once, in its order.

    Raises:
        ConfigError: it does not read; ``option`` is what named it.
    """
    problems = Problems()
    listed = read_id_list(path, str(path), problems)
    if listed is None or problems:
        lines = [f"{option}: {line}" for line in problems.lines(PROBLEMS_SHOWN)]
        raise ConfigError(f"{option}: {path} does not read; name a text file of image ids", lines)
    return listed.ids


def _check_listed(
    path: Path, option: str, known: Collection[str], usable: Collection[str], lacks: str, unknown: str
) -> tuple[str, ...]:
    names = ImageNames(dict.fromkeys(known, ""))
    wanted = tuple(dict.fromkeys(names.get(image_id) or image_id for image_id in read_ids(path, option)))
    problems = [
        f"{option}: {path}: image {quoted(image_id)} {lacks if image_id in known else unknown}; remove the line"
        for image_id in wanted
        if image_id not in usable
    ]
    if not wanted:
        problems = [f"{option}: {path}: the list is empty; put one image id on each line"]
    if problems:
        raise ConfigError(f"{option} names images that cannot be used", problems)
    return wanted


# ---------------------------------------------------------------------------------------------------------------------
# The subset of make_masks.sweep
# ---------------------------------------------------------------------------------------------------------------------

_SWEEP_LIST = "sweep.image_list"


def choose_sweep_images(config: SweepConfig, candidates: Sequence[Candidate]) -> tuple[str, ...]:
    """The ids on which a threshold is chosen; another draw than GAIN_ext's, whose attention knows its own images.

    Args:
        config: How many, or which.
        candidates: The training images, in list order.

    Raises:
        ConfigError: fewer images have masks than are asked for, or a listed one has none or is not trained on.
    """
    return choose_masked(
        candidates,
        count=config.num_images,
        path=config.image_list,
        draw=f"threshold subset {config.seed}",
        options=("sweep.num_images", _SWEEP_LIST),
        lacks="has no true mask or no label",
        unknown="is not among the training images",
    )


def sweep_key_content(config: SweepConfig) -> dict[str, Any]:
    """What of ``config`` decides the choice, as JSON: the ids of the list stand instead of its path.

    Raises:
        ConfigError: the list does not read.
    """
    if config.image_list is not None:
        return {"ids": sorted(read_ids(config.image_list, _SWEEP_LIST))}
    return {"num_images": config.num_images, "seed": config.seed}


# ---------------------------------------------------------------------------------------------------------------------
# Shares by hash
# ---------------------------------------------------------------------------------------------------------------------


def hash_fraction(image_id: str, purpose: str) -> float:
    """A number in [0, 1) that depends on ``image_id`` and ``purpose`` alone, spread evenly over ids."""
    digest = hashlib.sha256(f"{purpose}:{image_id}".encode()).digest()
    return int.from_bytes(digest[:8], "big") / 2**64


def hash_half(image_id: str) -> Literal["train_select", "train_report"]:
    """The half of the training images that choices are made on, or the one that scores are reported on."""
    return "train_select" if hashlib.sha256(image_id.encode()).digest()[0] < 128 else "train_report"


def hash_share(
    ids: Iterable[str], ratio: float, purpose: str, labels: Mapping[str, Collection[Label]] | None = None
) -> tuple[str, ...]:
    """``ratio`` of ``ids``, rounded up, in their order: those with the smallest hashes.

    Without ``labels``, whatever has a hash below ``ratio`` is chosen, though that be some more: such an id stays chosen
    whatever others come.  With ``labels`` the share is exact, but each class of two or more images has one among the
    chosen, where it can: the share grows for that, and no choice takes the last image of a class away.

    Args:
        ids: The candidates; never all of them are chosen, and of two or more at least one when ``ratio`` > 0.
        ratio: 0 … 1.
        purpose: Another purpose is another choice.
        labels: Id to classes, of the candidates and of whatever images stay with those that are not chosen.

    Returns:
        The chosen ids.
    """
    order = tuple(dict.fromkeys(ids))
    if ratio <= 0 or len(order) < 2:
        return ()
    count = min(max(math.ceil(ratio * len(order) - 1e-9), 1), len(order) - 1)
    ranked = sorted(order, key=lambda image_id: hash_fraction(image_id, purpose))
    if labels:
        chosen = _covering(ranked, count, labels) or {ranked[0]}
    else:
        below = sum(hash_fraction(image_id, purpose) < ratio for image_id in ranked)
        chosen = set(ranked[: min(max(count, below), len(ranked) - 1)])
    return tuple(image_id for image_id in order if image_id in chosen)


def _covering(ranked: Sequence[str], count: int, labels: Mapping[str, Collection[Label]]) -> set[str]:
    """The first of ``ranked`` that show each class, then the first ones up to ``count``; each class keeps an image."""
    left = Counter(label for found in labels.values() for label in set(found))
    bearers: dict[Label, list[str]] = {label: [] for label in left}
    for image_id in ranked:
        for label in set(labels.get(image_id, ())):
            bearers[label].append(image_id)
    chosen: set[str] = set()

    def take(candidates: Iterable[str], wanted: int) -> None:
        for image_id in candidates:
            if wanted <= 0 or len(chosen) == len(ranked) - 1:
                return
            own = set(labels.get(image_id, ()))
            if image_id not in chosen and all(left[label] > 1 for label in own):
                chosen.add(image_id)
                left.subtract(own)
                wanted -= 1

    # the rarest first: its few images may show the others too
    for label in sorted(bearers, key=lambda label: (len(bearers[label]), label)):
        if chosen.isdisjoint(bearers[label]):
            take(bearers[label], 1)
    take(ranked, count - len(chosen))
    return chosen


def hold_out(listing: DataListing, ratio: float) -> tuple[str, ...]:
    """Training images kept from the classifier to measure its labels: a share by hash, where val has no labels."""
    val = set(listing.splits["val"])
    has_val_labels = any(image.labels is not None for image in listing.images if image.id in val)
    return () if has_val_labels else hash_share(listing.splits["train"], ratio, "holdout")
