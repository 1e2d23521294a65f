"""Read the small text files of a data set: id lists, labels.csv, VOC annotations.

Reads: ``*.txt`` (one id a line), ``labels.csv`` (``image,labels``), ``Annotations/*.xml``.  Writes nothing.
Whatever is wrong is added to a Problems collection with file, line and remedy; reading goes on.
"""

from __future__ import annotations

import codecs
import csv
import difflib
import os
import unicodedata
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePath
from xml.etree import ElementTree

from stages.data.class_names import check_dialect
from stages.data.names import ImageNames
from stages.data.records import IdList, MaskFolder, Problems, quoted, some

CSV_HEADER = ["image", "labels"]

_THERE = {"0": False, "0.0": False, "false": False, "1": True, "1.0": True, "true": True}
"""A cell of a column for one class: whether the class is in the image."""
_NO_CLASSES = {
    *("label", "labels", "class", "classes", "class_id", "category", "categories", "tag", "tags", "target", "y"),
    *("name", "id", "index", "split", "fold", "train", "val", "test", "count"),
}
"""Names of columns that hold something else than whether one class is there, though it be 0 and 1."""


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


def match_masks(root: Path, folder: str, images: Mapping[str, str], image_folder: str) -> MaskFolder:
    """Find the images' masks in a folder of PNGs.

    A mask is named as its image, in whatever Unicode form, and lies in the folder itself or, where the images have
    sub-folders, in the same one.

    Args:
        root: Folder of the data set.
        folder: The masks' folder below it.
        images: Image id to file, relative to ``root``.
        image_folder: The images' folder.
    """
    names = ImageNames(images)
    inner = {PurePath(path).relative_to(image_folder).parent.as_posix() for path in images.values()} - {"."}
    files = mask_files(root / folder, inner)
    # of several with one name, the one that is spelled as its image is
    files.sort(key=lambda file: (PurePath(file).stem not in images, PurePath(file).suffix != ".png"))
    masks: dict[str, str] = {}
    unused: list[str] = []
    for file in files:
        path = PurePath(file)
        image_id = names.get(path.stem) if path.suffix.lower() == ".png" else None
        if image_id is None or image_id in masks:
            unused.append(file)
        else:
            masks[image_id] = f"{folder}/{file}"
    return MaskFolder(folder, masks, tuple(sorted(unused)))


def mask_files(folder: Path, inner: Collection[str]) -> list[str]:
    """Files in a folder of masks and in those of its sub-folders that ``inner`` names, relative to it, sorted."""
    places = ["", *(f"{place}/" for place in sorted(inner) if place)]
    return [place + name for place in places for name in sorted(file_names(folder / place)) if not name.startswith(".")]


def read_text(path: Path, source: str, problems: Problems) -> list[str] | None:
    """The lines of a text file without line ends; None (and a problem) when it cannot be read.

    It is UTF-8, or what its byte order mark says; only CR and LF end a line.
    """
    try:
        data = path.read_bytes()
        marked = next((name for mark, name in _BYTE_ORDER_MARKS.items() if data.startswith(mark)), None)
        text = data.decode(marked or "utf-8-sig")
        if marked is None and b"\0" in data[:4096]:
            raise ValueError("UTF-16 without its mark")  # noqa: TRY301 - one message for all that is no UTF-8
    except ValueError:
        problems.add("unreadable", f"{source}: is not UTF-8 text; save it as UTF-8")
    except OSError as error:
        problems.add("unreadable", f"{source}: cannot be read ({error.strerror}); check its name and permission")
    else:
        lines = text.replace("\r\n", "\n").replace("\r", "\n").split("\n")
        return lines if lines[-1] else lines[:-1]
    return None


_BYTE_ORDER_MARKS = {
    codecs.BOM_UTF32_LE: "utf-32",  # before UTF-16's, which begins in the same way
    codecs.BOM_UTF32_BE: "utf-32",
    codecs.BOM_UTF16_LE: "utf-16",
    codecs.BOM_UTF16_BE: "utf-16",
}


def read_id_list(path: Path, source: str, problems: Problems, names: ImageNames | None = None) -> IdList | None:
    """Read one image id (or file name, or path of an image) per line; blank lines are skipped.

    Args:
        path: The list.
        source: How messages name it.
        problems: Receives lines that can name no image.
        names: The images there are, whose spelling of an id is taken.

    Returns:
        The list, or None when the file cannot be read (a problem was added).
    """
    lines = read_text(path, source, problems)
    if lines is None:
        return None
    names = names or ImageNames({})
    entries: list[tuple[int, str]] = []
    for number, line in enumerate(lines, start=1):
        text = line.strip()
        if not text:
            continue
        try:
            entries.append((number, names.find(text)))
        except ValueError as error:
            problems.add("bad id", f"{source} line {number}: expected one image id, found {quoted(text)}; {error}")
    return IdList(source, tuple(entries))


