"""PASCAL VOC 2012 on disk: lists, image-level labels and masks, with all of its classes or some.

Reads (below ``root``, the folder VOCdevkit/VOC2012): ImageSets/Segmentation/*.txt, the names in JPEGImages,
SegmentationClass and SegmentationClassAug, and labels from Annotations/*.xml or from a CSV.  Opens no image.
Source: Everingham et al., "The PASCAL VOC 2012 Challenge Development Kit"; trainaug: Hariharan et al., "Semantic
Contours from Inverse Detectors", ICCV 2011 (10,582 images = SBD and VOC train, less VOC val).
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Literal

from pydantic import Field, field_validator

from stages.contracts import BACKGROUND_INDEX, IGNORE_INDEX, IMAGE_SUFFIXES, ClassList, StageConfig
from stages.data.class_names import nearest
from stages.data.joining import Sources, join_sources
from stages.data.names import ImageNames
from stages.data.readers import (
    check_label_lines,
    check_mask_folder,
    files_by_id,
    match_masks,
    read_annotation,
    read_id_list,
    read_labels_csv,
)
from stages.data.records import IdList, Problems, Scan, empty_scan, quoted

VOC_CLASSES = (
    "aeroplane",
    "bicycle",
    "bird",
    "boat",
    "bottle",
    "bus",
    "car",
    "cat",
    "chair",
    "cow",
    "diningtable",
    "dog",
    "horse",
    "motorbike",
    "person",
    "pottedplant",
    "sheep",
    "sofa",
    "train",
    "tvmonitor",
)
"""The 20 foreground classes; the i-th (from 1) has mask value i."""

_LISTS = "ImageSets/Segmentation"


class VocConfig(StageConfig):
    """A data set in VOC's layout with VOC's class names and mask values."""

    format: Literal["voc"] = "voc"
    root: Path
    """The folder that holds JPEGImages and ImageSets, e.g. VOCdevkit/VOC2012."""
    classes: tuple[str, ...] | None = Field(default=None, min_length=1)
    """Foreground classes in the order of the label indices; empty (null) takes VOC's 20."""
    other_classes: Literal["background", "ignore"] = "background"
    """What pixels of VOC classes outside ``classes`` count as; their image labels are dropped."""
    labels: Path | None = None
    """CSV with ``image,labels`` instead of Annotations/*.xml."""
    train_list: str = Field(default="trainaug", min_length=1)
    """Name of the list (without .txt) of the images that are trained on, by their labels."""
    score_list: str | None = "train"
    """Images of the train list whose masks give the scores of attention and pseudo-masks; null for none."""
    val_list: str = Field(default="val", min_length=1)
    """List of the images that the final scores are measured on; it may have no masks and no labels."""
    test_list: str | None = None
    """List of images that only ``evaluate`` sees, e.g. ``test`` of VOC2012test; it needs no masks and no labels."""
    masks: str = Field(default="SegmentationClass", min_length=1)
    """Folder of the masks that scores are measured on."""
    full_masks: str = Field(default="SegmentationClassAug", min_length=1)
    """Folder of the masks of train_segmenter.supervision=full; images without one there take that of ``masks``."""
    on_bad_image: Literal["fail", "skip"] = "fail"
    """Whether an image that does not decode ends the run or is left out with a warning."""

    @field_validator("classes")
    @classmethod
    def _check_classes(cls, names: tuple[str, ...] | None) -> tuple[str, ...] | None:
        wrong = [
            f"'{name}' is no VOC class, {nearest(name, VOC_CLASSES)}" for name in names or () if name not in VOC_CLASSES
        ]
        if wrong:
            raise ValueError("; ".join(wrong) + " (classes of your own: data.format=custom)")
        if names and len(set(names)) < len(names):
            raise ValueError("a class is named twice; name each class once")
        return names

    @property
    def class_names(self) -> tuple[str, ...]:
        """The K foreground classes in order."""
        return VOC_CLASSES if self.classes is None else self.classes

    def scan(self) -> Scan:
        """List the data set and everything that is wrong with its lists and labels; never raises for a defect."""
        return _scan(self)


def voc_mask_values(config: VocConfig) -> dict[int, int]:
    """Raw VOC mask value (0 … 20, 255) to class index."""
    other = BACKGROUND_INDEX if config.other_classes == "background" else IGNORE_INDEX
    values = {BACKGROUND_INDEX: BACKGROUND_INDEX, IGNORE_INDEX: IGNORE_INDEX}
    for raw, name in enumerate(VOC_CLASSES, start=1):
        known = name in config.class_names
        values[raw] = ClassList.class_index(config.class_names.index(name)) if known else other
    return values


