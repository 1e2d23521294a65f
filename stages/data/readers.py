"""Read the small text files of a data set: id lists, labels.csv, VOC annotations.

Reads: ``*.txt`` (one id a line), ``labels.csv`` (``image,labels``), ``Annotations/*.xml``.  Writes nothing.
Whatever is wrong is added to a Problems collection with file, line and remedy; reading goes on.
"""

from __future__ import annotations

import csv
import difflib
import os
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path, PurePath
from xml.etree import ElementTree

from stages.contracts import IMAGE_SUFFIXES
from stages.data.records import IdList, Problems

CSV_HEADER = ["image", "labels"]


def file_names(folder: Path) -> set[str]:
    """Names of the plain files in ``folder``; empty when there is no such folder."""
    if not folder.is_dir():
        return set()
    with os.scandir(folder) as entries:
        # of a link an entry's own is_file() fails where it leads to itself
        return {entry.name for entry in entries if (Path(entry.path) if entry.is_symlink() else entry).is_file()}


def files_by_id(root: Path, folder: str, suffixes: tuple[str, ...], problems: Problems) -> dict[str, str]:
    """Id (the name without its suffix) to file, relative to ``root``, of a folder's files that end in ``suffixes``.

    Case does not count; two files of one id are a problem.
    """
    found: dict[str, str] = {}
    for name in sorted(file_names(root / folder)):
        suffix = next((suffix for suffix in suffixes if name.lower().endswith(suffix)), None)
        if suffix is None or name.startswith("."):
            continue
        file_id, path = name[: -len(suffix)], f"{folder}/{name}"
        if file_id in found:
            problems.add(
                "same id", f"{root / path}: {found[file_id]} gives the same id '{file_id}'; remove one of the two"
            )
        found.setdefault(file_id, path)
    return found


def check_mask_folder(root: Path, folder: str, key: str, problems: Problems) -> None:
    """Add a folder of masks that the config names and that is not there; a default folder may be absent.

    Args:
        root: Folder of the data set.
        folder: Below it.
        key: The config's key that names it, e.g. ``data.masks``.
        problems: Receives it.
    """
    if (root / folder).is_dir():
        return
    place = (root / folder).parent
    there = sorted(path.name for path in place.iterdir() if path.is_dir()) if place.is_dir() else []
    close = difflib.get_close_matches(Path(folder).name.lower(), [name.lower() for name in there], n=1, cutoff=0.6)
    guess = next((f"; did you mean '{name}'?" for name in there if close and name.lower() == close[0]), None)
    found = f" (folders there: {', '.join(there) or 'none'}); correct the name" if guess is None else guess
    problems.add("mask folder", f"{key}: folder {root / folder} does not exist{found}")


def image_id_of(name: str) -> str:
    """``photo.JPG`` and ``photo`` both name the image ``photo``; other endings belong to the id."""
    path = PurePath(name)
    return path.name[: -len(path.suffix)] if path.suffix.lower() in IMAGE_SUFFIXES else name


def nearest(name: str, allowed: Collection[str]) -> str:
    """`` did you mean 'horse'?`` for a near miss, else the allowed names."""
    close = difflib.get_close_matches(name.lower(), [option.lower() for option in allowed], n=1, cutoff=0.6)
    for option in allowed:
        if close and option.lower() == close[0]:
            return f"did you mean '{option}'?"
    return f"known classes: {', '.join(allowed)}"


def read_text(path: Path, source: str, problems: Problems) -> list[str] | None:
    """The lines of a UTF-8 file without line ends; None (and a problem) when it cannot be read."""
    try:
        return path.read_text(encoding="utf-8-sig").splitlines()
    except UnicodeDecodeError:
        problems.add("unreadable", f"{source}: is not UTF-8 text; save it as UTF-8")
    except OSError as error:
        problems.add("unreadable", f"{source}: cannot be read ({error.strerror}); check its name and permission")
    return None


def read_id_list(path: Path, source: str, problems: Problems) -> IdList | None:
    """Read one image id (or image file name) per line; blank lines are skipped.

    Returns:
        The list, or None when the file cannot be read (a problem was added).
    """
    lines = read_text(path, source, problems)
    if lines is None:
        return None
    entries: list[tuple[int, str]] = []
    for number, line in enumerate(lines, start=1):
        text = line.strip()
        if text and is_plain_id(text):
            entries.append((number, image_id_of(text)))
        elif text:
            problems.add(
                "bad id", f"{source} line {number}: expected one image id, found '{text}'; write the id without a path"
            )
    return IdList(source, tuple(entries))


def is_plain_id(text: str) -> bool:
    """Whether ``text`` can name files in our folders: no path, no hidden file, no control characters."""
    return not (set("/\\\0") & set(text) or text.startswith(".") or not text.isprintable())


