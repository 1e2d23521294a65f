"""Turn attention maps into pseudo-masks: threshold, refinements by name, 255 where unsure.

Reads: attention shards, images, the image index, for a random walk the trained classifier; never a true mask but those
of ``sweep``, which it records.  Where ``make_attention`` kept no maps it makes them by the classifier, as it goes.
Writes: ``masks/<id>.png`` (palette PNG of class indices at the image's size, 255 = unsure) and ``stats.json`` (areas
before and after refinement; the threshold that ``sweep`` chose); with ``soft`` also ``confidence/<id>.png``; with
refinements also the masks between the steps (``stages.masks.mask_files``); without stored maps also ``stats/``
(``stages.masks.window_masks``); for ``affinity`` also the head that it trains (``stages.masks.refinements.affinity``).
An image whose PNG is there is not done again, so a stopped stage continues.
The refinements are those of ``stages.masks.refinements``, the work on an image is in
``stages.masks.building``.
Source: the CRF on hard labels is irn's (Ahn, Cho and Kwak, CVPR 2019); the one on maps PSA's (Ahn and Kwak, CVPR 2018).
"""

from __future__ import annotations

from collections.abc import Callable, Collection
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from stages.contracts import ImageSet, Part, Progress, Runtime, SilentProgress, StageResult, open_image_set
from stages.errors import ConfigError, DamagedFileError
from stages.masks.attention_windows import AttentionConfig, WindowAttention, check_classes, read_views
from stages.masks.building import Context, make_and_measure, make_only
from stages.masks.jobs import run_jobs, stored_jobs, walk_jobs
from stages.masks.measuring import Measured, mask_metrics, warn_if_objects_vanish, write_stats
from stages.masks.refinements.affinity import AffinityWalker
from stages.masks.refinements.chain import refine_mask
from stages.masks.refinements.config import RefinementConfig
from stages.masks.threshold_choice import ThresholdChoice, choose_threshold, with_threshold
from stages.masks.window_masks import make_window_masks
from stages.masks.writing import BackgroundWriter, explain_full_disk
from stages.ops.crf.dense_crf import resolve_crf_backend
from stages.ops.devices import Precision, check_precision
from stages.ops.pool import num_processes

if TYPE_CHECKING:
    from stages.masks.refinements.random_walk import MapWalker

__all__ = ["MakeMasksConfig", "make_masks", "refine_mask"]

VERSION = 4

SWEEP_NEEDS_MAPS = (
    "make_masks.sweep compares thresholds on stored maps, and make_attention.keep_maps is false: set it to true, or "
    "leave out sweep and name a threshold (a run with keep_maps: true and sweep says which)"
)


