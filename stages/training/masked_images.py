"""What the segmenter learns from: random crops of training images with their masks.

Reads: images; pseudo-masks ``masks/<id>.png`` (class indices, 255 = unsure) and ``confidence/<id>.png`` of
``make_masks``, or the images' true masks; masks that a person has corrected.  Writes nothing.  Torch-free.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from stages.contracts import (
    BACKGROUND_INDEX,
    IGNORE_INDEX,
    ClassList,
    ImageRecord,
    ImageSet,
    Progress,
    read_index_mask,
)
from stages.data.transforms import Augmenter
from stages.errors import DamagedFileError, DataError, MissingArtifactError
from stages.masks.mask_files import read_confidence
from stages.training.randomness import sample_seed

NUM_CHECKED_MASKS = 16
"""Pseudo-masks that are compared with their images' labels before the training."""


@dataclass(frozen=True)
class MaskedImages:
    """Random crops with their masks; picklable, and a pure function of (seed, epoch, index)."""

    image_set: ImageSet
    records: Sequence[ImageRecord]
    mask_folder: Path | None
    """Folder of the pseudo-masks; None reads the true masks."""
    augmenter: Augmenter
    seed: int
    confidence_folder: Path | None = None
    """Folder of the pseudo-masks' confidence; None where all pixels count alike."""
    with_labels: bool = False
    """Whether a sample has its whole image's labels; all records must have some."""
    corrected: Mapping[str, Path] = field(default_factory=dict)
    """Image id to a mask that stands in place of its pseudo-mask, and is sure wherever it is not 255."""

    def __len__(self) -> int:
        """Number of images."""
        return len(self.records)

    def get(self, index: int, epoch: int) -> dict[str, NDArray[Any]]:
        """One training sample.

        Args:
            index: 0 … len - 1.
            epoch: 0-based; another epoch gives another crop.

        Returns:
            ``images`` uint8 (crop, crop, 3), ``masks`` uint8 (crop, crop), and where they are used ``confidence`` uint8
            (crop, crop) and ``labels`` float32 (K,) of 0 and 1.
        """
        record = self.records[index]
        sample = self._crop(record, epoch, index)
        return sample | {"labels": self._labels(record)} if self.with_labels else sample

    def _labels(self, record: ImageRecord) -> NDArray[np.float32]:
        labels = np.zeros(self.image_set.index.classes.num_foreground, dtype=np.float32)
        labels[list(record.labels or ())] = 1
        return labels

    def _crop(self, record: ImageRecord, epoch: int, index: int) -> dict[str, NDArray[Any]]:
        image, mask = self.read_pair(record)
        seed = sample_seed(self.seed, epoch, index)
        if self.confidence_folder is not None:
            if record.id in self.corrected:
                confidence = np.where(mask == IGNORE_INDEX, 0, 255).astype(np.uint8)
            else:
                confidence = read_confidence(self.confidence_folder / f"{record.id}.png", record.size)
            crop, (mask_crop, confidence_crop) = self.augmenter.crop_aligned(image, [mask, confidence], seed=seed)
            return {"images": crop, "masks": mask_crop, "confidence": confidence_crop}
        crop, mask_crop = self.augmenter(image, mask, seed=seed)
        assert mask_crop is not None
        return {"images": crop, "masks": mask_crop}

    def read_pair(self, record: ImageRecord) -> tuple[NDArray[np.uint8], NDArray[np.uint8]]:
        """A whole image, uint8 (H, W, 3), and its mask, uint8 (H, W)."""
        image, mask = self.image_set.read_image(record), self.read_mask(record)
        if image.shape[:2] != mask.shape:
            raise DataError(f"image '{record.id}' has {image.shape[:2]} pixels, its mask {mask.shape}")
        return image, mask

    def read_mask(self, record: ImageRecord) -> NDArray[np.uint8]:
        """The mask to learn of an image, uint8 (H, W): class indices and 255.

        Raises:
            DamagedFileError: a pseudo-mask that does not read or is of another size.
            DataError: a pseudo-mask with a class that the data set does not have; a corrected mask that does not read.
        """
        if record.id in self.corrected:
            return read_index_mask(self.corrected[record.id])  # its size and values were checked before
        if self.mask_folder is None:
            return self.image_set.read_mask(record, "full")
        path = self.mask_folder / f"{record.id}.png"
        try:
            mask = read_index_mask(path)
        except DataError as error:
            raise DamagedFileError(f"{error.message}; rebuild make_masks") from error
        if mask.shape != record.size:
            raise DamagedFileError(f"{path}: expected {record.size} pixels, found {mask.shape}; rebuild make_masks")
        classes = self.image_set.index.classes
        if ((mask >= classes.num_classes) & (mask != IGNORE_INDEX)).any():
            raise DataError(
                f"{path} is of another class list: expected values below {classes.num_classes} (background, "
                f"{', '.join(classes.names[:5])}{' …' if len(classes.names) > 5 else ''}) or 255, found "
                f"{np.unique(mask).tolist()}; give the masks that make_masks made of this data set"
            )
        return mask


