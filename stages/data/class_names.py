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

FREQUENT_RATIO = 5
"""A name is suspected of being a misspelling of one that stands on this many times as many lines."""

_NOTHING = {
    *("none", "nothing", "null", "nil", "nan", "na", "background", "bg", "void", "empty", "blank"),
    *("nolabel", "nolabels", "noclass", "noobject", "unlabeled", "unlabelled"),
    *(
        "unknown",
        "undefined",
        "unspecified",
        "unsure",
        "undecided",
        "missing",
        "not",
        "without",
        "ignore",
        "tbd",
        "todo",
        "idk",
    ),
}
_REST = {"other", "others", "misc", "miscellaneous", "rest", "various", "anythingelse", "everythingelse"}
_YES, _NO = {"yes", "y", "true", "positive"}, {"no", "n", "false", "negative"}
_NUMBER = re.compile(r"[-+]?(\d{1,300}([.,]\d{0,300})?|[.,]\d{1,300})(e[-+]?\d{1,3})?%?", re.IGNORECASE)
_SCORED = re.compile(r"(?P<name>[^:=@(\[]*)(?P<mark>[:=@(\[])\s*(?P<number>[^:=@(\[\])\s]{1,40})\s*[)\]]?")
"""A name with a number that is said of it: cat:1, cat=0.9, cat(2)."""
_DIALECTS = {
    **dict.fromkeys(",،、，", "commas"),
    **dict.fromkeys("|｜¦", "bars"),
    "；": "another character than ';'",
    "\t": "tabs",
}
"""What separates labels elsewhere, and would be part of a name here, with its name in messages."""
_JOINT = re.compile(r"([\W_]+)")
"""What may separate labels and may be part of a name: decided by whether the parts are names of their own."""
_MOST_PARTS = 12
"""Of a joined name; a longer one is no list of labels."""
_BRACKETS = {"[": "]", "(": ")", "{": "}"}
_QUOTES = "'\"`‘’“”"


def is_word_for_nothing(name: str) -> bool:
    """Whether ``name`` says that there is no object, as none, N/A, - or _background_ do."""
    plain = re.sub(r"[\s_.\-<>()\[\]*?!/#]+", "", name).casefold()
    return plain in _NOTHING or not plain or re.fullmatch(r"#[A-Z/0]+[!?]", name) is not None  # #REF! of a spreadsheet


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
    """Add labels that are written in another way than as names between spaces or ``;``, once for each way.

    Args:
        cells: Line number to the cell with the labels, and the names that it gives.
        classes: Names that are meant as they are.
        source: How messages name the file.
        problems: Receives them, under the kind "dialect".
    """
    known = {name.casefold() for _, names in cells.values() for name in names} | {name.casefold() for name in classes}
    found: dict[str, list[tuple[int, list[str]]]] = {}
    for line, (cell, names) in cells.items():
        unknown = [name for name in names if name not in classes]
        dialect = _dialect(cell, unknown, known) if unknown and cell not in classes else None
        if dialect is not None:
            parts = [part for name in names for part in _joined(name, known) or [_without_number(name)]]
            pieces = parts if parts != list(names) else _pieces(cell)
            found.setdefault(dialect, []).append((line, pieces))
    for dialect, lines in found.items():
        line, pieces = lines[0]
        problems.add(
            "dialect",
            f"{source}: {len(lines):,} of {len(cells):,} lines have {dialect}, e.g. line {line} "
            f"{quoted(cells[line][0])}; separate labels by ';' (write {quoted(';'.join(pieces))}), or name the classes "
            "as they stand there in data.classes",
        )


def _dialect(cell: str, names: Sequence[str], known: Collection[str]) -> str | None:
    """How ``cell`` writes its labels, in words; None where that is as it should be."""
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
        if name in {"/", "+", "&", ":"}:
            return f"labels separated by '{name}'"
        if _without_number(name) != name and not _is_series(name, known):
            return "numbers beside the names (write the names of what is there alone)"
        if _joined(name, known):
            joint = next(mark for mark in _JOINT.findall(name))
            return (
                "labels separated by spaces in a file with ';'" if joint.isspace() else f"labels separated by '{joint}'"
            )
    return None


def _joined(name: str, known: Collection[str]) -> list[str] | None:
    """The names of their own that ``name`` joins, as cat_dog does beside cat and dog; None where it does not."""
    parts = _JOINT.split(name) if len(name) <= 200 and not _NUMBER.fullmatch(name) else [name]
    if not 1 < len(parts) < 2 * _MOST_PARTS:
        return None
    # begun[i]: the names in the first i parts, joints among them, where these are nothing but names
    begun: dict[int, list[str]] = {0: []}
    for end in range(1, len(parts) + 1, 2):
        for start in range(0, end, 2):
            piece = "".join(parts[start:end])
            if start in begun and end - start < len(parts) and piece.casefold() in known:
                begun[end + 1] = [*begun[start], piece]
                break
    return begun.get(len(parts) + 1)


