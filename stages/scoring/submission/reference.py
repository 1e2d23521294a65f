"""What an archive for PASCAL VOC's test server is compared with: a list of images, and their sizes.

Reads a list with one image a line, and the headers of images.
"""

from __future__ import annotations

from collections.abc import Callable, Collection
from dataclasses import dataclass
from pathlib import Path

from stages.contracts import IMAGE_SUFFIXES, read_image_size
from stages.data.readers import read_id_list
from stages.data.records import Problems
from stages.errors import DataError
from stages.scoring.submission.archive import Competition

Size = tuple[int, int]
"""(height, width) in pixels."""


@dataclass(frozen=True)
class Expected:
    """What the archive is compared with; without any of it, only VOC's rules."""

    ids: Collection[str] | None = None
    """The images of the test list; None for any 1,456 with names like VOC's."""
    size_of: Callable[[str], Size | None] | None = None
    """Image id to the size of its image, None for one that is not known; without it sizes need only be possible."""
    competition: Competition | None = None
    """None takes either."""


def read_test_list(path: Path) -> tuple[str, ...]:
    """The ids of a list with one image a line, as VOC's ``test.txt``.

    Raises:
        DataError: it cannot be read, is empty, or has a line that is no id.
    """
    problems = Problems()
    listed = read_id_list(path, str(path), problems)
    if listed is not None and not listed.ids:
        problems.add("empty", f"{path} is empty; {listed.remedy}")
    if problems or listed is None:
        raise DataError(f"the list {path} cannot be used", problems.lines())
    return listed.ids


class ImageFolder:
    """The sizes of the images in one folder, read from their headers when they are asked for."""

    def __init__(self, folder: Path) -> None:
        """List the folder.

        Raises:
            DataError: it is no folder, or has no image.
        """
        if not folder.is_dir():
            raise DataError(f"expected a folder of images, found no folder {folder}; name VOC's JPEGImages")
        files = sorted(folder.iterdir())
        self._files = {file.stem: file for file in files if file.suffix.lower() in IMAGE_SUFFIXES}
        if not self._files:
            raise DataError(f"{folder} has no image ({', '.join(IMAGE_SUFFIXES)}); name VOC's JPEGImages")

    def size_of(self, image_id: str) -> Size | None:
        """(height, width), or None when there is no such image.

        Raises:
            DataError: the file is no image.
        """
        file = self._files.get(image_id)
        return None if file is None else read_image_size(file)
