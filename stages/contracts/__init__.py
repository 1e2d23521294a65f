"""What the stages exchange: image index, attention maps, index masks; read, write and check.

Reads and writes JSON, npz without pickle, and palette PNG; never unpickles.  Imports neither torch nor pipeline code.
Shapes: K foreground classes, C = K + 1 with background, n labels of one image, H W image pixels, h w map cells.
Sizes are always (height, width).
"""

from __future__ import annotations

import json
import os
import tempfile
import zipfile
import zlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache, cached_property
from pathlib import Path
from typing import Annotated, Any, Literal, Protocol

import numpy as np
from numpy.typing import NDArray
from PIL import ExifTags, Image, PngImagePlugin
from pydantic import BaseModel, ConfigDict, Field

from stages.errors import DamagedFileError, DataError

IGNORE_INDEX = 255
"""Mask value of pixels that count neither in a loss nor in a score (VOC's void)."""

BACKGROUND_INDEX = 0
"""Mask value of background."""

MAX_MASK_CLASSES = 254
"""The most foreground classes that a mask of bytes can tell apart, beside background and 255."""

LEAST_INPUT_PX = 32
"""Shortest side of what a network sees of a whole image: of less, its stride leaves nothing."""

IMAGE_FORMATS = ("JPEG", "PNG", "BMP", "GIF", "WEBP", "TIFF")
"""What an image file may hold, whatever its name says; a phone's MPO opens as JPEG.  No other decoder is tried."""

MASK_FORMATS = ("PNG",)
"""What a mask file may hold."""

MASK_MODES = ("P", "L")
"""Pixel modes of a mask of class indices."""

OBJECT_MASK_MODES = ("P", "L", "LA")
"""Pixel modes of a mask that only says object or not; transparency is left aside."""

Box = tuple[int, int, int, int]
"""(x0, y0, x1, y1): first column, first row, last column and last row, counted from 0, all inside the box."""

LabelledBox = tuple[int, Box]
"""A label index (0 … K-1) with the box of one object of that class."""


class StageConfig(BaseModel):
    """Base of every config class: unknown keys are refused, instances are immutable."""

    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True)


# ---------------------------------------------------------------------------------------------------------------------
# Running a stage
# ---------------------------------------------------------------------------------------------------------------------


class Progress(Protocol):
    """Where a stage reports to; the terminal, Prefect and tests each bring their own."""

    def step(self, task: str, done: int, total: int, *, unit: str = "images", **values: float) -> None:
        """``done`` of ``total`` units of ``task`` are finished; ``values`` are shown beside the bar (loss=…).

        Called as often as the stage likes, first with what was there already: listeners draw as seldom as they like.
        """
        ...

    def begin(self, task: str, *, total: int, done: int = 0, unit: str = "images") -> None:
        """Start a countable task of ``total`` units of which ``done`` were there already (resumed)."""
        ...

    def advance(self, count: int = 1, **values: float) -> None:
        """Count ``count`` finished units; ``values`` are shown beside the bar (loss=…)."""
        ...

    def info(self, text: str) -> None:
        """Say one line."""
        ...

    def warn(self, text: str) -> None:
        """Say one line that the user should not miss; kept in the run's result."""
        ...


class SilentProgress:
    """A Progress that says nothing and keeps the warnings (notebooks and tests)."""

    def __init__(self) -> None:
        """Start with no warnings."""
        self.warnings: list[str] = []

    def step(self, task: str, done: int, total: int, *, unit: str = "images", **values: float) -> None:
        """Ignore."""

    def begin(self, task: str, *, total: int, done: int = 0, unit: str = "images") -> None:
        """Ignore."""

    def advance(self, count: int = 1, **values: float) -> None:
        """Ignore."""

    def info(self, text: str) -> None:
        """Ignore."""

    def warn(self, text: str) -> None:
        """Keep ``text``."""
        self.warnings.append(text)


