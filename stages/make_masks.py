"""Turn attention maps into pseudo-masks: threshold, refinements by name, 255 where unsure.

Reads: attention shards, images, the image index, for a random walk the trained classifier; never a true mask but those
of ``sweep``, which it records.
Writes: ``masks/<id>.png`` (palette PNG of class indices at the image's size, 255 = unsure) and ``stats.json`` (areas
before and after refinement; the threshold that ``sweep`` chose); with ``soft`` also ``confidence/<id>.png``.  An image
whose PNG is there is not done again, so a stopped stage continues.
The refinements are those of ``stages.refinements``, the work on an image is in ``stages.mask_building``.
Source: the CRF on hard labels is irn's (Ahn, Cho and Kwak, CVPR 2019); the one on maps PSA's (Ahn and Kwak, CVPR 2018).
"""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Self, TypeVar

from pydantic import model_validator

from stages.contracts import (
    ImageIndex,
    ImageSet,
    Part,
    Progress,
    Runtime,
    StageResult,
    iter_attention,
    open_image_set,
    write_json,
)
from stages.errors import ConfigError, DamagedFileError
from stages.mask_building import Context, Job, MaskStats, find_mask, make_and_measure, make_only
from stages.ops.crf import resolve_crf_backend
from stages.ops.pool import map_ordered, num_processes
from stages.refinements import WALK, RefinementConfig, refine_mask
from stages.threshold_choice import ThresholdChoice, choose_threshold, with_threshold

if TYPE_CHECKING:
    from stages.walked_maps import MapWalker

__all__ = ["MakeMasksConfig", "make_masks", "refine_mask"]

VERSION = 1

ResultT = TypeVar("ResultT")

_SHRUNK = 0.5
"""Below this ratio of foreground after to before, the CRF is said to eat the objects."""
_VANISHED_IMAGES = 0.1
"""More than this ratio of images with a nearly vanished object is worth a warning."""
_GPU_BATCH_IMAGES = 8
"""Images that a GPU refines at once."""


class MakeMasksConfig(RefinementConfig):
    """The threshold rule and the refinements."""

    @model_validator(mode="after")
    def _sweep_sees_the_maps(self) -> Self:
        if self.sweep is not None and self.walks:
            raise ValueError(
                "sweep scores the maps before a random walk, which changes what a threshold means: leave out sweep, or "
                f"{WALK} of refine"
            )
        return self


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
    classifier: Path | None = None,
) -> StageResult:
    """Write one pseudo-mask for every image that has attention maps.

    Args:
        config: Threshold rule, refinements.
        images: Output folder of ``prepare_data``.
        attention: Output folder of ``make_attention``.
        data_root: Folder of the user's data; None where it is generated.
        out: Where to write; an earlier, stopped call's files are continued.
        progress: Where to report to.
        runtime: Processes (pydensecrf, ``par`` on a CPU) or device (what torch does).
        part: Write only the masks of this part of the training images, and no ``stats.json``; None writes all.
        classifier: Output folder of ``train_classifier``; read, and needed, for ``refine: random_walk`` alone.

    Returns:
        ``masks.coverage`` (not 255), ``masks.foreground_ratio`` and ``masks.foreground_ratio_before_crf``, all of all
        pixels, and with ``sweep`` the chosen ``masks.threshold``; nothing for a part.  The ids of ``sweep``.

    Raises:
        ConfigError: ``sweep`` names images that cannot be used; a random walk has no classifier, or names a layer that
            its backbone lacks.
        DataError: an image is missing or is not of the size that its attention was made for.
        DamagedFileError: attention is missing for a training image.
    """
    runtime = runtime or Runtime()
    image_set = open_image_set(images, data_root)
    processes = num_processes(runtime.processes)
    walker = _open_walker(config, classifier, image_set, progress, runtime)
    choice = _choose_threshold(config, image_set, attention, processes, progress)
    config = config if choice is None else with_threshold(config, choice.threshold)
    device = _torch_device(config, runtime)
    processes = processes if device is None else 1
    context = Context(
        config=config,
        classes=image_set.index.classes,
        root=image_set.root,
        out=out / "masks",
        device=device or "cpu",
        is_pooled=processes > 1,
    )
    train = image_set.index.splits.get("train", ())
    wanted = train if part is None else [train[position] for position in part.positions(len(train))]
    jobs = _jobs(image_set.index, attention, wanted)
    if walker is not None:
        jobs = _walk(walker, jobs, image_set.index, context.out)
    progress.begin("masks", total=len(wanted))
    if part is not None:
        _require_all(wanted, list(_run(make_only, jobs, context, processes, progress)), attention)
        return StageResult(mask_supervision=_supervision(choice))
    stats = list(_run(make_and_measure, jobs, context, processes, progress))
    _require_all(wanted, [entry.id for entry in stats], attention)
    _write_stats(out / "stats.json", stats, choice)
    _warn_if_objects_vanish(stats, config, progress)
    chosen = {} if choice is None else {"masks.threshold": choice.threshold}
    return StageResult(metrics=_metrics(stats) | chosen, mask_supervision=_supervision(choice))