@dataclass(frozen=True)
class LabelLine:
    """The labels of one line of labels.csv."""

    line: int
    names: tuple[str, ...]
    cell: str
    """As they stand there."""


def read_labels_csv(
    path: Path, classes: Collection[str], source: str, problems: Problems, names: ImageNames | None = None
) -> dict[str, LabelLine] | None:
    """Read a CSV with the columns ``image`` and ``labels``, as a person writes it or a spreadsheet saves it.

    Columns are separated by commas, semicolons or tabs: by what makes the first line the header; a line ``sep=;``
    may stand before it.  Other columns are left aside with a warning.  Without a column ``labels``, a column of 0 and 1
    for each class is read, as programs write it (one-hot).
    Labels are separated by spaces; where any line of the file has a ``;``, by ``;`` in the whole file, so that names
    may have spaces.  A cell that is, as a whole, one of ``classes`` is that class.

    Args:
        path: The CSV file.
        classes: Known class names (may be empty); they are meant as they are.
        source: How messages name the file.
        problems: Receives a wrong header, wrong lines, repeated images, and labels separated in another way.
        names: The images there are, whose spelling of an id is taken.

    Returns:
        Image id to its labels, in file order; None when the file cannot be read at all.
    """
    lines = read_text(path, source, problems)
    if lines is None:
        return None
    head = next((number for number, line in enumerate(lines) if line.strip()), 0)
    delimiters = ",;\t"
    declared = lines[head].strip(' "').lower() if lines else ""
    if declared.startswith("sep=") and len(lines[head].strip(' "')) == 5:
        delimiters, head = lines[head].strip(' "')[-1], head + 1
    for delimiter in delimiters:
        reader = csv.reader((f"{line}\n" for line in lines[head:]), delimiter=delimiter)
        try:
            rows = [(head + reader.line_num, row) for row in reader if any(cell.strip() for cell in row)]
        except csv.Error as error:
            line = head + reader.line_num
            problems.add("bad line", f"{source} line {line}: is no CSV ({error}); save the file as CSV in UTF-8")
            return None
        header = [cell.strip().lower() for cell in rows[0][1]] if rows else []
        table = _LabelTable(source, header, delimiter, problems, names or ImageNames({}))
        if all(header.count(column) == 1 for column in CSV_HEADER):
            return table.read(rows[1:], classes)
        if header.count("image") == 1 and (columns := _class_columns([row for _, row in rows])):
            return table.read_columns(rows[1:], columns)
    found = quoted(lines[head]) if head < len(lines) else "'nothing'"
    problems.add(
        "bad header",
        f"{source} line {head + 1}: expected the header 'image,labels', found {found}; name the columns so, or write a "
        "column of 0 and 1 for each class beside 'image'",
    )
    return None


def _class_columns(rows: Sequence[Sequence[str]]) -> dict[int, str]:
    """Place to class of the columns of a table with one for each class; empty where it is none, or may be another.

    Args:
        rows: The header, which has an ``image``, and the lines.
    """
    columns = {place: unicodedata.normalize("NFC", cell.strip()) for place, cell in enumerate(rows[0])}
    columns = {place: name for place, name in columns.items() if name and name.lower() != "image"}
    first = rows[1] if len(rows) > 1 else []
    is_table = all(len(first) > place and first[place].strip().lower() in _THERE for place in columns)
    return {} if not is_table or any(name.lower() in _NO_CLASSES for name in columns.values()) else columns


