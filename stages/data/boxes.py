"""True boxes of a data set: read from lists and annotations, checked against the images, cut at their edges.

Reads: lines ``path,x0,y0,x1,y1`` and the XML annotations of ILSVRC.  Writes nothing.
A box is (x0, y0, x1, y1) in pixels from 0 with the last column and row inside (``stages.contracts.Box``).
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from xml.etree import ElementTree

from stages.contracts import Box, LabelledBox
from stages.data.names import ImageNames
from stages.data.readers import read_text
from stages.data.records import ListedImage, Problems, quoted, some

_CORNERS = ("xmin", "ymin", "xmax", "ymax")


def make_box(numbers: Sequence[str]) -> Box:
    """A box out of the text of its four corners; fractions of a pixel are cut off.

    Raises:
        ValueError: not four numbers, a negative one, an end before its beginning, or fractions of the image.
    """
    if len(numbers) != 4:
        raise ValueError(f"expected four numbers, found {len(numbers)}")
    try:
        exact = [float(number) for number in numbers]
        x0, y0, x1, y1 = map(int, exact)
    except (ValueError, OverflowError) as error:
        raise ValueError(f"expected four numbers, found {quoted(', '.join(numbers))}") from error
    if max(exact) <= 1 and exact != [x0, y0, x1, y1]:
        raise ValueError("expected pixels, found fractions of the image; multiply x by its width and y by its height")
    if min(x0, y0) < 0 or x1 < x0 or y1 < y0:
        text = f"expected 0 <= x0 <= x1 and 0 <= y0 <= y1, found {x0}, {y0}, {x1}, {y1}"
        is_size = min(x0, y0) >= 0 < min(x1, y1)
        raise ValueError(f"{text}: are these x, y, width, height?" if is_size else text)
    return x0, y0, x1, y1


@dataclass(frozen=True)
class BoxLine:
    """One line of a box list."""

    line: int
    id: str
    box: Box


def read_box_list(path: Path, source: str, problems: Problems, names: ImageNames) -> list[BoxLine]:
    """Read a line ``path,x0,y0,x1,y1`` for every box; an image may have several, blank lines are skipped.

    Only the file name of ``path`` counts: without its ending it is the image's id, which ``names`` spells as the image.
    Source: wsolevaluation, metadata/<data set>/<split>/localization.txt.
    """
    found: list[BoxLine] = []
    for number, line in enumerate(read_text(path, source, problems) or [], start=1):
        if not line.strip():
            continue
        name, *numbers = (part.strip() for part in line.split(","))
        try:
            image_id = names.find(name.rsplit("/", 1)[-1])
            found.append(BoxLine(number, image_id, make_box(numbers)))
        except ValueError as error:
            text = f"{source} line {number}: expected 'path,x0,y0,x1,y1', found {quoted(line.strip())} ({error})"
            problems.add("bad box", f"{text}; correct the line")
    return found


class _Objects:
    """Parser target that keeps name and bndbox of /annotation/object; refuses document types as readers.py does."""

    def __init__(self) -> None:
        self._path: list[str] = []
        self._text: list[str] = []
        self._fields: dict[str, str] = {}
        self.found: list[tuple[str, Box]] = []

    def start(self, tag: str, attributes: dict[str, str]) -> None:
        del attributes
        self._path.append(tag)
        self._text.clear()

    def data(self, text: str) -> None:
        self._text.append(text)

    def end(self, tag: str) -> None:
        inside = self._path[1:]
        if inside == ["object", "name"] or inside[:-1] == ["object", "bndbox"]:
            self._fields[tag] = "".join(self._text).strip()
        if inside == ["object"]:
            self.found.append((self._fields.get("name", ""), make_box([self._fields[c] for c in _CORNERS])))
            self._fields = {}
        self._path.pop()

    def doctype(self, name: str, public_id: str | None, system: str | None) -> None:
        raise ValueError("it declares a document type, which no annotation of ILSVRC does")

    def close(self) -> None:
        """Nothing is left to do."""


def read_box_annotation(path: Path, problems: Problems) -> list[tuple[str, Box]]:
    """(class name, box) of every object of an annotation of ILSVRC's or VOC's kind, in its order."""
    target = _Objects()
    parser = ElementTree.XMLParser(target=target)
    try:
        parser.feed(path.read_bytes())
        parser.close()
    except (OSError, ValueError, LookupError, ElementTree.ParseError) as error:
        problems.add("bad annotation", f"{path}: not a readable annotation with boxes ({error}); restore the file")
        return []
    return target.found


def box_problems(image: ListedImage, size: tuple[int, int]) -> list[str]:
    """Boxes that lie wholly outside their image of ``size`` (height, width), or are fractions that were rounded."""
    height, width = size
    problems: list[str] = []
    for _, box in image.boxes or ():
        text = f"{image.image}: box {box[0]}, {box[1]}, {box[2]}, {box[3]} (x0, y0, x1, y1)"
        around = f"{height}×{width} pixels (height×width)"
        if box[0] >= width or box[1] >= height:
            swapped = "; x and y are probably in the other order" if _fits_swapped(box, size) else ""
            problems.append(f"{text} lies outside the image of {around}{swapped}; correct the box list")
        elif max(box) <= 1:
            problems.append(
                f"{text} has at most 2×2 of {around}: is it in fractions of the image?  "
                "Multiply x by the width and y by the height"
            )
    return problems


def _fits_swapped(box: Box, size: tuple[int, int]) -> bool:
    """Whether (y0, x0, y1, x1) would lie inside an image of ``size`` (height, width)."""
    return box[2] < size[0] and box[3] < size[1]


def clip_boxes(boxes: Iterable[LabelledBox] | None, size: tuple[int, int]) -> tuple[LabelledBox, ...] | None:
    """The part of each box that is inside an image of ``size`` (height, width)."""
    if boxes is None:
        return None
    height, width = size
    return tuple((label, (x0, y0, min(x1, width - 1), min(y1, height - 1))) for label, (x0, y0, x1, y1) in boxes)


def box_warnings(images: Iterable[tuple[ListedImage, tuple[int, int] | None]]) -> list[str]:
    """A line each where boxes reach beyond their image, and where they are one pixel wide or high.

    One pixel beyond is nothing odd: that is how lists write an excluded end.
    """
    beyond: dict[str, int] = {}
    num_fitting, num_thin, thin = 0, 0, list[str]()
    for image, size in images:
        if size is None:
            continue
        boxes = [box for _, box in image.boxes or ()]
        reach = max((max(box[2] - size[1], box[3] - size[0]) for box in boxes), default=0)
        if reach > 0:
            beyond[image.image] = reach
            num_fitting += all(_fits_swapped(box, size) for box in boxes)
        is_thin = [box[0] == box[2] or box[1] == box[3] for box in boxes]
        num_thin += sum(is_thin)
        thin += [image.image] if any(is_thin) else []
    lines: list[str] = []
    if beyond:
        worst = max(beyond, key=beyond.__getitem__)
        swapped = "; all of these would fit with x and y in the other order" if num_fitting == len(beyond) else ""
        lines.append(
            f"the boxes of {len(beyond):,} images reach beyond their image and are cut at its edge, at most by "
            f"{beyond[worst]} pixels ({worst}){swapped}; if they are of other image files or sizes, scores are "
            "worthless"
        )
    if num_thin:
        noun = "box is" if num_thin == 1 else "boxes are"
        lines.append(f"{num_thin:,} {noun} one pixel wide or high: {some(thin)}; are they empty?  Correct the box list")
    return lines
