"""Turn attention maps into pseudo-masks: threshold, dense CRF, 255 where unsure.

Reads: attention shards, images, the image index; never a true mask.
Writes: ``masks/<id>.png`` (palette PNG of class indices at the image's size, 255 = unsure) and ``stats.json`` (areas
before and after refinement).  An image whose PNG is there is not done again, so a stopped stage continues.
Shapes: n labels of one image, L = n + 1 labels of its CRF, H W image pixels.
Source: the CRF on hard labels is irn's (Ahn, Cho and Kwak, CVPR 2019); the one on maps PSA's (Ahn and Kwak, CVPR 2018).
"""

from __future__ import annotations

import time
from collections.abc import Callable, Collection, Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Literal, TypeVar

import numpy as np
from numpy.typing import NDArray
from pydantic import Field

from stages.contracts import (
    IGNORE_INDEX,
    AttentionRecord,
    ClassList,
    ImageIndex,
    Part,
    Progress,
    Runtime,
    StageResult,
    iter_attention,
    open_image_set,
    read_index_mask,
    read_rgb,
    write_index_mask,
    write_json,
)
from stages.errors import DamagedFileError, DataError
from stages.ops.crf import CrfConfig, ImageCrf, label_unary, open_crf, probability_unary, resolve_crf_backend
from stages.ops.pool import map_ordered, num_processes
from stages.ops.seeds import (
    SeedConfig,
    background_level,
    combine_confident,
    initial_mask,
    map_probabilities,
    threshold_maps,
    to_class_indices,
    upsample_maps,
)

VERSION = 1

ResultT = TypeVar("ResultT")

_Job = tuple[AttentionRecord, str]
"""The attention of one image, and the image's file."""

_SHRUNK = 0.5
"""Below this ratio of foreground after to before, the CRF is said to eat the objects."""
_VANISHED = 0.1
"""An object whose area falls below this ratio has nearly vanished."""
_VANISHED_IMAGES = 0.1
"""More than this ratio of images with a nearly vanished object is worth a warning."""


class MakeMasksConfig(SeedConfig):
    """The threshold rule and the refinement."""

    refine: Literal["none", "crf"] = "crf"
    """crf fits the mask to the image's edges."""
    crf: CrfConfig = CrfConfig(preset="irn")
    """Numbers of the CRF."""
    unary: Literal["labels", "maps"] = "labels"
    """What the CRF starts from: the thresholded labels with a confidence, or the rescaled maps."""
    label_confidence: float = Field(default=0.7, gt=0.5, lt=1)
    """Probability that a thresholded label is right (``unary: labels``, and always with ``confident``)."""


@dataclass(frozen=True)
class MaskStats:
    """Areas in pixels of one image's mask."""

    id: str
    pixels: int
    foreground_before: int
    foreground_after: int
    unsure: int
    vanished: tuple[int, ...]
    """Label indices whose area fell below a tenth by refinement."""


@dataclass(frozen=True)
class _Context:
    """What every image of one run shares."""

    config: MakeMasksConfig
    root: Path
    out: Path
    device: str = "cpu"