def _scan(config: VocConfig) -> Scan:
    """List a VOC data set and everything that is wrong with it, without opening an image."""
    problems = Problems()
    if not _check_root(config.root, problems):
        return empty_scan(config.root, config.class_names, problems)
    for name in ("masks", "full_masks"):
        if getattr(config, name) != VocConfig.model_fields[name].default:
            check_mask_folder(config.root, getattr(config, name), f"data.{name}", problems)
    images = files_by_id(config.root, "JPEGImages", IMAGE_SUFFIXES, problems)
    names = ImageNames(images, root=config.root)
    lists = _read_lists(config, names, problems)
    if config.labels is None:
        labels = _labels_of_xml(config, lists, images, problems)
    else:
        labels = _labels_of_csv(config.labels, config, lists, images, names, problems)
    masks, full_masks = (
        match_masks(config.root, folder, images, "JPEGImages") for folder in (config.masks, config.full_masks)
    )
    sources = Sources(
        root=config.root,
        class_names=config.class_names,
        mask_values=voc_mask_values(config),
        lists=lists,
        labels=labels,
        images=images,
        masks=masks.masks,
        full_masks=full_masks.masks,
        image_folder="JPEGImages",
        mask_folder=config.masks,
        mask_folders=(masks, full_masks),
    )
    return Scan(replace(join_sources(sources, problems), has_voc_palette=True), problems)


def _check_root(root: Path, problems: Problems) -> bool:
    if (root / "JPEGImages").is_dir():
        return True
    inner = [path for path in (root / "VOC2012", root / "VOCdevkit/VOC2012") if (path / "JPEGImages").is_dir()]
    if inner:
        problems.add(
            "root", f"data.root: {root} has no folder JPEGImages, but {inner[0]} has; set data.root={inner[0]}"
        )
    elif root.is_dir():
        problems.add("root", f"data.root: {root} has no folder JPEGImages; name the folder VOCdevkit/VOC2012")
    else:
        text = f"data.root: folder {root} does not exist; correct the path, or fetch VOC with `wsss data voc DIR`"
        problems.add("root", text)
    return False


def _read_lists(config: VocConfig, names: ImageNames, problems: Problems) -> dict[str, IdList]:
    """The lists that could be read, by split."""
    files = {"train": config.train_list, "train_score": config.score_list, "val": config.val_list}
    files["test"] = config.test_list
    lists: dict[str, IdList] = {}
    for split, name in files.items():
        if name is None:
            continue
        path = config.root / _LISTS / f"{name}.txt"
        if not path.is_file():
            problems.add("missing list", _missing_list(path, split, name))
            continue
        listed = read_id_list(path, f"{_LISTS}/{name}.txt", problems, names)
        if listed is not None:
            lists[split] = listed
    return lists


def _missing_list(path: Path, split: str, name: str) -> str:
    there = sorted(file.stem for file in path.parent.glob("*.txt"))
    found = f"found {', '.join(there)}" if there else "there is no list at all"
    key = {"train": "train_list", "train_score": "score_list", "val": "val_list", "test": "test_list"}[split]
    text = f"data.{key}: {path} does not exist ({found}); "
    if name == "trainaug":
        return text + (
            "plain VOC has no trainaug: `wsss data voc DIR` makes it from SBD, "
            "or train on VOC's own 1,464 images with data.train_list=train"
        )
    if split == "test":
        return text + "unpack VOC2012test.tar from the evaluation server over the same VOCdevkit"
    if split == "train_score":
        return text + "set data.score_list=null to go without scores on training images"
    return text + f"correct data.{key} or add the list"


def _labels_of_xml(
    config: VocConfig, lists: dict[str, IdList], images: dict[str, str], problems: Problems
) -> dict[str, tuple[int, ...]]:
    """Label indices of the images of train and val that have an annotation."""
    files = files_by_id(config.root, "Annotations", (".xml",), problems)
    annotations = ImageNames(files)
    if not files:
        text = f"{config.root}: there is no folder Annotations with the labels; add it, or name a CSV with data.labels"
        problems.add("labels", text)
        return {}
    labels: dict[str, tuple[int, ...]] = {}
    for split in ("train", "val"):
        for image_id in lists[split].ids if split in lists else ():
            known = annotations.get(image_id)
            source = f"Annotations/{image_id}.xml" if known is None else files[known]
            if known is not None:
                found = read_annotation(config.root / source, problems)
                labels[image_id] = _label_indices(config, found, source, problems)
            elif split == "train" and image_id in images:
                text = f"{source}: the labels of training image '{image_id}' are missing"
                problems.add("no labels", f"{text}; add the file or remove the image from the list")
    return labels


def _labels_of_csv(
    path: Path,
    config: VocConfig,
    lists: dict[str, IdList],
    images: dict[str, str],
    names: ImageNames,
    problems: Problems,
) -> dict[str, tuple[int, ...]]:
    """Label indices of every image of the CSV."""
    if not path.is_file():
        text = f"data.labels: {path} does not exist; correct the path, or set null to read Annotations/*.xml"
        problems.add("labels", text)
        return {}
    rows = read_labels_csv(path, VOC_CLASSES, path.name, problems, names)
    train = lists["train"].ids if "train" in lists else ()
    check_label_lines(rows, train=train, images=images, source=path.name, folder="JPEGImages", problems=problems)
    return {
        image_id: _label_indices(config, row.names, f"{path.name} line {row.line}", problems)
        for image_id, row in (rows or {}).items()
    }


def _label_indices(config: VocConfig, names: tuple[str, ...], source: str, problems: Problems) -> tuple[int, ...]:
    for name in names:
        if name not in VOC_CLASSES:
            text = f"{source}: unknown class {quoted(name)}, {nearest(name, VOC_CLASSES)}"
            problems.add("unknown class", text)
    return tuple(sorted({config.class_names.index(name) for name in names if name in config.class_names}))
