"""Image ids: what may be one, and which image a list, a label file or a mask means by a name.

An id is a file's name without its ending.  Files that name images spell them in other ways than the folder does: with
an ending, with a path, with spaces around, or with é as e and an accent.  Reads and writes nothing.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path, PurePath

from stages.contracts import IMAGE_SUFFIXES


def image_id_of(name: str) -> str:
    """``photo.JPG`` and ``photo`` both name the image ``photo``; other endings belong to the id."""
    path = PurePath(name)
    return path.name[: -len(path.suffix)] if path.suffix.lower() in IMAGE_SUFFIXES else name


def odd_character(name: str) -> str | None:
    """Why ``name`` cannot name files in our folders; None where it can.

    Refused are separators of paths, control characters, bytes that are no UTF-8, and a dot at the start, which hides a
    file.  Everything else may stand in a name, spaces of every kind too.
    """
    if name.startswith("."):
        return "it begins with a dot"
    for character in name:
        code = f"U+{ord(character):04X}"
        if character in "/\\":
            return f"it has a separator of paths, '{character}'"
        category = unicodedata.category(character)
        if category == "Cs":
            return f"it is not UTF-8 (byte 0x{ord(character) & 0xFF:02X})"
        if category == "Cc":
            return f"it has the control character {code}"
    return None


class ImageNames:
    """The images of a data set by the names that people write for them."""

    def __init__(
        self, images: Mapping[str, str], several: Mapping[str, Sequence[str]] | None = None, root: Path | None = None
    ) -> None:
        """Know some images.

        Args:
            images: Image id to file, relative to ``root``.
            several: Ids that more than one file has, which therefore mean none, with the files.
            root: Folder of the data set, which a written path may begin in or above.
        """
        self._images = images
        self._several = several or {}
        self._root = () if root is None else root.absolute().parts
        self._spellings: dict[str, list[str]] = {}
        for image_id in images:
            self._spellings.setdefault(_folded(image_id), []).append(image_id)

    def get(self, name: str) -> str | None:
        """The image with this id, or the only one with this id in another Unicode form; None where there is none."""
        if name in self._images:
            return name
        alike = self._spellings.get(_folded(name), [])
        return alike[0] if len(alike) == 1 else None

    def find(self, written: str) -> str:
        """The id that ``written`` means: an id, a file name, or a path that ends in an image's own.

        An id of no image comes back as it is: whoever asks knows what that means.

        Raises:
            ValueError: it cannot name an image; says why, and what to do.
        """
        folder, slash, name = written.replace("\\", "/").rpartition("/")
        image_id = image_id_of(name)
        if not image_id:
            raise ValueError("that names no image")
        odd = odd_character(image_id)
        if odd is not None:
            raise ValueError(_NO_PATH if slash else f"{odd}; rename the file")
        if image_id in self._several:
            files = " and ".join(self._several[image_id][:2])
            raise ValueError(f"{files} have this name and ids are names; rename one of the two")
        known = self.get(image_id)
        if slash and (known is None or not self._is_in(known, folder)):
            raise ValueError(_NO_PATH)
        return image_id if known is None else known

    def _is_in(self, image_id: str, folder: str) -> bool:
        """Whether the image's folder ends as ``folder`` does, or the other way round."""
        written = [unicodedata.normalize("NFC", part) for part in folder.split("/") if part not in {"", "."}]
        inside = [unicodedata.normalize("NFC", part) for part in PurePath(self._images[image_id]).parts[:-1]]
        whole = [*self._root, *inside]
        return whole[len(whole) - len(written) :] == written or bool(inside and written[-len(inside) :] == inside)


_NO_PATH = "no image lies there; write the id without a path"


def _folded(name: str) -> str:
    return unicodedata.normalize("NFC", name).strip()


def numbers_as_numbers(names: Iterable[str]) -> list[str]:
    """Sorted, with numbers by their size, alone and inside names: 2 before 10, class2 before class10."""
    there = list(names)
    if all(re.fullmatch(r"[+-]?\d{1,300}(\.\d{1,300})?", name) for name in there):
        return sorted(there, key=lambda name: (float(name), name))
    return sorted(there, key=lambda name: (_runs(name), name))


def _runs(name: str) -> list[tuple[int, str]]:
    """Text and digits in turn, digits as their length and themselves, which sorts as numbers do."""
    runs = enumerate(re.split(r"(\d+)", name))
    return [(len(run.lstrip("0")), run.lstrip("0")) if place % 2 else (0, run) for place, run in runs]