def make_masks(
    config: MakeMasksConfig,
    *,
    images: Path,
    attention: Path,
    data_root: Path | None,
    out: Path,
    progress: Progress,
    runtime: Runtime | None = None,
    part: Part | None = None,
) -> StageResult:
    """Write one pseudo-mask for every image that has attention maps.

    Args:
        config: Threshold rule, CRF.
        images: Output folder of ``prepare_data``.
        attention: Output folder of ``make_attention``.
        data_root: Folder of the user's data; None where it is generated.
        out: Where to write; an earlier, stopped call's files are continued.
        progress: Where to report to.
        runtime: Processes (pydensecrf) or device (torch backend).
        part: Write only the masks of this part of the training images, and no ``stats.json``; None writes all.

    Returns:
        ``masks.coverage`` (not 255), ``masks.foreground_ratio`` and ``masks.foreground_ratio_before_crf``, all of all
        pixels; nothing for a part.

    Raises:
        DataError: an image is missing or is not of the size that its attention was made for.
        DamagedFileError: attention is missing for a training image.
    """
    runtime = runtime or Runtime()
    image_set = open_image_set(images, data_root)
    context = _Context(config=config, root=image_set.root, out=out / "masks")
    processes = num_processes(runtime.processes)
    if config.refine == "crf" and resolve_crf_backend(config.crf.backend) == "torch":
        from stages.training import resolve_device

        context, processes = replace(context, device=str(resolve_device(runtime))), 1
    train = image_set.index.splits.get("train", ())
    wanted = train if part is None else [train[position] for position in part.positions(len(train))]
    jobs = _jobs(image_set.index, attention, wanted)
    progress.begin("masks", total=len(wanted))
    if part is not None:
        _require_all(wanted, list(_run(_make_only, jobs, context, processes, progress)), attention)
        return StageResult()
    stats = list(_run(_make_one, jobs, context, processes, progress))
    _require_all(wanted, [entry.id for entry in stats], attention)
    _write_stats(out / "stats.json", stats)
    _warn_if_objects_vanish(stats, progress)
    return StageResult(metrics=_metrics(stats))


def _run(
    function: Callable[[_Context, _Job], ResultT],
    jobs: Iterator[_Job],
    context: _Context,
    processes: int,
    progress: Progress,
) -> Iterator[ResultT]:
    """``function`` of every job, in their order, each told to ``progress``."""
    started = time.monotonic()
    for count, result in enumerate(map_ordered(function, jobs, context=context, processes=processes), start=1):
        progress.advance(1, images_per_s=count / max(time.monotonic() - started, 1e-9))
        yield result


def refine_mask(
    image: NDArray[np.uint8], record: AttentionRecord, config: MakeMasksConfig, *, device: str = "cpu"
) -> NDArray[np.uint8]:
    """The pseudo-mask of one image, refined as ``config`` says.

    Args:
        image: RGB, uint8 (H, W, 3).
        record: Its attention.
        config: Threshold rule and refinement.
        device: Where the torch backend of the CRF works.

    Returns:
        Class indices (H, W), 255 = unsure.
    """
    if config.refine == "none" or not record.labels:
        return initial_mask(record, config)
    maps = upsample_maps(record)
    crf = open_crf(image, len(record.labels) + 1, config.crf, device=device)
    if config.confident is not None:
        # both runs share the kernels of the image
        strict = _refine_labels(crf, maps, config.confident.foreground_threshold, config)
        loose = _refine_labels(crf, maps, config.confident.background_threshold, config)
        return combine_confident(to_class_indices(strict, record.labels), to_class_indices(loose, record.labels))
    if config.unary == "labels":
        positions = _refine_labels(crf, maps, background_level(config), config)
    else:
        unary = probability_unary(map_probabilities(maps, config))
        positions = crf.infer(unary, config.crf.iterations).argmax(axis=0)
    return to_class_indices(positions, record.labels)


def _refine_labels(
    crf: ImageCrf, maps: NDArray[np.uint8], threshold: float, config: MakeMasksConfig
) -> NDArray[np.intp]:
    unary = label_unary(threshold_maps(maps, threshold), len(maps) + 1, config.label_confidence)
    return crf.infer(unary, config.crf.iterations).argmax(axis=0)


# ---------------------------------------------------------------------------------------------------------------------
# One image, in a worker
# ---------------------------------------------------------------------------------------------------------------------


def _jobs(index: ImageIndex, attention: Path, wanted: Collection[str]) -> Iterator[_Job]:
    """Pair the attention of each wanted image with its file, shard by shard."""
    left = set(wanted)
    for record in iter_attention(attention) if left else ():
        if record.id in left:
            yield record, index.record(record.id).image
            left.remove(record.id)
            if not left:
                return


