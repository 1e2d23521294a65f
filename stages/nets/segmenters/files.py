"""Trained segmenters on disk: ``segmenter.json`` (net and classes) beside ``segmenter.safetensors`` (tensors).

Written by ``train_segmenter``, read by ``evaluate`` and by whoever predicts.  Torch-free at import.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from stages.contracts import ClassList, StageConfig, read_model, write_json
from stages.nets.segmenters.config import AnySegmenterConfig, SegmenterConfig

if TYPE_CHECKING:
    import torch

    from stages.nets.segmenters.segmenter import Segmenter

RECORD_FILE = "segmenter.json"
WEIGHTS_FILE = "segmenter.safetensors"


class SegmenterRecord(StageConfig):
    """What has to be known to rebuild a trained segmenter."""

    net: SegmenterConfig
    num_classes: int
    """C, background included."""
    classes: tuple[str, ...]
    """The foreground classes in order."""


def save_segmenter(
    folder: Path, config: AnySegmenterConfig, module: Segmenter, classes: ClassList | Sequence[str]
) -> None:
    """Write a segmenter into ``folder``, the tensors first; equal segmenters give equal bytes.

    Args:
        folder: Output folder of the stage.
        config: The net that ``module`` was built from.
        module: The trained net.
        classes: The foreground classes in order.
    """
    from stages.nets.weights import save_weights

    names = classes.names if isinstance(classes, ClassList) else tuple(classes)
    if module.num_classes != len(names) + 1:
        raise ValueError(f"the net scores {module.num_classes} classes, expected background and {len(names)} names")
    record = SegmenterRecord(net=config, num_classes=module.num_classes, classes=names)
    save_weights(module, folder / WEIGHTS_FILE)
    write_json(folder / RECORD_FILE, record.model_dump(mode="json"))


def read_segmenter_record(folder: Path) -> SegmenterRecord:
    """The net and the classes of a saved segmenter, without loading it.

    Raises:
        DamagedFileError: missing or not a record.
    """
    return read_model(folder / RECORD_FILE, SegmenterRecord, "train_segmenter")


def load_segmenter(folder: Path, device: torch.device | str = "cpu") -> Segmenter:
    """Rebuild a saved segmenter on ``device``, in evaluation mode.

    Raises:
        DamagedFileError: a file is missing or damaged.
    """
    import torch

    from stages.nets.segmenters.build import build_segmenter
    from stages.nets.weights import load_weights

    record = read_segmenter_record(folder)
    with torch.random.fork_rng(devices=[]):  # the random start is overwritten at once: the caller's numbers stay
        segmenter = build_segmenter(record.net, record.num_classes, init="random", weights={})
    load_weights(segmenter, folder / WEIGHTS_FILE)
    return segmenter.to(device).eval()