@dataclass(frozen=True)
class _LabelTable:
    """A labels.csv whose header is understood."""

    source: str
    header: Sequence[str]
    delimiter: str
    problems: Problems
    names: ImageNames

    def read(self, rows: Sequence[tuple[int, list[str]]], classes: Collection[str]) -> dict[str, LabelLine]:
        others = [name or "(without a name)" for name in self.header if name not in CSV_HEADER]
        while others and others[-1] == "(without a name)":  # a spreadsheet's empty columns
            others.pop()
        if others:
            text = f"{self.source}: of its columns only image and labels are read, not {some(others)}"
            self.problems.warnings.append(text)
        cells = {line: cell for line, row in rows if (cell := self._cell(line, row)) is not None}
        separator = ";" if any(";" in cell for _, cell in cells.values()) else None
        labels: dict[str, LabelLine] = {}
        for line, (image_id, cell) in cells.items():
            if not self._is_new(image_id, line, labels):
                continue
            names = [cell] if cell in classes else [part.strip() for part in cell.split(separator)]
            labels[image_id] = LabelLine(line, tuple(part for part in names if part), cell)
        check_dialect({row.line: (row.cell, row.names) for row in labels.values()}, classes, self.source, self.problems)
        return labels

    def read_columns(
        self, rows: Sequence[tuple[int, list[str]]], columns: Mapping[int, str]
    ) -> dict[str, LabelLine] | None:
        """The labels of a table with a column of 0 and 1 for each class."""
        names = list(columns.values())
        if twice := sorted({name for name in names if names.count(name) > 1}):
            self.problems.add(
                "bad header", f"{self.source}: {some(twice)} is the name of two columns; keep one of them"
            )
            return None
        self.problems.warnings.append(
            f"{self.source}: read as a column of 0 and 1 for each of {len(names):,} classes: {some(names)}"
        )
        labels: dict[str, LabelLine] = {}
        place = self.header.index("image")
        for line, row in rows:
            cells = [row[at].strip() if at < len(row) else "" for at in columns]
            odd = [(name, cell) for name, cell in zip(names, cells, strict=True) if cell.lower() not in _THERE]
            if any(cell.strip() for cell in row[len(self.header) :]):
                self.problems.add("bad line", f"{self.source} line {line}: has more cells than the header; correct it")
            elif odd:
                text = f"{self.source} line {line}: expected 0 or 1 in the column of {quoted(odd[0][0])}, found "
                self.problems.add("bad line", f"{text}{quoted(odd[0][1])}; write 1 where the class is in the image")
            elif (image_id := self._image_id(line, row, place)) is not None and self._is_new(image_id, line, labels):
                own = tuple(name for name, cell in zip(names, cells, strict=True) if _THERE[cell.lower()])
                labels[image_id] = LabelLine(line, own, ";".join(own))
        empty = sorted(set(names) - {name for row in labels.values() for name in row.names})
        if empty and labels:
            text = f"{self.source}: {some(empty)}: a column without any 1, so a class of no image"
            self.problems.add("empty class", f"{text}; remove the column")
        return labels

    def _is_new(self, image_id: str, line: int, labels: Mapping[str, LabelLine]) -> bool:
        """Whether the image has no labels yet; else a problem."""
        if image_id not in labels:
            return True
        text = f"{self.source} line {line}: image {quoted(image_id)} has its labels on line"
        self.problems.add("duplicate", f"{text} {labels[image_id].line} already; join the two lines")
        return False

    def _image_id(self, line: int, row: Sequence[str], place: int) -> str | None:
        """The image that a line names; None (and a problem) where it names none."""
        name = row[place].strip() if place < len(row) else ""
        try:
            return self.names.find(name)
        except ValueError as error:
            self.problems.add("bad line", f"{self.source} line {line}: {quoted(name)} names no image: {error}")
            return None

    def _cell(self, line: int, row: list[str]) -> tuple[str, str] | None:
        """Image id and text of the labels of a line; None (and a problem) where it is wrong."""
        where = f"{self.source} line {line}"
        width = len(self.header)
        found = quoted(self.delimiter.join(row))
        expected = f"{where}: expected 'image,labels' with the labels separated by spaces or ';'"
        places = [self.header.index(column) for column in CSV_HEADER]
        if len(row) <= max(places) or any(cell.strip() for cell in row[width:]) or not row[places[0]].strip():
            self.problems.add("bad line", f"{expected}, found {found}")
            return None
        if any("\n" in row[place] for place in places):
            text = f"{where}: a cell goes on over several lines, {found}"
            self.problems.add("bad line", f"{text}; close the quote where the cell ends")
            return None
        image_id = self._image_id(line, row, places[0])
        return None if image_id is None else (image_id, unicodedata.normalize("NFC", row[places[1]].strip()))


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
            text = f"{source} line {row.line}: image {quoted(image_id)} has no file in {folder}"
            problems.add("label without image", f"{text}; remove the line or add the image")
    for image_id in train:
        if image_id not in rows and image_id in images:
            text = f"{source}: training image {quoted(image_id)} has no line; add its labels or remove it from the list"
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