@dataclass(frozen=True)
class LabelLine:
    """The labels of one line of labels.csv."""

    line: int
    names: tuple[str, ...]


def read_labels_csv(
    path: Path, classes: Collection[str], source: str, problems: Problems
) -> dict[str, LabelLine] | None:
    """Read ``image,labels`` lines.

    Labels are separated by spaces; where any line of the file has a ``;``, by ``;`` in the whole file, so that names
    may have spaces.  A cell that is, as a whole, one of ``classes`` is that class.

    Args:
        path: The CSV file.
        classes: Known class names (may be empty); only used to keep a name with spaces together.
        source: How messages name the file.
        problems: Receives a wrong header, wrong lines and repeated images.

    Returns:
        Image id to its labels, in file order; None when the file cannot be read at all.
    """
    lines = read_text(path, source, problems)
    if lines is None:
        return None
    reader = csv.reader(lines)
    try:
        rows = [(reader.line_num, row) for row in reader if any(cell.strip() for cell in row)]
    except csv.Error as error:
        problems.add("bad line", f"{source} line {reader.line_num}: is no CSV ({error}); save the file as CSV in UTF-8")
        return None
    if not rows or [cell.strip().lower() for cell in rows[0][1]] != CSV_HEADER:
        found = ",".join(rows[0][1]) if rows else "nothing"
        problems.add("bad header", f"{source} line 1: expected the header 'image,labels', found '{found}'")
        return None
    separator = ";" if any(";" in cell for _, row in rows[1:] for cell in row[1:]) else None
    labels: dict[str, LabelLine] = {}
    for number, row in rows[1:]:
        _read_label_row(row, number, separator, classes, labels, source, problems)
    return labels


def _read_label_row(
    row: list[str],
    number: int,
    separator: str | None,
    classes: Collection[str],
    labels: dict[str, LabelLine],
    source: str,
    problems: Problems,
) -> None:
    name = row[0].strip()
    if len(row) != 2 or not name or not is_plain_id(name):
        text = f"{source} line {number}: expected 'image,labels' with the labels separated by spaces or ';', "
        problems.add("bad line", f"{text}found '{','.join(row)}'")
        return
    image_id, cell = image_id_of(name), row[1].strip()
    if image_id in labels:
        text = f"{source} line {number}: image '{image_id}' has its labels on line {labels[image_id].line} already"
        problems.add("duplicate", f"{text}; join the two lines")
        return
    names = [cell] if cell in classes else [part.strip() for part in cell.split(separator)]
    labels[image_id] = LabelLine(number, tuple(part for part in names if part))


def check_label_lines(
    rows: Mapping[str, LabelLine] | None,
    *,
    train: Collection[str],
    images: Collection[str],
    source: str,
    folder: str,
    problems: Problems,
) -> None:
    """Add labels without an image and training images without labels; ``rows`` None was reported before."""
    if rows is None:
        return
    for image_id, row in rows.items():
        if image_id not in images:
            text = f"{source} line {row.line}: image '{image_id}' has no file in {folder}"
            problems.add("label without image", f"{text}; remove the line or add the image")
    for image_id in train:
        if image_id not in rows and image_id in images:
            text = f"{source}: training image '{image_id}' has no line; add its labels or remove it from the list"
            problems.add("no labels", text)


class _ObjectNames:
    """Parser target that keeps /annotation/object/name and refuses document types (entity bombs, outside files)."""

    def __init__(self) -> None:
        self._path: list[str] = []
        self._text: list[str] = []
        self._names: list[str] = []

    def start(self, tag: str, attributes: dict[str, str]) -> None:
        self._path.append(tag)
        self._text.clear()

    def data(self, text: str) -> None:
        self._text.append(text)

    def end(self, tag: str) -> None:
        if len(self._path) == 3 and self._path[1:] == ["object", "name"]:
            self._names.append("".join(self._text).strip())
        self._path.pop()

    def doctype(self, name: str, public_id: str | None, system: str | None) -> None:
        raise ValueError("it declares a document type, which no VOC annotation does")

    def close(self) -> tuple[str, ...]:
        return tuple(dict.fromkeys(self._names))


def read_annotation(path: Path, problems: Problems) -> tuple[str, ...]:
    """Class names of the objects in a VOC annotation, each once; parts of objects (head, hand) do not count.

    Differs: none from irn's labels except that parts are left out by their place, not by their names.
    """
    target = _ObjectNames()
    parser = ElementTree.XMLParser(target=target)
    try:
        parser.feed(path.read_bytes())
        parser.close()
    except (OSError, ValueError, LookupError, ElementTree.ParseError) as error:  # LookupError: unknown encoding
        problems.add("bad annotation", f"{path}: not a readable VOC annotation ({error}); restore the file")
        return ()
    return target.close()
