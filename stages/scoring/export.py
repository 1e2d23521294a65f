"""Write a trained segmenter as a folder for others: safetensors, a config, and ONNX that was compared with torch.

Reads: output folder of ``train_segmenter``.  Writes: ``model.safetensors``, ``model.onnx``, ``README.md`` (the model
card), ``config.json``, which take the places of an earlier export's once all of them are on the disk.
Shapes: B images, C classes with background, H W image pixels.
Uses torch's TorchScript-based ONNX exporter: it needs no onnxscript, takes seconds, and keeps height, width and batch
free in all our nets.  (The newer one takes 6 to 30 times as long and refuses DeepLabV3+ with free sizes.)
"""

from __future__ import annotations

import hashlib
import importlib.util
import shutil
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from stages.contracts import LEAST_INPUT_PX, Progress, write_atomic, write_json
from stages.data.transforms import to_network_input
from stages.errors import DamagedFileError, EnvironmentFailure, InputError
from stages.nets.segmenters.files import WEIGHTS_FILE, load_segmenter, read_segmenter_record
from stages.scoring.exported_model import (
    CONFIG_FILE,
    ONNX_FILE,
    TENSORS_FILE,
    ExportRecord,
    FileRecord,
    Normalisation,
    OnnxRecord,
    metadata,
)
from stages.scoring.model_card import CARD_FILE, write_card
from stages.scoring.prediction import PredictionConfig

if TYPE_CHECKING:
    import torch
    from torch import nn

    from stages.nets.segmenters.segmenter import Segmenter

OPSET = 17
"""ONNX operators of 2022: runtimes from onnxruntime 1.12 on know them."""

INPUT, OUTPUT = "images", "logits"

TOLERANCE = 1e-3
"""Largest |Δlogit| that passes, as a share of the largest |logit| (at least 1)."""

_TRACED_SHAPE = (2, 3, 67, 93)
_CHECKED_SHAPES = ((1, 3, 64, 64), (2, 3, 97, 131), (1, 3, 33, 160))
"""Other sizes than the traced one, not square, and multiples of no stride."""

_STAGING = ".tmp-export"
"""Folder inside the output folder where the new files wait."""

_NEEDED = ("onnx", "onnxruntime")
_LEAVE_OUT = "export with --no-onnx, and please report this"


def export_segmenter(
    segmenter: Path,
    out: Path,
    *,
    prediction: PredictionConfig,
    provenance: Mapping[str, Any],
    progress: Progress,
    onnx: bool = True,
    sample: NDArray[np.uint8] | None = None,
    force: bool = False,
) -> ExportRecord:
    """Write the exported model under ``out``; ``config.json`` comes last, and without it there is no export.

    An earlier export stays whole until all new files are written; then these take its places, one after the other.

    Args:
        segmenter: Output folder of ``train_segmenter``.
        out: Where to write.
        prediction: How its config looks at whole images.
        provenance: Where it comes from, as JSON.
        progress: Hears what was compared.
        onnx: Whether to write ``model.onnx``.
        sample: An image to compare on, RGB uint8 (H, W, 3), besides generated ones.
        force: Replace an earlier export.

    Returns:
        What ``config.json`` holds.

    Raises:
        InputError: ``out`` holds an export or something else.
        EnvironmentFailure: the extra ``export`` is not installed, or ONNX's logits are not torch's.
        DamagedFileError: the segmenter cannot be read.
    """
    _check_place(out, force=force)
    if onnx:
        check_packages()
    record = read_segmenter_record(segmenter)
    net = load_segmenter(segmenter)
    trained = _read(segmenter / WEIGHTS_FILE)
    export = ExportRecord(
        net=record.net,
        classes=("background", *record.classes),
        normalisation=Normalisation(),
        prediction=prediction,
        provenance=dict(provenance),
        onnx=None,
        trained_sha256=_digest(trained),
        files={},
    )
    contents = {TENSORS_FILE: _with_metadata(trained, metadata(export))}
    if onnx:
        contents[ONNX_FILE] = to_onnx(net, metadata(export))
        agreement = compare_onnx(net, contents[ONNX_FILE], sample=sample)
        export = export.model_copy(update={"onnx": agreement})
        progress.info(
            f"onnxruntime against torch: |Δlogit| up to {agreement.max_abs_difference:.2g} "
            f"of logits up to {agreement.max_abs_logit:.3g}"
        )
    files = {name: FileRecord(size=len(data), sha256=_digest(data)) for name, data in contents.items()}
    export = export.model_copy(update={"files": files})
    _write_files(out, contents | {CARD_FILE: write_card(export).encode()}, export)
    return export


