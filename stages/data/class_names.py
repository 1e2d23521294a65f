"""Class names that are probably none: several in one, one in several, one twice, and words for nothing.

A data set whose classes are whatever stands in its labels takes every slip for a class.  What ``data.classes`` names
is meant, so nothing here asks about it.  Reads and writes nothing.
"""

from __future__ import annotations

import difflib
import re
import unicodedata
from collections import Counter
from collections.abc import Collection, Mapping, Sequence

from stages.data.names import odd_character
from stages.data.records import Problems, quoted, some

FREQUENT_RATIO = 10
"""A name is suspected of being a misspelling of one that stands on this many times as many lines."""

_NOTHING = {
    *("none", "nothing", "null", "nil", "nan", "na", "n/a", "background", "bg", "void", "empty", "blank"),
    *("nolabel", "nolabels", "noclass", "noobject", "unlabeled", "unlabelled"),
}
_DIALECTS = {
    **dict.fromkeys(",،、，", "commas"),
    **dict.fromkeys("|｜¦", "bars"),
    "；": "another character than ';'",
    "\t": "tabs",
}
"""What separates labels elsewhere, and would be part of a name here, with its name in messages."""
_JOINTS = "/+&:"
"""What may separate labels and may be part of a name: decided by whether the parts are names of their own."""
_BRACKETS = {"[": "]", "(": ")", "{": "}"}
_QUOTES = "'\"`‘’“”"


def is_word_for_nothing(name: str) -> bool:
    """Whether ``name`` says that there is no object, as none, N/A, - or _background_ do."""
    plain = re.sub(r"[\s_.\-<>()\[\]*?]+", "", name).casefold()
    return plain in _NOTHING or not plain


def nearest(name: str, allowed: Collection[str]) -> str:
    """What to do about a name that is no class: the nearest spelling, else the allowed names."""
    close = difflib.get_close_matches(name.lower()[:200], [option.lower() for option in allowed], n=1, cutoff=0.6)
    for option in allowed:
        if close and option.lower() == close[0]:
            return f"did you mean '{option}'?"
    if is_word_for_nothing(name):
        return "leave the labels of an image without any class empty"
    return f"known classes: {', '.join(allowed)}"


def check_dialect(
    cells: Mapping[int, tuple[str, Sequence[str]]], classes: Collection[str], source: str, problems: Problems
) -> None:
    """Add labels that are separated in another way than by spaces or ``;``, once for each way.

    Args:
        cells: Line number to the cell with the labels, and the names that it gives.
        classes: Names that are meant as they are.
        source: How messages name the file.
        problems: Receives them, under the kind "dialect".
    """
    alone = {names[0] for _, names in cells.values() if len(names) == 1} | set(classes)
    found: dict[str, list[int]] = {}
    for line, (cell, names) in cells.items():
        unknown = [name for name in names if name not in classes]
        dialect = _dialect(cell, unknown, alone) if unknown and cell not in classes else None
        if dialect is not None:
            found.setdefault(dialect, []).append(line)
    for dialect, lines in found.items():
        cell, _ = cells[lines[0]]
        problems.add(
            "dialect",
            f"{source}: {len(lines):,} of {len(cells):,} lines have {dialect}, e.g. line {lines[0]} {quoted(cell)}; "
            f"separate labels by ';' (write {quoted(';'.join(_pieces(cell)))}), or name the classes as they stand "
            "there in data.classes",
        )


def _dialect(cell: str, names: Sequence[str], alone: Collection[str]) -> str | None:
    """How ``cell`` separates its labels, in words; None where that is as it should be."""
    if _BRACKETS.get(cell[:1]) == cell[-1:] != "":
        return "a list as programs write it"
    if any(name[:1] in _QUOTES and name[-1:] in _QUOTES for name in names):
        return "names in quotes"
    for name in names:
        if name.casefold() == "and":
            return "labels joined by 'and'"
        for character, dialect in _DIALECTS.items():
            if character in name:
                return f"labels separated by {dialect}"
        for joint in _JOINTS:
            pieces = name.split(joint)
            if joint in name and (name == joint or all(piece in alone for piece in pieces)):
                return f"labels separated by '{joint}'"
    return None