class MakeMasksConfig(RefinementConfig):
    """The threshold rule and the refinements."""


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
    precision: Precision = "fp32",
    seed: int = 0,
) -> StageResult:
    """Write one pseudo-mask for every image that has attention maps.

    Args:
        config: Threshold rule, refinements.
        images: Output folder of ``prepare_data``.
        attention: Output folder of ``make_attention``.
        data_root: Folder of the user's data; None where it is generated.
        out: Where to write; an earlier, stopped call's files are continued.
        progress: Where to report to.
        runtime: Processes (numba, pydensecrf, ``par`` on a CPU) or device (what torch does).
        part: Write only the masks of this part of the training images, and no ``stats.json``; None writes all.
        classifier: Output folder of ``train_classifier``; read, and needed, where maps walk (``random_walk``,
            ``affinity``) and where ``attention`` keeps no maps.
        precision: Of the classifier's forward pass in ``refine: random_walk``: that of ``make_attention``.  Where it
            kept no maps it says so itself.  ``affinity`` works in fp32.
        seed: Decides the training of ``refine: affinity``, and nothing else.

    Returns:
        ``masks.coverage`` (not 255), ``masks.foreground_ratio`` and ``masks.foreground_ratio_before_crf``, all of all
        pixels, and with ``sweep`` the chosen ``masks.threshold``; nothing for a part.  The ids of ``sweep``.

    Raises:
        ConfigError: ``sweep`` names images that cannot be used, or there are no stored maps for it; a classifier is
            needed and not given; a random walk names a layer that its backbone lacks; ``precision`` needs CUDA.
        DataError: an image is missing or is not of the size that its attention was made for.
        InputError: the classifier knows other classes, or gives nothing but NaN; stored maps are of other labels; no
            image has a pixel that ``affinity`` could learn an object from.
        EnvironmentFailure: the disk is full, or the device cannot hold one image.
        DamagedFileError: attention is missing for a training image.
    """
    runtime = runtime or Runtime()
    image_set = open_image_set(images, data_root)
    views = read_views(attention)
    _check_inputs(config, views, classifier, image_set)
    precision = precision if views is None else views.precision
    if views is not None or "random_walk" in config.chain:
        check_precision(precision, runtime, "make_attention.precision")
    processes = num_processes(runtime.processes)
    if config.learns_affinity and classifier is not None:
        from stages.training.affinity import ensure_affinity

        labels = partial(
            make_masks,
            _label_config(config),
            images=images,
            attention=attention,
            data_root=data_root,
            progress=_LabelProgress(progress),
            runtime=runtime,
            classifier=classifier,
            precision=precision,
        )
        with explain_full_disk(out, lambda: "the labels of affinity"):
            ensure_affinity(
                config.affinity,
                make_labels=lambda work: labels(out=work).metrics["masks.foreground_ratio"],
                classifier=classifier,
                images=image_set,
                seed=seed,
                out=out,
                progress=progress,
                runtime=runtime,
            )
    walker = _open_walker(config, classifier, image_set, out, progress, runtime, precision)
    choice = _choose_threshold(config, image_set, attention, walker, processes, progress)
    config = config if choice is None else with_threshold(config, choice.threshold)
    device = _torch_device(config, runtime)
    processes = processes if device is None else 1
    with explain_full_disk(out, lambda: f"{_count_masks(out)} masks"), _open_writer(device) as writer:
        context = _share(config, image_set, out, device, processes, writer)
        if views is None:
            found = _make_from_stored(context, attention, image_set, walker, processes, progress, part)
        else:
            found = make_window_masks(
                views,
                context,
                images=image_set,
                open_source=_source(views, classifier, image_set, progress, runtime),
                walker=walker,
                processes=processes,
                progress=progress,
                part=part,
            )
    if part is not None:
        return StageResult(mask_supervision=_supervision(choice))
    found.maps.conclude(len(found.stats), progress)
    with explain_full_disk(out, lambda: f"{_count_masks(out)} masks"):
        write_stats(out / "stats.json", found.stats, choice)
    warn_if_objects_vanish(found.stats, config, progress)
    chosen = {} if choice is None else {"masks.threshold": choice.threshold}
    return StageResult(metrics=mask_metrics(found.stats) | chosen, mask_supervision=_supervision(choice))


def _share(
    config: MakeMasksConfig,
    images: ImageSet,
    out: Path,
    device: str | None,
    processes: int,
    writer: BackgroundWriter | None,
) -> Context:
    """What the work on every image shares."""
    return Context(
        config=config,
        classes=images.index.classes,
        root=images.root,
        out=out / "masks",
        device=device or "cpu",
        is_pooled=processes > 1,
        writer=writer,
    )


def _check_inputs(
    config: MakeMasksConfig, views: AttentionConfig | None, classifier: Path | None, image_set: ImageSet
) -> None:
    """Refuse what cannot go together, before any work."""
    if classifier is None and config.walks:
        raise ConfigError(
            f"refine: {config.chain[0]} compares the trained classifier's features, and no classifier was given; give "
            f"classifier=the output folder of train_classifier, or leave {config.chain[0]} out"
        )
    if views is None:
        return
    if classifier is None:
        raise ConfigError(
            "make_attention kept no maps, so the trained classifier makes them here, and none was given; give "
            "classifier=the output folder of train_classifier, or make attention with keep_maps: true"
        )
    if config.sweep is not None:
        raise ConfigError(SWEEP_NEEDS_MAPS)
    check_classes(classifier, image_set)


