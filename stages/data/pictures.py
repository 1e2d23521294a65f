"""Anybody's image files: find them, name what comes out of them, and decode whatever camera or scanner wrote them.

Reads images; writes nothing.  Torch-free.
Sizes are (height, width) in pixels.
"""

from __future__ import annotations

import glob
import io
import os
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import ExifTags, Image, UnidentifiedImageError

from stages.contracts import IMAGE_FORMATS, eight_bits, upright
from stages.errors import DataError, InputError

IMAGE_SUFFIXES = (".jpg", ".jpeg", ".jpe", ".jfif", ".png", ".bmp", ".gif", ".webp", ".tif", ".tiff")
"""File names that are taken from folders; a file that is named itself may be called anything."""


@dataclass(frozen=True)
class PictureFile:
    """An image file with the name of what is made of it."""

    path: Path
    name: str
    """Path of the results inside the output folder, without a suffix; forward slashes."""


def find_pictures(words: Sequence[str], out: Path) -> list[PictureFile]:
    """The files that ``words`` mean, each once, in order.

    A file gives its stem as the name; a file in a folder its path inside that folder; of a pattern, every match.

    Args:
        words: Files, folders (searched to the bottom, hidden files left out) and patterns such as ``shots/**/*.jpg``.
        out: Output folder; nothing in it is taken from a folder, so that a second call does not see the first one's.

    Raises:
        InputError: a word means nothing, no image is left, or two files would have one name; all of them are listed.
            Or a folder is ``out`` itself.
    """
    problems: list[str] = []
    found: dict[Path, PictureFile] = {}
    for word in words:
        files = list(_expand(word, out, problems))
        for file in files:
            found.setdefault(file.path.resolve(), file)
    if problems:
        raise InputError("these images are not there; nothing was done", problems)
    if not found:
        raise InputError(f"expected images, found none in {', '.join(words) or 'an empty list'}; name files or folders")
    pictures = list(found.values())
    _check_names(pictures)
    return pictures


def _expand(word: str, out: Path, problems: list[str]) -> Iterator[PictureFile]:
    """The files of one word; says so where there are none."""
    path = Path(word).expanduser()
    if path.is_dir():
        if path.resolve() == out.resolve():
            raise InputError(
                f"{word} is the output folder too: the next call would take masks and overlays for images; choose "
                "another --out, or name the images by a pattern"
            )
        files = list(_walk(path, out))
        yield from files
        if not files:
            problems.append(f"{word}: no image in this folder; files are taken by their suffix: {_listed()}")
    elif path.exists():
        yield PictureFile(path, path.stem)
    else:
        is_pattern = glob.has_magic(word)
        matches = sorted(glob.glob(str(path), recursive=True)) if is_pattern else []  # noqa: PTH207 - may be absolute
        if not matches:
            problems.append(f"{word}: {'no match' if is_pattern else 'no such file'}")
        yield from (PictureFile(file, file.stem) for file in map(Path, matches) if file.is_file())


def _walk(folder: Path, out: Path) -> Iterator[PictureFile]:
    """The images below ``folder``, sorted; neither hidden ones nor those in ``out``."""
    skipped = out.resolve()
    for parent, folders, names in os.walk(folder):
        here = Path(parent)
        folders[:] = sorted(name for name in folders if name[0] != "." and (here / name).resolve() != skipped)
        for name in sorted(names):
            if name[0] != "." and name.lower().endswith(IMAGE_SUFFIXES):
                path = here / name
                yield PictureFile(path, path.relative_to(folder).with_suffix("").as_posix())


def _listed() -> str:
    return ", ".join(IMAGE_SUFFIXES)


def _check_names(pictures: Iterable[PictureFile]) -> None:
    """Refuse two files of one name, also on file systems that do not tell A from a."""
    by_name: dict[str, list[Path]] = {}
    for picture in pictures:
        by_name.setdefault(picture.name.casefold(), []).append(picture.path)
    clashes = [f"{name}: {', '.join(map(str, paths))}" for name, paths in by_name.items() if len(paths) > 1]
    if clashes:
        raise InputError(
            "several images would give results of one name; give a common folder (its subfolders are kept apart), "
            "rename them, or use one --out for each",
            clashes,
        )


# ---------------------------------------------------------------------------------------------------------------------
# Decoding
# ---------------------------------------------------------------------------------------------------------------------


def read_picture_size(path: Path) -> tuple[int, int]:
    """The upright size that the head of the file tells.

    Raises:
        DataError: no image, or the file cannot be read.
    """
    try:
        with Image.open(path, formats=IMAGE_FORMATS) as image:
            width, height = image.size
            lies = _lies(image)
    except Exception as error:
        raise _unreadable(path, error) from error
    return (width, height) if lies else (height, width)


def _lies(image: Image.Image) -> bool:
    """Whether EXIF turns height and width; not where that is unreadable, as ``upright`` has it."""
    try:
        orientation = image.getexif().get(ExifTags.Base.Orientation, 1)
    except Exception:  # whatever a damaged tag does to Pillow's parser, the pixels are there
        return False
    return isinstance(orientation, int) and 5 <= orientation <= 8


def decode_picture(data: bytes, path: Path) -> NDArray[np.uint8]:
    """Decode an image as ``read_rgb`` does.

    It is turned upright by its EXIF orientation; grey becomes RGB; transparency is left aside; 0 … 65535 becomes
    0 … 255; of an animation or a stack of pages, the first picture is taken.

    Args:
        data: The file's content.
        path: For the message.

    Returns:
        RGB, uint8 (H, W, 3).

    Raises:
        DataError: no image, cut off, or of numbers that have no known white.
    """
    try:
        with Image.open(io.BytesIO(data), formats=IMAGE_FORMATS) as opened:
            image = eight_bits(upright(opened), path)
            if image.mode == "P" and "transparency" in image.info:
                image = image.convert("RGBA")  # straight to RGB Pillow warns of what we mean
            return np.array(image.convert("RGB"))
    except DataError:
        raise
    except Exception as error:  # a decoder answers damaged bytes with whatever it trips over
        if isinstance(error, MemoryError):
            raise
        raise _unreadable(path, error, data) from error


def _unreadable(path: Path, error: Exception, data: bytes | None = None) -> DataError:
    empty = path.stat().st_size == 0 if data is None and path.exists() else data == b""
    if isinstance(error, UnidentifiedImageError):
        reason = "the file is empty" if empty else f"it holds none of {', '.join(IMAGE_FORMATS)}"
    elif isinstance(error, Image.DecompressionBombError):
        limit = 2 * (Image.MAX_IMAGE_PIXELS or 0)
        reason = f"it has more than {limit:,} pixels, which is taken for an attack; cut it into tiles"
    else:
        reason = str(error) or type(error).__name__
    return DataError(f"{path}: not a readable image ({reason})")
