"""Attention of the training images, window by window, straight from the trained classifier.

``make_attention`` stores these windows as its shards; where maps are not kept, ``make_masks`` takes them as they come.
A window is ``shard_images`` neighbours of the training list.  Batches are planned from whole windows and the images'
sizes alone, so that whoever computes a window, with whatever else, finds the same maps.
Reads: the images and labels of split ``train`` (never a mask), the trained classifier, ``views.json``.
Writes: ``views.json``, which stands for the maps where none are kept.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal, NamedTuple

import numpy as np
from numpy.typing import NDArray
from pydantic import Field, ValidationError, field_validator

from stages.contracts import (
    AttentionRecord,
    ImageRecord,
    ImageSet,
    Progress,
    Runtime,
    read_json,
    write_json,
)
from stages.errors import DamagedFileError, DataError, InputError
from stages.masks.attention_maps import BROKEN_WEIGHTS
from stages.ops.devices import ForwardConfig

if TYPE_CHECKING:
    from stages.masks.extraction import AttentionExtractor

VIEWS_FILE = "views.json"


class AttentionConfig(ForwardConfig):
    """How the trained classifier looks at an image, and how finely its attention is kept."""

    scales: tuple[Annotated[float, Field(ge=0.1, le=4.0)], ...] = Field(default=(0.5, 1.0, 1.5, 2.0), min_length=1)
    """Sizes, relative to the image (or to ``short_side_px``), that the maps are averaged over.
    Source: irn (a2ece00) run_sample.py, cam_scales."""
    flip: bool = True
    """Look at the mirrored image too, at every scale."""
    short_side_px: int | None = Field(default=None, ge=16, le=4096)
    """Resize the image's shorter side to this before the scales; None keeps the file's size."""
    map_stride: Literal[1, 2, 4, 8] = 4
    """Pixels of the original image per stored cell; 4 is irn's quarter resolution."""
    shard_images: int = Field(default=64, ge=1, le=4096)
    """Images per file: what an interrupted run loses at most."""

    @field_validator("scales")
    @classmethod
    def _check_scales(cls, scales: tuple[float, ...]) -> tuple[float, ...]:
        if len(set(scales)) != len(scales):
            raise ValueError(f"each scale may stand once, got {list(scales)}; drop the repeated one")
        return scales


# ---------------------------------------------------------------------------------------------------------------------
# Maps that are not kept
# ---------------------------------------------------------------------------------------------------------------------


def write_views(folder: Path, config: AttentionConfig) -> None:
    """Write what stands for the maps where they are not kept: how to look at the images."""
    content = config.key_content()
    write_json(folder / VIEWS_FILE, {name: content[name] for name in AttentionConfig.model_fields if name in content})


def read_views(folder: Path) -> AttentionConfig | None:
    """What ``make_attention`` wrote in place of maps; None where it stored them.

    Args:
        folder: Output folder of ``make_attention``.

    Raises:
        DamagedFileError: the file does not read back.
    """
    path = folder / VIEWS_FILE
    if not path.exists():
        return None
    try:
        return AttentionConfig.model_validate(read_json(path))
    except ValidationError as error:
        raise DamagedFileError(
            f"{path} does not say how to look at images ({error}); rebuild make_attention"
        ) from error


# ---------------------------------------------------------------------------------------------------------------------
# Windows
# ---------------------------------------------------------------------------------------------------------------------


class Window(NamedTuple):
    """Neighbours of the training list."""

    number: int
    records: Sequence[ImageRecord]


def training_windows(image_set: ImageSet, config: AttentionConfig) -> list[Window]:
    """The training images in windows of ``shard_images``, in order.

    Raises:
        DataError: an image has no labels, or there is no image.
    """
    records = list(image_set.index.split("train"))
    unlabelled = [f"image '{record.id}' of split train has no labels" for record in records if record.labels is None]
    if unlabelled:
        raise DataError("attention maps are made for known labels; label these images or drop them", unlabelled)
    if not records:
        raise DataError("split train has no images; attention maps are made for training images")
    starts = range(0, len(records), config.shard_images)
    return [Window(number, records[start : start + config.shard_images]) for number, start in enumerate(starts)]


