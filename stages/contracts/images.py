"""The image index of a data set, and the pixels and masks that it names.  Sizes are always (height, width)."""

from __future__ import annotations

import contextlib
import importlib
import io
import stat
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Literal

import numpy as np
from numpy.typing import NDArray
from PIL import Image, UnidentifiedImageError, features
from pydantic import Field

from stages.contracts.decoding import UPRIGHT, open_quietly, orientation_of
from stages.contracts.files import read_model, stand_in
from stages.contracts.masks import MASK_MODES, OBJECT_MASK_MODES, read_index_mask
from stages.contracts.running import StageConfig
from stages.errors import DataError

LEAST_INPUT_PX = 32
"""Shortest side of what a network sees of a whole image: of less, its stride leaves nothing."""

IMAGE_SUFFIXES = (
    *(".jpg", ".jpeg", ".jpe", ".jfif", ".png", ".bmp", ".gif", ".webp", ".tif", ".tiff"),
    *(".avif", ".heic", ".heif"),
)
"""Names of image files in folders of the user's, whatever their case; what a file holds is told by its bytes."""

_FORMATS = ("JPEG", "PNG", "BMP", "GIF", "WEBP", "TIFF")
"""What every Pillow reads; a phone's MPO opens as JPEG."""
_HAS_AVIF = "avif" in features.modules and bool(features.check("avif"))
IMAGE_FORMATS = (*_FORMATS, "AVIF") if _HAS_AVIF else _FORMATS
"""What an image file may hold, whatever its name says, and HEIC where pillow-heif is installed.  No other decoder is
tried."""

_AVIF_BRANDS = (b"avif", b"avis")
_HEIC_BRANDS = (b"heic", b"heix", b"hevc", b"hevx", b"heim", b"heis", b"mif1", b"msf1")
"""The kinds of ISO 23008-12's files, which say at byte 4 that they are one and at byte 8 which."""
_HEAD_BYTES = 512

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
    """Decode an image file to RGB, uint8 (H, W, 3), as ``read_image`` does."""
    return read_image(path)[0]


def read_image(path: Path, data: bytes | None = None) -> tuple[NDArray[np.uint8], int]:
    """Decode an image file; whoever looks at images of the user's reads them by this, so that all see the same.

    It is turned upright by its EXIF orientation; grey becomes RGB; transparency is left aside; 0 … 65535 becomes
    0 … 255; of an animation or a stack of pages, the first picture is taken.

    Args:
        path: The file.
        data: Its content, where that was read already.

    Returns:
        RGB, uint8 (H, W, 3), upright; and the EXIF orientation, 1 … 8, that the file has (1 is upright).

    Raises:
        DataError: missing, no file, no image, cut off, or of numbers that have no known white; the path is named.
    """
    with _open_image(path, data) as image:
        orientation = orientation_of(image)
        image.load()  # a TIFF is turned by this already
        turn = UPRIGHT.get(orientation_of(image))
        image = _eight_bits(image if turn is None else image.transpose(turn), path)
        if image.mode == "P" and "transparency" in image.info:
            image = image.convert("RGBA")  # straight to RGB Pillow warns of what we mean
        return np.array(image.convert("RGB")), orientation


def read_image_size(path: Path) -> tuple[int, int]:
    """The upright size that the head of an image file tells.

    Raises:
        DataError: no image, or the file cannot be read.
    """
    with _open_image(path) as image:
        width, height = image.size
        return (width, height) if orientation_of(image) >= 5 else (height, width)


def odd_kind(path: Path) -> str | None:
    """What ``path`` is where it is no plain file (or a link to one), and so nothing to read; else None.

    Raises:
        OSError: it is not there or cannot be looked at.
    """
    mode = path.stat().st_mode
    kinds = {stat.S_IFDIR: "a folder", stat.S_IFIFO: "a pipe", stat.S_IFSOCK: "a socket"}
    return None if stat.S_ISREG(mode) else kinds.get(stat.S_IFMT(mode), "a device")


@contextlib.contextmanager
def _open_image(path: Path, data: bytes | None = None) -> Iterator[Image.Image]:
    """The opened image; whatever goes wrong with it before the end of ``with`` becomes a DataError."""
    try:
        formats = _formats_of(path, _head(path) if data is None else data[:_HEAD_BYTES])
        with open_quietly(path if data is None else io.BytesIO(data), formats) as image:
            yield image
    except (DataError, MemoryError):
        raise
    except Exception as error:  # a decoder answers damaged bytes with whatever it trips over
        reason = _reason(error, path, data)
        raise DataError(f"{path}: not a readable image ({reason}); replace the file or remove the image") from error


def _head(path: Path) -> bytes:
    """The first bytes of a file; of a pipe they might never come."""
    if (kind := odd_kind(path)) is not None:
        raise DataError(f"{path}: expected an image file, found {kind}; name a file")
    with path.open("rb") as file:
        return file.read(_HEAD_BYTES)


def _formats_of(path: Path, head: bytes) -> tuple[str, ...]:
    """The decoders to try.

    Raises:
        DataError: it is an image of a kind that none of those that are installed reads.
    """
    brand = head[8:12] if head[4:8] == b"ftyp" else b""
    if brand in _HEIC_BRANDS and not (brand in {b"mif1", b"msf1"} and b"avif" in head[12:64]):
        try:
            importlib.import_module("pillow_heif").register_heif_opener()
        except ImportError as error:
            raise DataError(
                f"{path}: a HEIC image, which Pillow cannot read; convert it to JPEG or PNG, or pip install pillow-heif"
            ) from error
        return ("HEIF",)
    if brand in _AVIF_BRANDS and not _HAS_AVIF:
        raise DataError(
            f"{path}: an AVIF image, which this Pillow cannot read; convert it to JPEG or PNG, or pip install "
            "--upgrade pillow (11.3 or later)"
        )
    return IMAGE_FORMATS


def _reason(error: Exception, path: Path, data: bytes | None) -> str:
    """Why an image cannot be read, in words."""
    if isinstance(error, OSError) and error.strerror:
        return error.strerror.lower()
    if isinstance(error, UnidentifiedImageError):
        found = stand_in(_head(path) if data is None else data[:_HEAD_BYTES])
        return found or f"it holds none of {', '.join(IMAGE_FORMATS)}"
    if isinstance(error, Image.DecompressionBombError):
        limit = 2 * (Image.MAX_IMAGE_PIXELS or 0)
        return f"it has more than {limit:,} pixels, which is taken for an attack; cut it into tiles"
    return str(error) or type(error).__name__


def _eight_bits(image: Image.Image, path: Path) -> Image.Image:
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