def _make_from_stored(
    context: Context,
    attention: Path,
    images: ImageSet,
    walker: MapWalker | None,
    processes: int,
    progress: Progress,
    part: Part | None,
) -> Measured:
    """Make the masks of stored maps; those of a part are not measured, which the whole does."""
    train = images.index.splits.get("train", ())
    wanted = train if part is None else [train[position] for position in part.positions(len(train))]
    jobs = stored_jobs(images.index, attention, wanted)
    if walker is not None:
        jobs = walk_jobs(walker, jobs, images.index, context)
    if part is not None:
        made = run_jobs(make_only, jobs, context, processes, progress, done=0, total=len(wanted))
        _require_all(wanted, list(made), attention)
        return Measured()
    stats = list(run_jobs(make_and_measure, jobs, context, processes, progress, done=0, total=len(wanted)))
    _require_all(wanted, [entry.id for entry in stats], attention)
    return Measured(stats)


def _source(
    views: AttentionConfig, classifier: Path | None, images: ImageSet, progress: Progress, runtime: Runtime
) -> Callable[[], WindowAttention]:
    """What loads the classifier when the first map is wanted."""
    if classifier is None:
        raise ValueError("maps that are not stored are made by the classifier")
    return partial(WindowAttention, views, classifier=classifier, images=images, progress=progress, runtime=runtime)


def _open_writer(device: str | None) -> AbstractContextManager[BackgroundWriter | None]:
    """Threads that write where this process refines: a device must not wait for a disk.  Workers write themselves."""
    return nullcontext() if device is None else BackgroundWriter()


def _count_masks(out: Path) -> int:
    return sum(1 for _ in (out / "masks").glob("*.png"))


def _choose_threshold(
    config: MakeMasksConfig,
    image_set: ImageSet,
    attention: Path,
    walker: MapWalker | None,
    processes: int,
    progress: Progress,
) -> ThresholdChoice | None:
    """What the sweep chose, on walked maps where the masks are made of such; None where there is none to choose."""
    if config.sweep is None:
        return None
    train = image_set.index.split("train")
    walk = None if walker is None else lambda records: walker.walk_scattered(records, train)
    choice = choose_threshold(config, image_set, attention, processes=processes, walk=walk)
    when = "before refinement" if walk is None else "after the walk"
    progress.info(
        f"threshold {choice.threshold:.3f} is best on {len(choice.image_ids)} true masks of the training images "
        f"({choice.miou:.1%} mIoU {when}); these images count in no score of attention or masks"
    )
    return choice


def _supervision(choice: ThresholdChoice | None) -> tuple[str, ...]:
    return () if choice is None else choice.image_ids


def _label_config(config: MakeMasksConfig) -> MakeMasksConfig:
    """What makes the labels that affinity is learned from: the CRF of the stage at affinity's two thresholds."""
    return MakeMasksConfig(
        refine="crf", crf=config.crf, confident=config.affinity.confident, label_confidence=config.label_confidence
    )


class _LabelProgress(SilentProgress):
    """Tells of masks as labels; what there is to warn of is warned of when the masks themselves are made."""

    def __init__(self, progress: Progress) -> None:
        super().__init__()
        self.info, self._inner = progress.info, progress

    def step(self, task: str, done: int, total: int, *, unit: str = "images", **values: float) -> None:
        self._inner.step(f"{task} for affinity", done, total, unit=unit, **values)


def _open_walker(
    config: MakeMasksConfig,
    classifier: Path | None,
    images: ImageSet,
    out: Path,
    progress: Progress,
    runtime: Runtime,
    precision: Precision,
) -> MapWalker | None:
    """The classifier, where maps walk over its features, or over what a head under ``out`` makes of them."""
    if not config.walks or classifier is None:
        return None
    if config.learns_affinity:
        return AffinityWalker(
            config.affinity, head=out, classifier=classifier, images=images, progress=progress, runtime=runtime
        )
    from stages.masks.refinements.random_walk import MapWalker

    return MapWalker(
        config.random_walk,
        classifier=classifier,
        images=images,
        progress=progress,
        runtime=runtime,
        precision=precision,
    )


def _torch_device(config: MakeMasksConfig, runtime: Runtime) -> str | None:
    """The device that does all refinements of pixels in this process; None where processes share the images.

    Torch's CRF uses all cores itself, and a GPU is not for several processes.  ``par`` beside numba or pydensecrf works
    where that does.
    """
    chain = config.pixel_chain
    is_native = "crf" in chain and resolve_crf_backend(config.crf.backend, runtime.device) != "torch"
    if not chain or is_native:
        return None
    from stages.ops.devices import resolve_device

    device = resolve_device(runtime)
    return str(device) if "crf" in chain or device.type != "cpu" else None


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
