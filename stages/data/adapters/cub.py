"""Caltech-UCSD Birds-200-2011 as it is unpacked: one label and one box for each image, masks where there are any.

Reads (below ``root``, the folder CUB_200_2011): images.txt, classes.txt, image_class_labels.txt, train_test_split.txt,
bounding_boxes.txt, and the names in images/ and segmentations/.  Opens no image.
Source: Wah et al., "The Caltech-UCSD Birds-200-2011 Dataset", CNS-TR-2011-001, and its README; boxes as wsolevaluation
reads them: columns x … x + width and rows y … y + height, cut at the image's edge.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Literal, TypeVar

from pydantic import Field

from stages.contracts import MASK_SUFFIXES, MAX_MASK_CLASSES, Box, StageConfig
from stages.data.boxes import make_box
from stages.data.joining import Sources, join_sources
from stages.data.names import ImageNames, image_id_of, odd_character
from stages.data.readers import check_mask_folder, file_names, mask_files, read_text
from stages.data.records import IdList, MaskFolder, Problems, Scan, empty_scan, quoted

Value = TypeVar("Value")

OBJECT_VALUE = 128
"""Masks are grey: 51 for each of the five people that marked the pixel; from three on it is the bird's."""


class CubConfig(StageConfig):
    """CUB-200-2011: train is its training split, val its test split."""

    format: Literal["cub"] = "cub"
    root: Path
    """The folder CUB_200_2011, which holds images.txt and images/."""
    masks: str | None = Field(default="segmentations", min_length=1)
    """Sub-folder of the masks, laid out as images/ (an archive of its own: unpack it into ``root``); may be absent."""
    on_bad_image: Literal["fail", "skip"] = "fail"
    """Whether an image that does not decode ends the run or is left out with a warning."""

    def scan(self) -> Scan:
        """List the data set and everything that is wrong with its lists and labels; never raises for a defect."""
        return _scan(self)


def _scan(config: CubConfig) -> Scan:
    """List CUB and everything that is wrong with it, without opening an image."""
    problems = Problems()
    if not _check_root(config.root, problems):
        return empty_scan(config.root, (), problems)
    paths = _Table(config.root, "images.txt", "image_id path", problems).read(_path)
    names = _Table(config.root, "classes.txt", "class_id name", problems).read(str)
    if not paths or not names:
        return empty_scan(config.root, (), problems)
    labels = _Table(config.root, "image_class_labels.txt", "image_id class_id", problems, paths).read(str)
    is_train = _Table(config.root, "train_test_split.txt", "image_id is_training_image", problems, paths).read(_flag)
    boxes = _Table(config.root, "bounding_boxes.txt", "image_id x y width height", problems, paths).read(_box)
    ids = _image_ids(paths, problems)
    classes = tuple(names.values())
    if len(set(classes)) < len(classes):
        problems.add("duplicate", "classes.txt: a class is named twice; name each class once")
    known = _label_indices(ids, labels, list(names), problems)
    test = {ids[key] for key in ids if is_train.get(key) is False}
    masks = _masks(config, paths, ids, problems)
    sources = Sources(
        root=config.root,
        class_names=classes,
        mask_values={value: int(value >= OBJECT_VALUE) for value in range(256)},
        lists={split: _split(paths, ids, is_train, split == "train") for split in ("train", "val")},
        labels=known,
        images=_existing(config.root, "images", paths, ids),
        masks=masks.masks,
        full_masks={},
        image_folder="images",
        mask_folder=config.masks or "segmentations (data.masks is null)",
        mask_folders=(masks,),
        boxes={
            ids[key]: ((known[ids[key]][0], box),)
            for key, box in boxes.items()
            if key in ids and ids[key] in test and ids[key] in known
        },
    )
    masked = IdList("the training images", tuple((0, i) for i in sources.lists["train"].ids if i in sources.masks))
    sources = replace(sources, lists={**sources.lists, "train_score": masked})
    if sources.masks and len(classes) > MAX_MASK_CLASSES:
        text = f"classes.txt: {len(classes):,} classes; masks can tell apart {MAX_MASK_CLASSES}; set data.masks=null"
        problems.add("classes", text)
    listing = join_sources(sources, problems)
    return Scan(replace(listing, has_object_masks=bool(sources.masks), is_single_label=True), problems)


def _check_root(root: Path, problems: Problems) -> bool:
    if (root / "images.txt").is_file():
        return True
    inner = root / "CUB_200_2011"
    if (inner / "images.txt").is_file():
        problems.add("root", f"data.root: {root} has no images.txt, but {inner} has; set data.root={inner}")
    elif root.is_dir():
        problems.add("root", f"data.root: {root} has no images.txt; name the folder CUB_200_2011")
    else:
        problems.add("root", f"data.root: folder {root} does not exist; correct the path")
    return False