def check_class_list(dataset: MaskedImages) -> None:
    """Refuse pseudo-masks of another class list: most of them show classes that their images do not have.

    Raises:
        DataError: as said, or as ``MaskedImages.read_mask``.
    """
    if dataset.mask_folder is None:
        return
    labelled = [r for r in dataset.records if r.labels is not None and r.id not in dataset.corrected]
    chosen = labelled[:: max(1, len(labelled) // NUM_CHECKED_MASKS)][:NUM_CHECKED_MASKS]
    strange = [record.id for record in chosen if _strange_classes(record, dataset.read_mask(record))]
    if strange and 2 * len(strange) > len(chosen):
        raise DataError(
            f"the pseudo-masks in {dataset.mask_folder} are of another class list, or of one in another order: "
            f"{len(strange)} of {len(chosen)} show a class that their image is not labelled with ({strange[0]} …); the "
            f"data set has {', '.join(dataset.image_set.index.classes.names)}"
        )


def _strange_classes(record: ImageRecord, mask: NDArray[np.uint8]) -> set[int]:
    known = {ClassList.class_index(label) for label in record.labels or ()} | {BACKGROUND_INDEX, IGNORE_INDEX}
    return set(np.unique(mask).tolist()) - known


def confidence_folder(masks: Path) -> Path:
    """Where the confidence of the pseudo-masks in make_masks' output is.

    Raises:
        MissingArtifactError: it is not there.
    """
    folder = masks / "confidence"
    if not folder.is_dir():
        raise MissingArtifactError(
            f"loss_weighting: confidence needs {folder}, which make_masks writes with soft: true; run it so, or take "
            "loss_weighting: none"
        )
    return folder


def supervised_records(
    supervision: Literal["weak", "full"],
    image_set: ImageSet,
    masks: Path | None,
    progress: Progress,
    *,
    corrected: Collection[str] = (),
) -> tuple[list[ImageRecord], Path | None]:
    """The training images that have a mask, and the folder of pseudo-masks (None: true masks).

    Args:
        supervision: weak: pseudo-masks; full: true masks.
        image_set: The data set.
        masks: Output folder of ``make_masks``; needed by weak.
        progress: Told of images that are left out.
        corrected: Ids of images that need no pseudo-mask.

    Raises:
        MissingArtifactError: ``masks`` is needed and not given.
        DataError: no training image has a mask.
    """
    train_records = image_set.index.split("train")
    if supervision == "full":
        folder, kind = None, "true mask"
        records = [record for record in train_records if record.full_mask is not None]
    else:
        if masks is None:
            raise MissingArtifactError("supervision: weak needs the folder of make_masks; run make_masks first")
        folder, kind = masks / "masks", "pseudo-mask"
        present = {path.stem for path in folder.glob("*.png")} | set(corrected)
        records = [record for record in train_records if record.id in present]
    if not records:
        where = "the data set" if folder is None else str(folder)
        raise DataError(f"none of the {len(train_records)} images of split train has a {kind} in {where}")
    if len(records) < len(train_records):
        missing = len(train_records) - len(records)
        progress.warn(f"{missing} of {len(train_records)} training images have no {kind} and are left out")
    return records, folder