def _without_number(name: str) -> str:
    """The name alone of cat:1, cat=0.9 and cat(2)."""
    match = _SCORED.fullmatch(name) if len(name) <= 200 else None
    has_number = match is not None and _NUMBER.fullmatch(match["number"]) and re.search(r"[^\W\d]", match["name"])
    return match["name"].strip() if match and has_number else name


def _is_series(name: str, known: Collection[str]) -> bool:
    """Whether a number belongs to the name, as in sku:17 or sku(18): not a share, and the name without it is none."""
    match = _SCORED.fullmatch(name)
    assert match is not None
    is_share = re.fullmatch(r"[01]([.,]\d*)?|[.,]\d+|.*%", match["number"]) is not None
    return not is_share and match["mark"] != "=" and match["name"].strip().casefold() not in known


def _pieces(cell: str) -> list[str]:
    """The names that a cell of another dialect probably means."""
    inner = cell.strip("".join([*_BRACKETS, *_BRACKETS.values()]))
    marks = "".join(re.escape(mark) for mark in (*_DIALECTS, ";"))
    parts = re.split(f"[{marks}]", inner)
    if len(parts) == 1:
        parts = re.split(r"\s*[/+&:]\s*|\s+and\s+|\s+", inner)
    return [name for part in parts if (name := part.strip().strip(_QUOTES).strip())]


def check_class_names(
    counts: Mapping[str, int], source: str, problems: Problems, *, remedy: str = "leave the labels empty"
) -> None:
    """Add names that are words for nothing, that nearly are another one, or that cannot be written.

    Args:
        counts: Names that the data set itself gives, with the number of their images.
        source: How messages name the file or folder.
        problems: Receives them; names that differ by case, spaces and marks such as ``-`` and ``?`` alone count as
            nearly the same.
        remedy: What to do with images of nothing.
    """
    for name, count in counts.items():
        odd = odd_character(re.sub(r"[/\\]", "", name).lstrip("."))
        if odd is not None:
            problems.add("class name", f"{source}: {quoted(name)} can be no name of a class: {odd}; correct it")
        elif is_word_for_nothing(name):
            text = f"{source}: is '{name}' ({count:,} images) a class, or a word for nothing?"
            problems.add("nothing", f"{text}  {remedy[0].upper()}{remedy[1:]}, or name all classes in data.classes")
    folded_names = {name.casefold() for name in counts}
    if folded_names <= _YES | _NO and (no := [name for name in counts if name.casefold() in _NO]):
        text = f"{source}: is '{no[0]}' ({counts[no[0]]:,} images) a class, or does it say that the class is not there?"
        problems.add("nothing", f"{text}  {remedy[0].upper()}{remedy[1:]}, or name all classes in data.classes")
    numbers = [name for name in counts if _NUMBER.fullmatch(name)]
    words = [name for name in counts if name not in numbers and re.search(r"[^\W\d_]", name)]
    if numbers and words:
        shown, beside = (", ".join(f"{quoted(n)} ({counts[n]:,})" for n in these[:3]) for these in (numbers, words))
        text = f"{source}: numbers, {shown}, stand beside names, {beside}: counts, scores, or a 0 for nothing?"
        problems.add(
            "numbers",
            f"{text}  Write names alone, {remedy} where there is nothing, or name all classes in data.classes",
        )
    alike: dict[str, list[str]] = {}
    for name in counts:
        shown = "".join(character for character in name if unicodedata.category(character) != "Cf")  # has a width
        folded = unicodedata.normalize("NFKC", shown).casefold()
        bare = folded if _NUMBER.fullmatch(folded) else re.sub(r"[\s_\-.,!?~*]+", "", folded)
        alike.setdefault(bare or folded, []).append(name)
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
        close = [one for ending in ("s", "es") if (one := name.removesuffix(ending)) != name and one in counts] or close
        if close and len(name) > 3 and not (name.isdecimal() and close[0].isdecimal()):
            odd.append(f"'{name}' ({count:,}) beside '{close[0]}' ({counts[close[0]]:,})")
    lines: list[str] = []
    rest = [f"'{name}' ({counts[name]:,})" for name in counts if re.sub(r"[\W_]", "", name).casefold() in _REST]
    if rest:
        text = f"{source}: {', '.join(rest)} is learnt as a class of its own, though it may stand for many things"
        lines.append(f"{text}: leave the labels empty where none of the classes is there, or set data.classes")
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
