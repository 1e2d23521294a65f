"""The image index of a data set, and the pixels and masks that it names.  Sizes are always (height, width)."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Literal

import numpy as np
from numpy.typing import NDArray
from PIL import ExifTags, Image
from pydantic import Field

from stages.contracts.files import read_model
from stages.contracts.masks import MASK_MODES, OBJECT_MASK_MODES, read_index_mask
from stages.contracts.running import StageConfig
from stages.errors import DataError

LEAST_INPUT_PX = 32
"""Shortest side of what a network sees of a whole image: of less, its stride leaves nothing."""

IMAGE_FORMATS = ("JPEG", "PNG", "BMP", "GIF", "WEBP", "TIFF")
"""What an image file may hold, whatever its name says; a phone's MPO opens as JPEG.  No other decoder is tried."""

Box = tuple[int, int, int, int]
"""(x0, y0, x1, y1): first column, first row, last column and last row, counted from 0, all inside the box."""

LabelledBox = tuple[int, Box]
"""A label index (0 … K-1) with the box of one object of that class."""


class ClassList(StageConfig):
    """The foreground classes in order; the one place that knows that class_index = label_index + 1."""

    names: tuple[str, ...] = Field(min_length=1, max_length=65_535)
    """At most ``MAX_MASK_CLASSES`` where there are masks."""

    @property
    def num_foreground(self) -> int:
        """K."""
        return len(self.names)

    @property
    def num_classes(self) -> int:
        """C = K + 1."""
        return len(self.names) + 1

    @property
    def names_with_background(self) -> tuple[str, ...]:
        """C names, background first."""
        return ("background", *self.names)

    @staticmethod
    def class_index(label_index: int) -> int:
        """Mask value (1 … K) of the foreground class ``label_index`` (0 … K-1)."""
        return label_index + 1


class ImageRecord(StageConfig):
    """One image of the data set; paths are relative to the data root, with forward slashes."""

    id: str
    image: str
    size: tuple[int, int]
    """(height, width) in pixels."""
    labels: tuple[int, ...] | None = None
    """Sorted label indices (0 … K-1); None where the image's labels are unknown (val, test)."""
    mask: str | None = None
    """True mask for scores (VOC: SegmentationClass)."""
    full_mask: str | None = None
    """True mask for ``supervision: full`` (VOC: SegmentationClassAug where there is one, else SegmentationClass)."""
    boxes: tuple[LabelledBox, ...] | None = None
    """True boxes inside the image, in the order of the data set's list; None where it has no such list."""


class ImageIndex(StageConfig):
    """Everything ``prepare_data`` knows of the data set."""

    classes: ClassList
    images: tuple[ImageRecord, ...]
    splits: dict[str, tuple[str, ...]]
    """Ids by split, in list order: ``train`` (trained on, labelled), ``train_score`` (those of train whose masks give
    attention and mask scores; may be empty), ``holdout`` (those of train kept from the classifier to measure label
    accuracy when val has no labels), ``val``, ``test``."""
    mask_values: dict[int, int]
    """Raw mask value to class index (0 … K or 255); every other raw value is a defect of the mask."""
    has_object_masks: bool = False
    """Whether masks only say object or not: ``mask_values`` gives 0 or 1, and 1 is the only label of the image."""
    is_single_label: bool = False
    """Whether the data set's format gives each image one label, which excludes the other classes."""

    def record(self, image_id: str) -> ImageRecord:
        """The record of ``image_id``."""
        return self._by_id[image_id]

    @cached_property
    def _by_id(self) -> dict[str, ImageRecord]:
        return {record.id: record for record in self.images}

    def split(self, name: str) -> tuple[ImageRecord, ...]:
        """The records of split ``name`` in list order; empty when there is no such split."""
        return tuple(self.record(image_id) for image_id in self.splits.get(name, ()))


