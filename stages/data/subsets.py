"""Choose the few training images whose true masks a stage may use: so many, drawn by a seed, or those of a list.

Reads the list; opens no image and no mask.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol

from stages.errors import ConfigError
from stages.ops.seeds import SweepConfig


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


def choose_sweep_images(config: SweepConfig, candidates: Sequence[Candidate]) -> tuple[str, ...]:
    """The ids on which a threshold is chosen; another draw than GAIN_ext's, whose attention knows its own images.

    Args:
        config: How many, or which.
        candidates: The training images, in list order.

    Raises:
        ConfigError: fewer images have masks than are asked for, or a listed one has none or is not trained on.
    """
    masked = [image.id for image in candidates if image.mask is not None and image.labels]
    if config.image_list is not None:
        return _check_listed(config.image_list, [image.id for image in candidates], masked)
    if config.num_images is None or config.num_images > len(masked):
        raise ConfigError(
            f"sweep.num_images asks for {config.num_images} images with true masks; {len(masked)} of the "
            f"{len(candidates)} training images have one: lower it, or give them masks"
        )

    def draw(image_id: str) -> bytes:
        return hashlib.sha256(f"threshold subset {config.seed}: {image_id}".encode()).digest()

    return tuple(sorted(masked, key=draw)[: config.num_images])


def sweep_key_content(config: SweepConfig) -> dict[str, Any]:
    """What of ``config`` decides the choice, as JSON: the ids of the list stand instead of its path.

    Raises:
        ConfigError: the list does not read.
    """
    if config.image_list is not None:
        return {"ids": sorted(_read_ids(config.image_list))}
    return {"num_images": config.num_images, "seed": config.seed}


def _read_ids(path: Path) -> tuple[str, ...]:
    try:
        words = path.read_text(encoding="utf-8").split()
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"sweep.image_list: {path} does not read ({error}); name a text file of image ids") from error
    return tuple(dict.fromkeys(words))


def _check_listed(path: Path, trained: Sequence[str], masked: Sequence[str]) -> tuple[str, ...]:
    wanted, known, usable = _read_ids(path), set(trained), set(masked)
    problems = [
        f"sweep.image_list: {path}: image '{image_id}' "
        + ("has no true mask or no label" if image_id in known else "is not among the training images")
        + "; remove the line"
        for image_id in wanted
        if image_id not in usable
    ]
    if not wanted:
        problems = [f"sweep.image_list: {path}: the list is empty; put one image id on each line"]
    if problems:
        raise ConfigError("sweep.image_list names images that cannot be used", problems)
    return wanted