class WindowAttention:
    """The trained classifier on a device, and the maps that it gives."""

    def __init__(
        self,
        config: AttentionConfig,
        *,
        classifier: Path,
        images: ImageSet,
        progress: Progress,
        runtime: Runtime,
    ) -> None:
        """Load the classifier onto the device, after a look at whether it fits the data.

        Args:
            config: Scales, flips and the resolution.
            classifier: Output folder of ``train_classifier``.
            images: The data set.
            progress: Warned when the device is too small for a batch.
            runtime: Device, threads, and the threads that read images ahead (``workers``).

        Raises:
            InputError: the classifier knows other classes.
        """
        self._config, self._images, self._workers = config, images, runtime.workers
        self._extractor = _open_extractor(config, classifier, images, progress, runtime)
        self._num_classes = images.index.classes.num_foreground
        self._seen: set[int] = set()
        self._first_image: str | None = None
        self._is_any_finite = False

    def batches(self, windows: Iterable[Window]) -> Iterator[tuple[Window, list[AttentionRecord]]]:
        """The attention of all images of the windows, a batch at a time; windows in order, each finished in turn.

        Within a window, images without any label come first and the others as their sizes share batches.

        Raises:
            DataError: an image cannot be read or changed its size.
            InputError: no map of many classes is finite.
            EnvironmentFailure: the device cannot hold one image.
        """
        from stages.data.whole_images import prefetch
        from stages.ops.attention import map_size

        stride = self._config.map_stride
        for (window, batch), inputs in prefetch(self._load, self._plan(windows), workers=self._workers):
            if inputs:
                records = self._extractor.records(batch, inputs, is_nan_borne=True)
                self._refuse_nan_alone(records)
            else:
                records = [_without_labels(image, map_size(image.size, stride)) for image in batch]
            yield window, records

    def _plan(self, windows: Iterable[Window]) -> Iterator[tuple[Window, list[ImageRecord]]]:
        from stages.masks.extraction import plan_batches

        for window in windows:
            bare = [image for image in window.records if not image.labels]
            if bare:
                yield window, bare
            labelled = [image for image in window.records if image.labels]
            for batch in plan_batches(labelled, self._extractor.views, self._extractor.budget_px):
                yield window, batch

    def _load(self, job: tuple[Window, list[ImageRecord]]) -> list[NDArray[np.uint8]]:
        """The network's inputs; none for images without labels, which are not read."""
        from stages.data.whole_images import read_checked
        from stages.masks.extraction import build_inputs

        _, batch = job
        if not batch[0].labels:
            return []
        return build_inputs([read_checked(self._images, image) for image in batch], self._extractor.views)

    def _refuse_nan_alone(self, records: Sequence[AttentionRecord]) -> None:
        """Stop early where nothing finite comes, whatever the class; one broken class is borne."""
        for record in records:
            self._seen.update(record.labels)
            self._is_any_finite |= bool(np.isfinite(record.peaks).any())
            self._first_image = self._first_image or record.id
        if not self._is_any_finite and len(self._seen) * 2 > self._num_classes:
            raise InputError(
                f"image '{self._first_image}': attention maps must be finite, found NaN or infinity here and in every "
                f"image so far; {BROKEN_WEIGHTS}"
            )


def check_classes(classifier: Path, images: ImageSet) -> None:
    """Make sure that a classifier was trained on the classes of the data.

    Raises:
        InputError: it was trained on others.
        DamagedFileError: its description does not read back.
    """
    from stages.methods.classifier_files import read_description

    known, wanted = read_description(classifier).classes, images.index.classes
    if known != wanted:
        raise InputError(
            f"the classifier in {classifier} knows the classes {list(known.names)}, the data has {list(wanted.names)}; "
            "train it on this data"
        )


def _open_extractor(
    config: AttentionConfig, classifier: Path, images: ImageSet, progress: Progress, runtime: Runtime
) -> AttentionExtractor:
    from stages.masks.extraction import AttentionExtractor, Views
    from stages.methods.classifier_files import load_classifier
    from stages.ops.devices import resolve_device

    check_classes(classifier, images)
    device = resolve_device(runtime)
    network, method = load_classifier(classifier, device)
    return AttentionExtractor(
        network,
        method,
        views=Views(config.scales, config.flip, config.short_side_px),
        map_stride=config.map_stride,
        num_foreground=images.index.classes.num_foreground,
        device=device,
        warn=progress.warn,
        precision=config.precision,
    )


def _without_labels(image: ImageRecord, size: tuple[int, int]) -> AttentionRecord:
    maps, peaks = np.zeros((0, *size), dtype=np.uint8), np.zeros(0, dtype=np.float32)
    return AttentionRecord(image.id, image.size, (), maps, peaks)