def _with_metadata(tensors: bytes, texts: Mapping[str, str]) -> bytes:
    """The same tensors with ``texts`` in the header of the file."""
    from safetensors.torch import load, save

    return save(load(tensors), metadata={"format": "pt", **texts})


def _write_files(out: Path, contents: Mapping[str, bytes], export: ExportRecord) -> None:
    """Write all files beside the earlier ones, then rename them; the digests in the config reveal a mixture."""
    staging = out / _STAGING
    shutil.rmtree(staging, ignore_errors=True)  # what a killed export left
    try:
        for name, data in contents.items():
            write_atomic(staging / name, data)
        write_json(staging / CONFIG_FILE, export.model_dump(mode="json"))
        if ONNX_FILE not in contents:
            (out / ONNX_FILE).unlink(missing_ok=True)
        for name in (*contents, CONFIG_FILE):
            (staging / name).replace(out / name)
    finally:
        shutil.rmtree(staging, ignore_errors=True)


def _check_place(out: Path, *, force: bool) -> None:
    """A folder of ours may be replaced on demand; any other that is not empty is left alone."""
    ours = {CONFIG_FILE, TENSORS_FILE, ONNX_FILE, CARD_FILE}
    # a killed export may leave the temporary file of write_atomic behind
    found = {path.name for path in out.iterdir() if not path.name.startswith(".tmp-")} if out.is_dir() else set()
    if out.exists() and not out.is_dir():
        raise InputError(f"{out} is a file; name a folder with --out")
    if found - ours:
        raise InputError(f"{out} holds other files ({', '.join(sorted(found - ours)[:3])}); name a folder of its own")
    if found and not force:
        raise InputError(f"{out} holds an export already; name another folder, or replace it with --force")


def _read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise DamagedFileError(f"{path} is not readable ({error}); rebuild train_segmenter") from error