class _Table:
    """One of CUB's files: an id and its values on each line, separated by spaces."""

    def __init__(
        self, root: Path, name: str, layout: str, problems: Problems, wanted: Mapping[str, object] | None = None
    ) -> None:
        """``layout`` names the columns; with ``wanted`` every id of it must have a line, and no other id may."""
        self._path, self._name, self._layout = root / name, name, layout
        self._problems, self._wanted = problems, wanted

    def read(self, parse: Callable[[str], Value]) -> dict[str, Value]:
        """Id to what ``parse`` makes of the rest of its line; a ValueError of it is a problem of the line."""
        if not self._path.is_file():
            self._problems.add("missing file", f"{self._path} does not exist; unpack CUB_200_2011.tgz again")
            return {}
        found: dict[str, Value] = {}
        lines = read_text(self._path, self._name, self._problems)
        for number, line in enumerate(lines or [], start=1):
            if line.strip():
                self._read_line(number, line.strip(), parse, found)
        lacking = [key for key in self._wanted or () if key not in found]
        if lines is not None and lacking:
            text = f"{self._name}: {len(lacking):,} images of images.txt have no line, e.g. id {lacking[0]}"
            self._problems.add("missing line", f"{text}; restore the file")
        return found

    def _read_line(self, number: int, line: str, parse: Callable[[str], Value], found: dict[str, Value]) -> None:
        where = f"{self._name} line {number}"
        key, _, rest = line.partition(" ")
        if key in found:
            self._problems.add("duplicate", f"{where}: id {key} has a line already; remove one of the two")
            return
        if self._wanted is not None and key not in self._wanted:
            self._problems.add("unknown id", f"{where}: id {key} is not in images.txt; remove the line")
            return
        try:
            if not rest.strip():
                raise ValueError("too few columns")  # noqa: TRY301 - one message for all that is wrong
            found[key] = parse(rest.strip())
        except ValueError as error:
            text = f"{where}: expected '{self._layout}', found {quoted(line)} ({error}); restore the file"
            self._problems.add("bad line", text)


def _path(text: str) -> str:
    parts = text.split("/")
    if not all(parts) or ".." in parts:
        raise ValueError("a path below images/ has no '..' and does not begin with '/'")
    odd = next((reason for part in parts if (reason := odd_character(part)) is not None), None)
    if odd is not None:
        raise ValueError(odd)
    return text


def _flag(text: str) -> bool:
    if text not in {"0", "1"}:
        raise ValueError("1 for training, 0 for test")
    return text == "1"


def _box(text: str) -> Box:
    numbers = text.split()
    if len(numbers) != 4:
        raise ValueError(f"expected four numbers, found {len(numbers)}")
    x, y, width, height = map(float, numbers)
    return make_box([str(x), str(y), str(x + width), str(y + height)])


def _image_ids(paths: Mapping[str, str], problems: Problems) -> dict[str, str]:
    """CUB's number of an image to its id, the file name without ending."""
    ids: dict[str, str] = {}
    first: dict[str, str] = {}
    for key, path in paths.items():
        image_id = image_id_of(path.rsplit("/", 1)[-1])
        if image_id in first:
            text = f"images.txt: {first[image_id]} and {path} give the same image id '{image_id}'"
            problems.add("same id", f"{text}; rename one of the two")
            continue
        first[image_id], ids[key] = path, image_id
    return ids


def _label_indices(
    ids: Mapping[str, str], labels: Mapping[str, str], class_keys: list[str], problems: Problems
) -> dict[str, tuple[int, ...]]:
    places = {key: place for place, key in enumerate(class_keys)}
    found: dict[str, tuple[int, ...]] = {}
    for key, image_id in ids.items():
        class_key = labels.get(key)
        if class_key in places:
            found[image_id] = (places[class_key],)
        elif class_key is not None:
            text = f"image_class_labels.txt: image id {key} has class id {class_key}, which is not in classes.txt"
            problems.add("unknown class", f"{text}; restore the files")
    return found


def _split(paths: Mapping[str, str], ids: Mapping[str, str], is_train: Mapping[str, bool], wanted: bool) -> IdList:
    entries = tuple(
        (line, ids[key]) for line, key in enumerate(paths, start=1) if key in ids and is_train.get(key) is wanted
    )
    return IdList("images.txt", entries, f"train_test_split.txt has no image with {int(wanted)}; restore the file")


def _existing(root: Path, folder: str, paths: Mapping[str, str], ids: Mapping[str, str]) -> dict[str, str]:
    """Image id to its file relative to the root, for those that are there, in whatever case and Unicode form."""
    there: dict[str, tuple[ImageNames, dict[str, str]]] = {}
    found: dict[str, str] = {}
    for key, image_id in ids.items():
        parent, _, name = paths[key].rpartition("/")
        if parent not in there:
            names = sorted(file_names(root / folder / parent))
            there[parent] = ImageNames(dict.fromkeys(names, "")), {at.lower(): at for at in names}
        exact, lower = there[parent]
        if (file := exact.get(name) or lower.get(name.lower())) is not None:
            found[image_id] = "/".join(part for part in (folder, parent, file) if part)
    return found


def _masks(config: CubConfig, paths: Mapping[str, str], ids: Mapping[str, str], problems: Problems) -> MaskFolder:
    """The masks; none where there is no folder of them."""
    if config.masks is None:
        return MaskFolder()
    if config.masks != CubConfig.model_fields["masks"].default:
        check_mask_folder(config.root, config.masks, "data.masks", problems)
    pngs = {key: path.rpartition(".")[0] + MASK_SUFFIXES[0] for key, path in paths.items()}
    masks = _existing(config.root, config.masks, pngs, ids)
    files = mask_files(config.root / config.masks, {path.rpartition("/")[0] for path in pngs.values()})
    used = set(masks.values())
    return MaskFolder(config.masks, masks, tuple(file for file in files if f"{config.masks}/{file}" not in used))
