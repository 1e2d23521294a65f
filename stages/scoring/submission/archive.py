"""The archive that PASCAL VOC 2012's test server takes: what it is made of, and making it.

Reads predictions (palette PNG with class indices).  Writes ``results/VOC2012/Segmentation/comp6_test_cls/<id>.png`` in
one tar.gz that holds nothing else; equal predictions give equal bytes on one version of Pillow and zlib.
Source: Everingham et al., "The PASCAL VOC 2012 Challenge Development Kit", section "Submission of Results"; mode P with
the palette of VOClabelcolormap.m, since the server reads indices and refuses colours.
"""

from __future__ import annotations

import gzip
import io
import tarfile
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from stages.contracts import BACKGROUND_INDEX, encode_index_mask, read_index_mask
from stages.data.adapters.voc import VOC_CLASSES
from stages.errors import DataError

Competition = Literal["comp5", "comp6"]
"""comp5: trained on nothing but VOC's own trainval images; comp6: on anything but the test images."""

COMPETITIONS: tuple[Competition, ...] = ("comp5", "comp6")

NUM_VOC_TEST = 1456
"""Images of VOC2012's list ImageSets/Segmentation/test.txt."""

_ROOT = "results/VOC2012/Segmentation"


def result_folder(competition: Competition) -> str:
    """The folder of the masks inside the archive."""
    return f"{_ROOT}/{competition}_test_cls"


def voc_values(class_names: Sequence[str]) -> NDArray[np.uint8]:
    """VOC's mask value of each class index, uint8 (K + 1,): background is 0 in both.

    Args:
        class_names: The K foreground classes of a run in order, all among VOC's 20.
    """
    return np.array([BACKGROUND_INDEX, *(VOC_CLASSES.index(name) + 1 for name in class_names)], dtype=np.uint8)


def build_archive(
    predictions: Iterable[tuple[str, Path]], values: NDArray[np.uint8], competition: Competition
) -> bytes:
    """The archive of ``predictions`` as the bytes of a tar.gz: names sorted, no times, no users.

    Args:
        predictions: Image id and its mask of class indices, each id once.
        values: VOC's value by class index, from ``voc_values``.
        competition: Names the folder.

    Raises:
        DataError: a prediction is missing, unreadable, or has an index that is no class.
    """
    buffer = io.BytesIO()
    # an empty name and no time: both would stand in gzip's header
    with (
        gzip.GzipFile(filename="", mode="wb", fileobj=buffer, mtime=0) as compressed,
        tarfile.open(fileobj=compressed, mode="w", format=tarfile.PAX_FORMAT) as archive,
    ):
        for image_id, path in sorted(predictions):
            data = encode_index_mask(_voc_mask(path, values))
            member = tarfile.TarInfo(f"{result_folder(competition)}/{image_id}.png")
            member.size = len(data)
            archive.addfile(member, io.BytesIO(data))
    return buffer.getvalue()


def _voc_mask(path: Path, values: NDArray[np.uint8]) -> NDArray[np.uint8]:
    mask = read_index_mask(path)
    if mask.max() >= len(values):
        raise DataError(f"{path}: expected class indices 0 … {len(values) - 1} of the run, found {mask.max()}")
    return values[mask]
