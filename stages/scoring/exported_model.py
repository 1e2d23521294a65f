"""An exported segmenter: a folder that can be used without the store, the config and the data set.

    config.json          net, classes, normalisation, how to look at images, provenance; digests of the other files
    model.safetensors    the tensors
    model.onnx           the same net for other runtimes (may be left out)
    README.md            the model card (``stages.scoring.model_card``)

Written by ``stages.scoring.export``; reads are checked against the digests, and classes, net and normalisation against
the metadata in ``model.safetensors``, so that no other file can stand in.  Torch-free at import; never unpickles.
"""

from __future__ import annotations

import functools
import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from pydantic import Field, ValidationError

from stages.contracts import StageConfig, read_json, stand_in
from stages.data.transforms import IMAGE_MEAN, IMAGE_STD
from stages.errors import DamagedFileError, InputError
from stages.nets.segmenters.config import SegmenterConfig
from stages.nets.segmenters.files import WEIGHTS_FILE, load_segmenter, read_segmenter_record
from stages.scoring.image_prediction import SegmenterSource
from stages.scoring.prediction import PredictionConfig

if TYPE_CHECKING:
    from stages.nets.segmenters.segmenter import Segmenter

CONFIG_FILE = "config.json"
TENSORS_FILE = "model.safetensors"
ONNX_FILE = "model.onnx"

KIND = "wsss-segmenter"
VERSION = 1


class Normalisation(StageConfig):
    """From bytes to what the network wants: (value / 255 - mean) / std, for R, G, B."""

    channels: Literal["RGB"] = "RGB"
    mean: tuple[float, float, float] = IMAGE_MEAN
    std: tuple[float, float, float] = IMAGE_STD


class OnnxRecord(StageConfig):
    """How ``model.onnx`` is called and how close it was to torch."""

    input: str
    """Name; normalised images, float32 (batch, 3, height, width), any of these but 3; height and width from 32 on."""
    output: str
    """Name; logits, float32 (batch, classes, height, width)."""
    opset: int
    max_abs_difference: float
    """Largest |Δlogit| between onnxruntime and torch in the check."""
    max_abs_logit: float
    """Largest |logit| there."""
    checked_shapes: tuple[tuple[int, int, int, int], ...]


class FileRecord(StageConfig):
    """Size and digest of a file beside ``config.json``."""

    size: int
    sha256: str


class ExportRecord(StageConfig):
    """``config.json``."""

    kind: Literal["wsss-segmenter"] = KIND
    version: int = Field(default=VERSION)
    net: SegmenterConfig
    classes: tuple[str, ...]
    """Mask value 0 first: background."""
    normalisation: Normalisation
    prediction: PredictionConfig
    """How the config that trained it looks at whole images."""
    provenance: dict[str, Any]
    onnx: OnnxRecord | None
    trained_sha256: str
    """Of the tensors' file as it was trained: with it a mask counts as made by the same model."""
    files: dict[str, FileRecord]


def read_export(path: Path) -> tuple[Path, ExportRecord]:
    """The folder of an exported model and its record.

    Args:
        path: The folder, or ``config.json`` or ``model.safetensors`` in it.

    Raises:
        InputError: it is no exported model, or one of another version or normalisation.
        DamagedFileError: a file is missing or differs from what was written, also in what a mask value means.
    """
    if path.suffix.lower() == ".onnx":
        raise InputError(f"{path}: wsss predicts from {TENSORS_FILE}; name the folder, or run the ONNX file elsewhere")
    folder = path.parent if path.name in (CONFIG_FILE, TENSORS_FILE) else path
    if not (folder / CONFIG_FILE).is_file():
        raise InputError(
            f"{path}: expected a folder with {CONFIG_FILE} and {TENSORS_FILE}, which `wsss export CONFIG --out DIR` "
            f"writes; there is no {folder / CONFIG_FILE}"
        )
    record = _parse(folder / CONFIG_FILE, read_json(folder / CONFIG_FILE))
    _check_file(folder / TENSORS_FILE, record.files[TENSORS_FILE])
    _check_metadata(folder, record)
    return folder, record