def _make_one(context: _Context, job: _Job) -> MaskStats:
    record, _ = job
    return _measure(record, initial_mask(record, context.config), _find_or_make(context, job))


def _make_only(context: _Context, job: _Job) -> str:
    """Make one mask of a part, which nobody measures before the parts are together."""
    _find_or_make(context, job)
    return job[0].id


def _find_or_make(context: _Context, job: _Job) -> NDArray[np.uint8]:
    record, relative = job
    path = context.out / f"{record.id}.png"
    mask = _read_finished(path)
    if mask is None or mask.shape != record.size:
        image = read_rgb(context.root / relative)
        if image.shape[:2] != record.size:
            raise DataError(
                f"{context.root / relative}: expected {record.size} pixels (height, width), as when its attention was "
                f"made, found {image.shape[:2]}; the file changed since prepare_data ran: run it again"
            )
        mask = refine_mask(image, record, context.config, device=context.device)
        write_index_mask(path, mask)
    return mask


def _read_finished(path: Path) -> NDArray[np.uint8] | None:
    """The mask that an earlier, stopped call wrote; None where there is none that reads back."""
    if not path.exists():
        return None
    try:
        return read_index_mask(path)
    except DataError:
        return None


def _measure(record: AttentionRecord, before: NDArray[np.uint8], after: NDArray[np.uint8]) -> MaskStats:
    counts_before = np.bincount(before.ravel(), minlength=256)
    counts_after = np.bincount(after.ravel(), minlength=256)
    classes = [ClassList.class_index(label) for label in record.labels]
    return MaskStats(
        id=record.id,
        pixels=before.size,
        foreground_before=int(counts_before[classes].sum()),
        foreground_after=int(counts_after[classes].sum()),
        unsure=int(counts_after[IGNORE_INDEX]),
        vanished=tuple(
            label
            for label, index in zip(record.labels, classes, strict=True)
            if counts_after[index] < _VANISHED * counts_before[index]
        ),
    )


# ---------------------------------------------------------------------------------------------------------------------
# The whole set
# ---------------------------------------------------------------------------------------------------------------------


def _require_all(wanted: Collection[str], found: Collection[str], attention: Path) -> None:
    missing = sorted(set(wanted) - set(found))
    if missing:
        raise DamagedFileError(
            f"{attention} has no attention for {len(missing)} training images ({', '.join(missing[:5])}…); "
            "rebuild make_attention"
        )


def _write_stats(path: Path, stats: list[MaskStats]) -> None:
    entries = {entry.id: {key: value for key, value in asdict(entry).items() if key != "id"} for entry in stats}
    write_json(path, {"images": entries})


def _metrics(stats: list[MaskStats]) -> dict[str, float]:
    pixels = max(sum(entry.pixels for entry in stats), 1)
    return {
        "masks.coverage": 1 - sum(entry.unsure for entry in stats) / pixels,
        "masks.foreground_ratio": sum(entry.foreground_after for entry in stats) / pixels,
        "masks.foreground_ratio_before_crf": sum(entry.foreground_before for entry in stats) / pixels,
    }


def _warn_if_objects_vanish(stats: list[MaskStats], progress: Progress) -> None:
    before = sum(entry.foreground_before for entry in stats)
    after = sum(entry.foreground_after for entry in stats)
    remedy = "lower threshold, take unary: labels, or another crf.preset (wider srgb); or refine: none"
    if before == 0 and stats:
        progress.warn(
            "the pseudo-masks have no foreground at all: lower make_masks.threshold, or look at the attention"
        )
    elif after < _SHRUNK * before:
        progress.warn(f"the CRF shrank the foreground to {after / before:.0%} of its area before: {remedy}")
    hit = sum(bool(entry.vanished) for entry in stats)
    if hit > _VANISHED_IMAGES * len(stats):
        progress.warn(f"the CRF nearly removed an object in {hit} of {len(stats)} images: {remedy}")