@dataclass(frozen=True)
class ImageSet:
    """An ImageIndex with the folder that its paths are relative to: reads pixels and masks."""

    index: ImageIndex
    root: Path

    def read_image(self, record: ImageRecord) -> NDArray[np.uint8]:
        """RGB pixels, uint8 (H, W, 3).

        Raises:
            DataError: the file is missing or damaged; the path is named.
        """
        return read_rgb(self.root / record.image)

    def read_mask(self, record: ImageRecord, kind: Literal["score", "full"] = "score") -> NDArray[np.uint8]:
        """True mask as class indices 0 … K and 255, uint8 (H, W).

        Raises:
            DataError: there is no such mask, or it has the wrong mode, size or values.
        """
        relative = record.mask if kind == "score" else record.full_mask
        if relative is None:
            raise DataError(f"image '{record.id}' has no true mask for '{kind}'")
        modes = OBJECT_MASK_MODES if self.index.has_object_masks else MASK_MODES
        raw = read_index_mask(self.root / relative, modes=modes)
        if raw.shape != record.size:
            raise DataError(f"{self.root / relative}: expected {record.size} pixels as its image, found {raw.shape}")
        lookup = np.full(256, -1, dtype=np.int16)
        for value, class_index in self.index.mask_values.items():
            lookup[value] = self._object_class(record) if class_index == 1 else class_index
        mask = lookup[raw]
        if (mask < 0).any():
            unknown = sorted(set(np.unique(raw).tolist()) - set(self.index.mask_values))
            raise DataError(f"{self.root / relative}: values {unknown} are no class of this data set")
        return mask.astype(np.uint8)

    def _object_class(self, record: ImageRecord) -> int:
        """What 1 in ``mask_values`` means for this image."""
        if not self.index.has_object_masks:
            return 1
        if record.labels is None or len(record.labels) != 1:
            raise DataError(f"image '{record.id}': its mask says object or not, so it needs exactly one label")
        return ClassList.class_index(record.labels[0])


def open_image_set(prepared: Path, data_root: Path | None) -> ImageSet:
    """Open the output folder of ``prepare_data``.

    Args:
        prepared: The stage's output folder with ``index.json``.
        data_root: Folder of the user's data; None where prepare_data generated the data under ``prepared / "data"``.

    Raises:
        DamagedFileError: the index is missing or damaged.
    """
    index = read_model(prepared / "index.json", ImageIndex, "prepare_data")
    return ImageSet(index=index, root=prepared / "data" if data_root is None else data_root)


def read_rgb(path: Path) -> NDArray[np.uint8]:
    """Decode an image file to RGB, uint8 (H, W, 3), turned upright where its EXIF tag says that it lies.

    Grey becomes RGB, 16 bits a pixel become 8.

    Raises:
        DataError: missing, truncated, no image, or of numbers that have no known white; the path is named.
    """
    try:
        with Image.open(path, formats=IMAGE_FORMATS) as image:
            return np.array(eight_bits(upright(image), path).convert("RGB"))
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        raise DataError(f"{path}: not a readable image ({error}); replace the file or remove the image") from error


def eight_bits(image: Image.Image, path: Path) -> Image.Image:
    """``image`` with 0 … 65535 as 0 … 255 where it has 16 bits a pixel, which Pillow would clip; others as they are.

    Raises:
        DataError: its numbers are floats, or lie outside 0 … 65535.
    """
    if image.mode != "F" and not image.mode.startswith("I"):
        return image
    values = np.asarray(image)
    if image.mode == "F" or values.min() < 0 or values.max() > _LARGEST_16_BIT:
        raise DataError(
            f"{path}: expected 8 or 16 bits a channel, found pixels of mode {image.mode} with values "
            f"{values.min()} … {values.max()}; save it with 8 bits"
        )
    scaled = (values.astype(np.uint32) * 255 + _LARGEST_16_BIT // 2) // _LARGEST_16_BIT
    return Image.fromarray(scaled.astype(np.uint8))


_LARGEST_16_BIT = 65_535

_UPRIGHT = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
"""EXIF orientation to what undoes it (EXIF 2.32, tag 0x0112)."""


def upright(image: Image.Image) -> Image.Image:
    """``image`` as viewers show it: turned by its EXIF orientation; as it is where that is absent or unreadable."""
    image.load()  # a TIFF is turned by this already
    try:
        orientation = image.getexif().get(ExifTags.Base.Orientation, 1)
    except Exception:  # whatever a damaged tag does to Pillow's parser, the pixels are there
        return image
    turn = _UPRIGHT.get(orientation) if isinstance(orientation, int) else None
    return image if turn is None else image.transpose(turn)
