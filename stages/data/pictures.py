"""Anybody's image files: find them and name what comes out of them.

Opens no file; writes nothing.  Torch-free.
"""

from __future__ import annotations

import glob
import os
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from stages.contracts import IMAGE_SUFFIXES, expand_path, odd_kind
from stages.errors import InputError


@dataclass(frozen=True)
class PictureFile:
    """An image file with the name of what is made of it."""

    path: Path
    name: str
    """Path of the results inside the output folder, without a suffix; forward slashes."""


@dataclass(frozen=True)
class FoundPictures:
    """What words mean."""

    pictures: tuple[PictureFile, ...]
    left_out: tuple[str, ...] = ()
    """One line for each thing that is called as an image and cannot be read as a file: a pipe, a broken link."""


def find_pictures(words: Sequence[str], out: Path) -> FoundPictures:
    """The files that ``words`` mean, each once, in order.

    A file gives its stem as the name; a file in a folder its path inside that folder; of a pattern, every match.

    Args:
        words: Files, folders (searched to the bottom, hidden files left out) and patterns such as ``shots/**/*.jpg``;
            ``~`` and ``$VAR`` as in a shell.  A file that is named itself may be called anything.
        out: Output folder; nothing in it is taken from a folder, so that a second call does not see the first one's.

    Raises:
        InputError: a word means nothing, no image is left, or two files would have one name; all of them are listed.
            Or a folder is ``out`` itself.
    """
    problems: list[str] = []
    left_out: dict[str, None] = {}
    found: dict[Path, PictureFile] = {}
    for word in words:
        for file in _expand(word, out, problems, left_out):
            if (why := _why_left_out(file.path)) is not None:
                left_out[f"{file.path}: {why}; left out"] = None
            else:
                found.setdefault(file.path.resolve(), file)
    if problems:
        raise InputError("these images are not there; nothing was done", problems)
    if not found:
        text = f"expected images, found none in {', '.join(words) or 'an empty list'}; name files or folders"
        raise InputError(text, left_out)
    pictures = tuple(found.values())
    _check_names(pictures)
    return FoundPictures(pictures, tuple(left_out))


def _why_left_out(path: Path) -> str | None:
    """Why ``path`` cannot be read as a file; None where it can, as far as that shows from outside."""
    try:
        kind = odd_kind(path)
    except FileNotFoundError:
        return f"a link to {path.readlink()}, which is not there" if path.is_symlink() else "not there any more"
    except OSError as error:  # a link to itself has too many levels
        return (error.strerror or str(error)).lower()
    return None if kind is None else f"{kind}, not an image file"


def _expand(word: str, out: Path, problems: list[str], left_out: dict[str, None]) -> Iterator[PictureFile]:
    """The files of one word; says so where there are none."""
    try:
        path = Path(word) if os.path.lexists(word) else expand_path(word)
    except InputError as error:
        problems.append(error.message)
        return
    if path.is_dir():
        if path.resolve() == out.resolve():
            raise InputError(
                f"{word} is the output folder too: the next call would take masks and overlays for images; choose "
                "another --out, or name the images by a pattern"
            )
        files = list(_walk(path, out, left_out))
        yield from files
        if not files and _is_called_image(path.name):
            yield PictureFile(path, path.stem)  # as a shell's pattern gives it
        elif not files:
            problems.append(f"{word}: no image in this folder; files are taken by their suffix: {_listed()}")
    elif os.path.lexists(path):
        yield PictureFile(path, path.stem)
    else:
        is_pattern = glob.has_magic(word)
        files = _matches(path) if is_pattern else []
        if not files:
            problems.append(f"{word}: {'no match' if is_pattern else 'no such file'}")
        # a folder is nobody's image, whoever calls it x.jpg means one
        yield from (PictureFile(file, file.stem) for file in files if not file.is_dir() or _is_called_image(file.name))


def _matches(pattern: Path) -> list[Path]:
    """What a pattern means, sorted; hidden files only where it has them; ``**`` follows no links, they may circle."""
    first = next(place for place, part in enumerate(pattern.parts) if glob.has_magic(part))
    root, parts = Path(*pattern.parts[:first]), list(pattern.parts[first:])
    parts = [part if part == "**" else part.replace("**", "*") for part in parts]
    parts += ["*"] if parts[-1] == "**" else []  # to pathlib ** alone means folders
    found = set(root.glob("/".join(parts)))
    if not any(part.startswith(".") for part in parts):
        found = {file for file in found if not any(part.startswith(".") for part in file.relative_to(root).parts)}
    return sorted(found, key=str)


def _walk(folder: Path, out: Path, left_out: dict[str, None]) -> Iterator[PictureFile]:
    """The images below ``folder``, sorted; neither hidden ones nor those in ``out``."""
    skipped = out.resolve()

    def cannot_enter(error: OSError) -> None:
        left_out[f"{error.filename}: {(error.strerror or str(error)).lower()}; left out with all in it"] = None

    for parent, folders, names in os.walk(folder, onerror=cannot_enter):
        here = Path(parent)
        folders[:] = sorted(name for name in folders if name[0] != "." and (here / name).resolve() != skipped)
        for name in sorted(names):
            if name[0] != "." and _is_called_image(name):
                path = here / name
                yield PictureFile(path, path.relative_to(folder).with_suffix("").as_posix())


def _is_called_image(name: str) -> bool:
    return name.lower().endswith(IMAGE_SUFFIXES)


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