def metadata(record: ExportRecord) -> dict[str, str]:
    """What the tensors' and the ONNX file say of themselves, so that they can be used without ``config.json``."""
    return {
        "kind": record.kind,
        "classes": json.dumps(record.classes, ensure_ascii=False),
        "net": json.dumps(record.net.model_dump(mode="json"), sort_keys=True),
        "normalisation": json.dumps(record.normalisation.model_dump(mode="json"), sort_keys=True),
        "key": str(record.provenance.get("key") or ""),
    }


def _check_metadata(folder: Path, record: ExportRecord) -> None:
    """Refuse a config of other classes, in another order say, than the tensors were written with."""
    from safetensors import SafetensorError, safe_open

    path = folder / TENSORS_FILE
    try:
        with safe_open(path, framework="np") as tensors:
            found = tensors.metadata() or {}
    except (SafetensorError, OSError) as error:
        raise DamagedFileError(f"{path} is damaged ({error}); export the model again") from error
    expected = metadata(record)
    wrong = [name for name in expected if found.get(name) != expected[name]]
    if wrong:
        name = wrong[0]
        raise DamagedFileError(
            f"{folder / CONFIG_FILE} was edited or belongs to another model: its {', '.join(wrong)} are not those in "
            f"{TENSORS_FILE} ({name}: expected {found.get(name, 'nothing')!s:.300}, found {expected[name]!s:.300}); "
            "export the model again"
        )


def _parse(path: Path, content: Any) -> ExportRecord:  # noqa: ANN401 - JSON is any
    if not isinstance(content, Mapping) or content.get("kind") != KIND:
        raise InputError(f"{path}: expected the {CONFIG_FILE} of `wsss export` (kind: {KIND}), found another file")
    if content.get("version") != VERSION:
        raise InputError(
            f"{path}: expected version {VERSION}, found {content.get('version')!r}; use the wsss that exported it"
        )
    try:
        record = ExportRecord.model_validate(content)
    except ValidationError as error:
        raise DamagedFileError(f"{path} is damaged or was edited ({error}); export the model again") from error
    if record.normalisation != Normalisation() or TENSORS_FILE not in record.files:
        raise InputError(f"{path}: the normalisation or the list of files is not what wsss writes; export it again")
    return record


def check_files(folder: Path, record: ExportRecord) -> None:
    """Compare every file of an export with its digest.

    Raises:
        DamagedFileError: one is missing or differs.
    """
    for name, expected in record.files.items():
        _check_file(folder / name, expected)


def _check_file(path: Path, expected: FileRecord) -> None:
    if not path.is_file():
        raise DamagedFileError(f"{path} is missing; export the model again")
    with path.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
        file.seek(0)
        instead = stand_in(file.read(512))
    if digest != expected.sha256:
        found = instead or f"found {path.stat().st_size} with {digest[:12]}…; export the model again"
        raise DamagedFileError(
            f"{path} is damaged: expected {expected.size} bytes with sha256 {expected.sha256[:12]}…, {found}"
        )


def load_export(folder: Path, record: ExportRecord, device: str = "cpu") -> Segmenter:
    """Build the segmenter on ``device``, in evaluation mode.

    Raises:
        DamagedFileError: the tensors are of another net.
    """
    import torch

    from stages.nets.segmenters.build import build_segmenter
    from stages.nets.weights import load_weights

    with torch.random.fork_rng(devices=[]):  # the random start is overwritten at once
        segmenter = build_segmenter(record.net, len(record.classes), init="random", weights={})
    load_weights(segmenter, folder / TENSORS_FILE)
    return segmenter.to(device).eval()


def exported_source(folder: Path, record: ExportRecord) -> SegmenterSource:
    """An exported segmenter as ``predict_pictures`` takes it."""
    load = functools.partial(load_export, folder, record)
    return SegmenterSource(record.classes, record.trained_sha256, load)


def trained_source(folder: Path) -> SegmenterSource:
    """The output folder of ``train_segmenter`` as ``predict_pictures`` takes it.

    Raises:
        DamagedFileError: a file is missing or damaged.
    """
    record = read_segmenter_record(folder)
    try:
        with (folder / WEIGHTS_FILE).open("rb") as file:
            digest = hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise DamagedFileError(f"{folder / WEIGHTS_FILE} is not readable ({error}); rebuild train_segmenter") from error
    return SegmenterSource(("background", *record.classes), digest, functools.partial(load_segmenter, folder))