class Runtime(StageConfig):
    """How to run, not what to compute: no field is in a key.

    Another kind or number of devices moves the last bits of float arithmetic.  Where ``crf.backend`` is auto,
    ``device`` decides what it means, and the key names that.
    """

    device: str = Field(default="auto", pattern=r"^(auto|cpu|mps|cuda(:\d+)?)$")
    """auto takes cuda, then mps, then cpu."""
    workers: int = Field(default=2, ge=0, le=128)
    """Data loading processes; 0 loads in the main process."""
    processes: int = Field(default=0, ge=0, le=512)
    """Processes for per-image CPU work such as the CRF; 0 means one per core."""
    threads: int = Field(default=0, ge=0, le=512)
    """Torch threads; 0 leaves torch's default."""
    devices: Annotated[int, Field(ge=1, le=64)] | Literal["auto"] = 1
    """Devices that one training is spread over; auto takes every CUDA device that this process may see."""
    checkpoint_every_s: float = Field(default=30.0, ge=0, le=86_400)
    """Seconds of training that a kill may cost; 0 keeps a checkpoint of every step."""
    shards: int = Field(default=1, ge=1, le=4096)
    """Parts that attention and masks are made in; with more than one, every run of the same config that reaches the
    same store, here or on another machine, takes free parts and so shares the work."""


@dataclass(frozen=True)
class Part:
    """One of ``count`` parts that a stage's work is cut into; everything is in exactly one of them."""

    index: int
    """0 … count - 1."""
    count: int

    def __post_init__(self) -> None:
        if not 0 <= self.index < self.count:
            raise ValueError(f"a part is numbered 0 … {self.count - 1}, got {self.index}")

    def positions(self, total: int) -> range:
        """Which of ``total`` things are this part's: neighbours, as many as another part's or one more or less."""
        return range(self.index * total // self.count, (self.index + 1) * total // self.count)


@dataclass(frozen=True)
class StageResult:
    """What a stage returns beside the files it wrote under ``out``."""

    metrics: dict[str, Any] = field(default_factory=dict)
    """Flat dotted names to floats in [0, 1] (or dicts of them), e.g. ``{"masks.coverage": 0.93}``."""
    mask_supervision: tuple[str, ...] = ()
    """Ids of the training images whose pixel masks were used."""


# ---------------------------------------------------------------------------------------------------------------------
# Files
# ---------------------------------------------------------------------------------------------------------------------


def write_atomic(path: Path, data: bytes) -> None:
    """Write ``data`` to ``path`` so that a reader sees the old file or the whole new one, never a part."""
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=".tmp-")
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        Path(name).chmod(0o644)
        Path(name).replace(path)
    except BaseException:
        Path(name).unlink(missing_ok=True)
        raise


def write_json(path: Path, value: object) -> None:
    """Write ``value`` as sorted, indented JSON, atomically; equal values give equal bytes."""
    text = json.dumps(value, indent=1, sort_keys=True, allow_nan=False, ensure_ascii=False)
    write_atomic(path, (text + "\n").encode())


def read_json(path: Path) -> Any:  # noqa: ANN401 - JSON is any
    """Read JSON that ``write_json`` wrote.

    Raises:
        DamagedFileError: the file is missing or is not JSON.
    """
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise DamagedFileError(f"{path} is not readable JSON ({error}); rebuild the artifact that holds it") from error