def _choose_threshold(
    config: MakeMasksConfig, image_set: ImageSet, attention: Path, processes: int, progress: Progress
) -> ThresholdChoice | None:
    """What the sweep chose; None where there is none to choose."""
    if config.sweep is None:
        return None
    choice = choose_threshold(config, image_set, attention, processes=processes)
    progress.info(
        f"threshold {choice.threshold:.3f} is best on {len(choice.image_ids)} true masks of the training images "
        f"({choice.miou:.1%} mIoU before refinement); these images count in no score of attention or masks"
    )
    return choice


def _supervision(choice: ThresholdChoice | None) -> tuple[str, ...]:
    return () if choice is None else choice.image_ids


def _open_walker(
    config: MakeMasksConfig, classifier: Path | None, images: ImageSet, progress: Progress, runtime: Runtime
) -> MapWalker | None:
    """The classifier, where maps walk over its features."""
    if not config.walks:
        return None
    if classifier is None:
        raise ConfigError(
            f"refine: {WALK} compares the trained classifier's features, and no classifier was given; give classifier="
            f"the output folder of train_classifier, or leave {WALK} out"
        )
    from stages.walked_maps import MapWalker

    return MapWalker(config.random_walk, classifier=classifier, images=images, progress=progress, runtime=runtime)


def _torch_device(config: MakeMasksConfig, runtime: Runtime) -> str | None:
    """The device that does all refinements of pixels in this process; None where processes share the images.

    Torch's CRF uses all cores itself, and a GPU is not for several processes.  ``par`` beside pydensecrf works where
    that does.
    """
    chain = config.pixel_chain
    is_native = "crf" in chain and resolve_crf_backend(config.crf.backend, runtime.device) == "pydensecrf"
    if not chain or is_native:
        return None
    from stages.devices import resolve_device

    device = resolve_device(runtime)
    return str(device) if "crf" in chain or device.type != "cpu" else None


def _run(
    function: Callable[[Context, Sequence[Job]], list[ResultT]],
    jobs: Iterable[Job],
    context: Context,
    processes: int,
    progress: Progress,
) -> Iterator[ResultT]:
    """``function`` of every job, in their order, each told to ``progress``."""
    started, count = time.monotonic(), 0
    batches = _batches(jobs, 1 if context.device == "cpu" else _GPU_BATCH_IMAGES)
    for results in map_ordered(function, batches, context=context, processes=processes):
        count += len(results)
        progress.advance(len(results), images_per_s=count / max(time.monotonic() - started, 1e-9))
        yield from results


def _batches(jobs: Iterable[Job], size: int) -> Iterator[list[Job]]:
    left = iter(jobs)
    while batch := list(itertools.islice(left, size)):
        yield batch


def _jobs(index: ImageIndex, attention: Path, wanted: Collection[str]) -> Iterator[Job]:
    """Pair the attention of each wanted image with its file, shard by shard."""
    left = set(wanted)
    for record in iter_attention(attention) if left else ():
        if record.id in left:
            yield Job(record, index.record(record.id).image)
            left.remove(record.id)
            if not left:
                return


def _walk(walker: MapWalker, jobs: Iterable[Job], index: ImageIndex, masks: Path) -> Iterator[Job]:
    """Let the maps of the images that have no mask yet walk, a window of the training list at a time."""
    train, size = index.split("train"), walker.window_images
    window_of = {record.id: place // size for place, record in enumerate(train)}
    for number, group in itertools.groupby(jobs, key=lambda job: window_of[job.record.id]):
        found = [job._replace(mask=find_mask(masks, job.record)) for job in group]
        unmade = [job.record for job in found if job.mask is None and job.record.labels]
        walked = walker.walk(unmade, train[number * size : (number + 1) * size]) if unmade else {}
        yield from (job._replace(walked=walked.get(job.record.id)) for job in found)


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


def _write_stats(path: Path, stats: list[MaskStats], choice: ThresholdChoice | None) -> None:
    entries = {entry.id: {key: value for key, value in asdict(entry).items() if key != "id"} for entry in stats}
    write_json(path, {"images": entries} | ({} if choice is None else {"sweep": asdict(choice)}))


def _metrics(stats: list[MaskStats]) -> dict[str, float]:
    pixels = max(sum(entry.pixels for entry in stats), 1)
    return {
        "masks.coverage": 1 - sum(entry.unsure for entry in stats) / pixels,
        "masks.foreground_ratio": sum(entry.foreground_after for entry in stats) / pixels,
        "masks.foreground_ratio_before_crf": sum(entry.foreground_before for entry in stats) / pixels,
    }


def _warn_if_objects_vanish(stats: list[MaskStats], config: MakeMasksConfig, progress: Progress) -> None:
    before = sum(entry.foreground_before for entry in stats)
    after = sum(entry.foreground_after for entry in stats)
    has_crf = "crf" in config.chain
    what = "the CRF" if config.chain == ("crf",) else "the refinement"
    crf_remedy = "take unary: labels, or another crf.preset (wider srgb); or " if has_crf else "or "
    remedy = f"lower threshold, {crf_remedy}refine: none"
    if before == 0 and stats:
        progress.warn(
            "the pseudo-masks have no foreground at all: lower make_masks.threshold, or look at the attention"
        )
    elif after < _SHRUNK * before:
        progress.warn(f"{what} shrank the foreground to {after / before:.0%} of its area before: {remedy}")
    hit = sum(bool(entry.vanished) for entry in stats)
    if hit > _VANISHED_IMAGES * len(stats):
        progress.warn(f"{what} nearly removed an object in {hit} of {len(stats)} images: {remedy}")