def _digest(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


# ---------------------------------------------------------------------------------------------------------------------
# ONNX
# ---------------------------------------------------------------------------------------------------------------------


def check_packages() -> None:
    """Make sure that ONNX can be written and run.

    Raises:
        EnvironmentFailure: a package is missing; the command that installs it is in the message.
    """
    missing = [name for name in _NEEDED if importlib.util.find_spec(name) is None]
    if missing:
        raise EnvironmentFailure(
            f"{ONNX_FILE} needs {' and '.join(missing)}: pip install 'wsss-pipeline[export]', or export without it: "
            "--no-onnx"
        )


def full_size_net(net: Segmenter) -> nn.Module:
    """``net`` with logits at the images' size, as ``predict_logits`` gives them; sizes may be free when it is traced.

    DeepLab asks in Python whether an image has to be padded, which a trace would freeze: here every image is padded to
    whole cells, by nothing where it has them.
    """
    import torch
    from torch.nn import functional

    class FullSize(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net = net
            self.multiple = int(getattr(net, "output_stride", 1))

        def forward(self, images: torch.Tensor) -> torch.Tensor:
            height, width = images.shape[-2], images.shape[-1]
            if self.multiple > 1:
                images = functional.pad(images, (0, -width % self.multiple, 0, -height % self.multiple))
            logits = functional.interpolate(
                self.net(images).float(), size=images.shape[-2:], mode="bilinear", align_corners=False
            )
            return logits[..., :height, :width]

    return FullSize().eval()


def to_onnx(net: Segmenter, texts: Mapping[str, str] | None = None) -> bytes:
    """The net on the CPU as ONNX: normalised images (B, 3, H, W) to logits (B, C, H, W); B, H and W are free.

    The free dimensions have names (batch, height, width), and ``texts`` are the file's metadata.
    """
    import onnx
    import torch

    free = {0: "batch", 2: "height", 3: "width"}
    with TemporaryDirectory() as folder, warnings.catch_warnings(), torch.random.fork_rng(devices=[]):
        # that the exporter is the older one, and that sizes are traced: both are meant, and compare_onnx looks
        warnings.simplefilter("ignore")
        torch.onnx.export(
            full_size_net(net),
            (torch.randn(_TRACED_SHAPE),),
            str(Path(folder, ONNX_FILE)),
            dynamo=False,
            opset_version=OPSET,
            input_names=[INPUT],
            output_names=[OUTPUT],
            dynamic_axes={INPUT: free, OUTPUT: free},
        )
        model = onnx.load(str(Path(folder, ONNX_FILE)))
    model.graph.output[0].type.tensor_type.shape.dim[1].dim_value = net.num_classes
    onnx.helper.set_model_props(model, dict(texts or {}))
    return model.SerializeToString()


def compare_onnx(net: Segmenter, onnx: bytes, *, sample: NDArray[np.uint8] | None = None) -> OnnxRecord:
    """Run both on the same images of several sizes.

    Args:
        net: On the CPU, in evaluation mode.
        onnx: What ``to_onnx`` made of it.
        sample: An image to look at besides generated ones, RGB uint8 (H, W, 3).

    Raises:
        EnvironmentFailure: logits differ by more than ``TOLERANCE``, or the ONNX file does not run.
    """
    import torch

    from stages.ops.multi_scale import predict_logits

    generator = torch.Generator().manual_seed(0)
    batches = [torch.randn(shape, generator=generator) for shape in _CHECKED_SHAPES]
    if sample is not None and min(sample.shape[:2]) >= LEAST_INPUT_PX:  # of less, torch is shown an enlarged one
        batches.append(to_network_input(torch.from_numpy(sample)[None], torch.device("cpu")))
    worst = largest = 0.0
    for batch, found in zip(batches, _run_onnx(onnx, batches), strict=True):
        with torch.inference_mode():
            expected = predict_logits(net, batch).numpy()
        if found.shape != expected.shape:
            raise EnvironmentFailure(
                f"{ONNX_FILE}: expected logits {expected.shape}, found {found.shape}; {_LEAVE_OUT}"
            )
        # NaN is not within any bound, and fmax would hide it
        worst = float(np.maximum(worst, np.abs(found - expected).max()))
        largest = max(largest, float(np.abs(expected).max()))
    if not worst <= TOLERANCE * max(1.0, largest):
        raise EnvironmentFailure(
            f"{ONNX_FILE} differs from torch by {worst:.3g} at logits up to {largest:.3g}, more than {TOLERANCE:g} of "
            f"them; nothing was written: {_LEAVE_OUT}"
        )
    return OnnxRecord(
        input=INPUT,
        output=OUTPUT,
        opset=OPSET,
        max_abs_difference=worst,
        max_abs_logit=largest,
        checked_shapes=tuple((len(batch), 3, batch.shape[2], batch.shape[3]) for batch in batches),
    )


def _run_onnx(onnx: bytes, batches: Sequence[torch.Tensor]) -> list[NDArray[np.float32]]:
    """What onnxruntime gives on the CPU."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3  # errors alone: they are raised anyhow
    try:
        session = onnxruntime.InferenceSession(onnx, options, providers=["CPUExecutionProvider"])
        return [
            np.asarray(session.run([OUTPUT], {INPUT: batch.contiguous().numpy()})[0], dtype=np.float32)
            for batch in batches
        ]
    except Exception as error:  # onnxruntime's errors have no base of their own
        raise EnvironmentFailure(f"{ONNX_FILE} does not run here ({error}); {_LEAVE_OUT}") from error