# ---------------------------------------------------------------------------------------------------------------------
# Classes and images
# ---------------------------------------------------------------------------------------------------------------------


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
    """
    index = ImageIndex.model_validate(read_json(prepared / "index.json"))
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


# ---------------------------------------------------------------------------------------------------------------------
# Index masks (palette PNG)
# ---------------------------------------------------------------------------------------------------------------------


@cache
def voc_palette() -> NDArray[np.uint8]:
    """VOC's 256 colours, uint8 (256, 3), read-only: bit k of the index goes, by threes, to the high bits of R, G, B.

    Source: VOCdevkit, VOCcode/VOClabelcolormap.m.
    """
    palette = np.zeros((256, 3), dtype=np.uint8)
    for index in range(256):
        rest = index
        for shift in range(7, -1, -1):
            for channel in range(3):
                palette[index, channel] |= ((rest >> channel) & 1) << shift
            rest >>= 3
    palette.flags.writeable = False
    return palette


def write_index_mask(path: Path, mask: NDArray[np.uint8]) -> None:
    """Write class indices (H, W) as a palette PNG (mode P, VOC's colours), atomically."""
    write_atomic(path, encode_index_mask(mask))


def encode_index_mask(mask: NDArray[np.uint8], texts: Mapping[str, str] | None = None) -> bytes:
    """The palette PNG (mode P, VOC's colours) of class indices (H, W); ``texts`` are kept in it by their keywords."""
    import io

    if mask.dtype != np.uint8 or mask.ndim != 2:
        raise ValueError(f"a mask must be uint8 of shape (H, W), got {mask.dtype} {mask.shape}")
    image, info = Image.fromarray(mask), PngImagePlugin.PngInfo()
    image.putpalette(voc_palette().tobytes())
    for keyword, text in (texts or {}).items():
        info.add_text(keyword, text)
    buffer = io.BytesIO()
    image.save(buffer, format="PNG", pnginfo=info)
    return buffer.getvalue()


def read_index_mask(path: Path, *, modes: Sequence[str] = MASK_MODES) -> NDArray[np.uint8]:
    """Read the raw indices of a palette (P) or grey (L) PNG, uint8 (H, W); colours are never interpreted.

    Args:
        path: The file.
        modes: Pixel modes that are taken.

    Raises:
        DataError: missing, damaged, or of another mode (an RGB mask).
    """
    try:
        with Image.open(path, formats=MASK_FORMATS) as image:
            if image.mode not in modes:
                raise DataError(
                    f"{path}: expected a mask of class indices (PNG mode P or L), found mode {image.mode}; "
                    "save the indices with VOC's palette, not the colours"
                )
            return np.array(image.getchannel(0) if image.mode == "LA" else image, dtype=np.uint8)
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        raise DataError(f"{path}: not a readable mask ({error})") from error


# ---------------------------------------------------------------------------------------------------------------------
# Attention maps
# ---------------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class AttentionRecord:
    """The attention maps of one image, only for the labels it has."""

    id: str
    size: tuple[int, int]
    """(height, width) of the image in pixels; the maps are smaller."""
    labels: tuple[int, ...]
    """The n label indices, sorted."""
    maps: NDArray[np.uint8]
    """(n, h, w); each map is divided by its own maximum, 255 = the maximum; all zero where there was no evidence."""
    peaks: NDArray[np.float32]
    """(n,) the maxima that the maps were divided by; NaN where a map was not finite, which is all zero then."""


def write_attention_shard(path: Path, records: Sequence[AttentionRecord]) -> None:
    """Write ``records`` as one compressed npz without pickles, atomically; equal records give equal bytes."""
    import io

    arrays: dict[str, NDArray[Any]] = {}
    for number, record in enumerate(records):
        arrays[f"{number:05d}.maps"] = record.maps
        arrays[f"{number:05d}.peaks"] = record.peaks.astype(np.float32)
    entries = [{"id": r.id, "size": list(r.size), "labels": list(r.labels)} for r in records]
    arrays["entries"] = np.frombuffer(json.dumps(entries).encode(), dtype=np.uint8)
    buffer = io.BytesIO()
    np.savez_compressed(buffer, **arrays)  # pyright: ignore[reportArgumentType] - takes them for allow_pickle too
    write_atomic(path, buffer.getvalue())


def read_attention_shard(path: Path) -> list[AttentionRecord]:
    """Read a shard in writing order.

    Raises:
        DamagedFileError: the file does not read back.
    """
    try:
        # opened here: numpy leaves its own file open when the archive is damaged
        with path.open("rb") as file, np.load(file, allow_pickle=False) as archive:
            entries = json.loads(archive["entries"].tobytes())
            return [
                AttentionRecord(
                    id=entry["id"],
                    size=(entry["size"][0], entry["size"][1]),
                    labels=tuple(entry["labels"]),
                    maps=archive[f"{number:05d}.maps"],
                    peaks=archive[f"{number:05d}.peaks"],
                )
                for number, entry in enumerate(entries)
            ]
    except (OSError, EOFError, ValueError, KeyError, zipfile.BadZipFile, zlib.error) as error:
        raise DamagedFileError(f"{path} is not a readable attention shard ({error}); rebuild make_attention") from error


def attention_shards(folder: Path) -> list[Path]:
    """The shard files under the output folder of ``make_attention``, in order."""
    return sorted((folder / "shards").glob("attention-*.npz"))


def iter_attention(folder: Path) -> Iterator[AttentionRecord]:
    """All records under the output folder of ``make_attention``, shard by shard: memory stays flat."""
    for path in attention_shards(folder):
        yield from read_attention_shard(path)