def _pieces(cell: str) -> list[str]:
    """The names that a cell of another dialect probably means."""
    inner = cell.strip("".join([*_BRACKETS, *_BRACKETS.values()]))
    marks = "".join(re.escape(mark) for mark in (*_DIALECTS, ";"))
    parts = re.split(f"[{marks}]", inner)
    if len(parts) == 1:
        parts = re.split(rf"\s*[{_JOINTS}]\s*|\s+and\s+|\s+", inner)
    return [name for part in parts if (name := part.strip().strip(_QUOTES).strip())]


def check_class_names(
    counts: Mapping[str, int], source: str, problems: Problems, *, remedy: str = "leave the labels empty"
) -> None:
    """Add names that are words for nothing, that nearly are another one, or that cannot be written.

    Args:
        counts: Names that the data set itself gives, with the number of their images.
        source: How messages name the file or folder.
        problems: Receives them; names that differ by case, spaces, ``-`` and ``_`` alone count as nearly the same.
        remedy: What to do with images of nothing.
    """
    for name, count in counts.items():
        odd = odd_character(re.sub(r"[/\\]", "", name).lstrip("."))
        if odd is not None:
            problems.add("class name", f"{source}: {quoted(name)} can be no name of a class: {odd}; correct it")
        elif is_word_for_nothing(name):
            text = f"{source}: is '{name}' ({count:,} images) a class, or a word for nothing?"
            problems.add("nothing", f"{text}  {remedy[0].upper()}{remedy[1:]}, or name all classes in data.classes")
    alike: dict[str, list[str]] = {}
    for name in counts:
        shown = "".join(character for character in name if unicodedata.category(character) != "Cf")  # has a width
        folded = unicodedata.normalize("NFKC", shown).casefold()
        alike.setdefault(re.sub(r"[\s_\-]+", "", folded) or folded, []).append(name)
    for names in alike.values():
        if len(names) > 1:
            shown = " beside ".join(f"'{name}' ({counts[name]:,} images)" for name in names)
            text = f"{source}: {shown} would be classes of their own"
            problems.add("alike", f"{text}; write them in one way, or name all classes in data.classes")


def odd_names_warnings(cells: Sequence[Sequence[str]], source: str, *, has_words: bool) -> list[str]:
    """Lines where names are probably misspelt, or are words of one name.

    Args:
        cells: The names of each line.
        source: How messages name the file.
        has_words: Whether spaces separate names, so that none can have two words.
    """
    counts = Counter(name for names in cells for name in names)
    odd: list[str] = []
    for name, count in sorted(counts.items()):
        frequent = [other for other in counts if counts[other] >= FREQUENT_RATIO * count]
        close = difflib.get_close_matches(name, frequent, n=1, cutoff=0.75)
        if close and not (name.isdecimal() and close[0].isdecimal()):
            odd.append(f"'{name}' ({count:,}) beside '{close[0]}' ({counts[close[0]]:,})")
    lines: list[str] = []
    if odd:
        text = f"{source}: misspelt? {', '.join(odd)}; each is a class of its own"
        lines.append(f"{text}: correct the CSV, or set data.classes")
    if "0" in counts and len(counts) > 1 and all(name.isdecimal() for name in counts):
        text = f"{source}: '0' ({counts['0']:,}) is a class as it stands there, and value 1 in masks"
        lines.append(f"{text}: leave the labels empty if it means that there is no object")
    if has_words and (pairs := _word_pairs(cells)):
        text = f"{source}: {some(pairs)} always stand together: one name of two words?"
        lines.append(f"{text}  Then separate labels by ';' in the whole file, or set data.classes")
    return lines


def _word_pairs(cells: Sequence[Sequence[str]]) -> list[str]:
    """Neighbours of which the first never stands last and the second never first; one of them on two lines or more."""
    after: dict[str, set[str | None]] = {}
    before: dict[str, set[str | None]] = {}
    counts = Counter(name for names in cells for name in names)
    for names in cells:
        for first, second in zip([None, *names], [*names, None], strict=True):
            if first is not None:
                after.setdefault(first, set()).add(second)
            if second is not None:
                before.setdefault(second, set()).add(first)
    never_last = {name for name in counts if None not in after[name]}
    never_first = {name for name in counts if None not in before[name]}
    return [
        f"{first} {second}"
        for first in counts
        if first in never_last and after[first] <= never_first
        for second in sorted(name for name in after[first] if name is not None)
        if before[second] <= never_last and max(counts[first], counts[second]) > 1
    ]
