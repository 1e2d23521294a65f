"""Make VOC's augmented training set (trainaug) from the Semantic Boundaries Dataset.

Reads: SBD's ``cls/*.mat`` and VOC's train and val lists and masks.
Writes: ``SegmentationClassAug/*.png`` and, last, ``ImageSets/Segmentation/trainaug.txt`` below VOC's folder.
Source: Hariharan et al., "Semantic Contours from Inverse Detectors", ICCV 2011; the list of 10,582 images is SBD's
11,355 images and VOC 2012 train, less VOC 2012 val.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from stages.contracts import IMAGE_SUFFIXES, MASK_SUFFIXES, Progress, read_image_size, write_atomic, write_index_mask
from stages.data.readers import files_by_id, read_id_list
from stages.data.records import PROBLEMS_SHOWN, Problems, some
from stages.errors import DataError

NUM_TRAINAUG = 10_582
"""Images of trainaug as the whole field uses it."""

_NUM_CLASSES = 20
_LISTS = "ImageSets/Segmentation"


def convert_sbd(sbd: Path, voc: Path, progress: Progress, *, expected: int = NUM_TRAINAUG) -> int:
    """Write trainaug's masks and list into VOC's folder.

    Images of VOC train get VOC's own mask, which is finer and marks unsure borders with 255; all others SBD's.
    Stopped and called again, it goes on with the first missing mask; the list is written when all masks are there.

    Args:
        sbd: SBD's folder: that of ``cls``, or benchmark_RELEASE or its parent.
        voc: The folder VOCdevkit/VOC2012.
        progress: Counts masks.
        expected: How many images there must be.

    Returns:
        The number of images.

    Raises:
        DataError: folders, lists or masks are missing or damaged, or the number is not ``expected``; the list is
            not written then.
    """
    classes = _find_classes(sbd)
    train, val = _voc_list(voc, "train"), set(_voc_list(voc, "val"))
    found = Problems()
    mats = {image_id: classes / name for image_id, name in files_by_id(classes, ".", (".mat",), found).items()}
    jpegs = {i: voc / name for i, name in files_by_id(voc, "JPEGImages", IMAGE_SUFFIXES, found).items()}
    pngs = {i: voc / name for i, name in files_by_id(voc, "SegmentationClass", MASK_SUFFIXES, found).items()}
    if found:
        raise DataError("files of SBD and VOC have one name:", found.lines(PROBLEMS_SHOWN))
    ids = sorted((set(mats) | set(train)) - val)
    _check_ids(ids, voc, jpegs, expected)
    problems: list[str] = []
    official = set(train)
    for number, image_id in enumerate(ids):
        progress.step("converting SBD", number, len(ids), unit="masks")
        target = voc / "SegmentationClassAug" / f"{image_id}.png"
        if not target.exists():
            try:
                if image_id in official:
                    _copy_mask(pngs.get(image_id, voc / "SegmentationClass" / target.name), target)
                else:
                    _write_mask(mats[image_id], jpegs[image_id], target)
            except DataError as error:
                problems.append(str(error))
    progress.step("converting SBD", len(ids), len(ids), unit="masks")
    if problems:
        raise DataError(f"{len(problems):,} masks of trainaug could not be made:", problems[:PROBLEMS_SHOWN])
    write_atomic(voc / _LISTS / "trainaug.txt", "".join(f"{image_id}\n" for image_id in ids).encode())
    return len(ids)


def _find_classes(sbd: Path) -> Path:
    """The folder ``cls`` of SBD, wherever its archive was unpacked."""
    for inner in ("cls", "dataset/cls", "benchmark_RELEASE/dataset/cls"):
        if (sbd / inner).is_dir():
            return sbd / inner
    raise DataError(f"{sbd}: found no folder cls of SBD (nor dataset/cls); unpack benchmark.tgz there")


def _voc_list(voc: Path, name: str) -> tuple[str, ...]:
    problems = Problems()
    listed = read_id_list(voc / _LISTS / f"{name}.txt", f"{_LISTS}/{name}.txt", problems)
    if listed is None or problems or not listed.ids:
        text = f"{voc}: VOC's list {name} is missing, empty or damaged; unpack VOCtrainval_11-May-2012.tar there"
        raise DataError(text, problems.lines(PROBLEMS_SHOWN))
    return listed.ids


def _check_ids(ids: Sequence[str], voc: Path, jpegs: Collection[str], expected: int) -> None:
    if len(ids) != expected:
        raise DataError(
            f"SBD and VOC train less VOC val are {len(ids):,} images, expected {expected:,}; "
            "unpack both archives again, one of them is incomplete or another release"
        )
    missing = [image_id for image_id in ids if image_id not in jpegs]
    if missing:
        text = f"{voc}/JPEGImages has no file for {len(missing):,} images of trainaug: {some(missing)}"
        raise DataError(f"{text}; unpack VOCtrainval_11-May-2012.tar again")


def _copy_mask(source: Path, target: Path) -> None:
    """VOC's own mask, byte for byte."""
    if not source.is_file():
        raise DataError(f"{source}: VOC's mask is missing; unpack VOCtrainval_11-May-2012.tar again")
    write_atomic(target, source.read_bytes())


def _write_mask(mat: Path, jpeg: Path, target: Path) -> None:
    """SBD's mask, which must have the size of its image."""
    mask = read_sbd_mask(mat)
    try:
        height, width = read_image_size(jpeg)
    except DataError as error:
        raise DataError(f"{error.message}; unpack VOCtrainval_11-May-2012.tar again") from error
    if (height, width) != mask.shape:
        text = f"{mat}: expected {height}×{width} pixels as its image"
        raise DataError(f"{text}, found {mask.shape[0]}×{mask.shape[1]}; unpack benchmark.tgz again")
    write_index_mask(target, mask)


def read_sbd_mask(path: Path) -> NDArray[np.uint8]:
    """Read the class indices out of one of SBD's .mat files.

    Args:
        path: ``cls/<image id>.mat`` with the structure GTcls and its field Segmentation.

    Returns:
        Values 0 … 20 (VOC's indices; SBD has no 255), uint8 (H, W).

    Raises:
        DataError: missing, damaged, or not SBD's structure.
    """
    try:
        mask = np.asarray(_read_matlab_5(path)["GTcls"][0]["Segmentation"][0])
    except Exception as error:  # scipy's reader answers damaged bytes with whatever its parser trips over
        text = f"{path}: is no readable SBD mask ({type(error).__name__}: {error}); unpack benchmark.tgz again"
        raise DataError(text) from error
    if mask.dtype.kind not in "iuf" or mask.ndim != 2 or mask.size == 0:
        raise DataError(f"{path}: expected class indices 0 … {_NUM_CLASSES} in two dimensions; it is no mask of SBD")
    is_class = np.isin(mask, np.arange(_NUM_CLASSES + 1))  # of floats NaN, infinity and fractions are none
    if not is_class.all():
        odd = mask[~is_class]
        raise DataError(
            f"{path}: expected class indices 0 … {_NUM_CLASSES}, found {odd.size:,} other values, e.g. {odd[0]}; "
            "unpack benchmark.tgz again"
        )
    return mask.astype(np.uint8)


def _read_matlab_5(path: Path) -> dict[str, Any]:
    """The variable GTcls of a file of MATLAB 5; scipy would take noise for an array of MATLAB 4, of gigabytes."""
    from scipy.io import loadmat

    with path.open("rb") as file:
        if not file.read(19).startswith(b"MATLAB 5.0 MAT-file"):
            raise ValueError("expected a file of MATLAB 5")
    return loadmat(path, variable_names=["GTcls"])
