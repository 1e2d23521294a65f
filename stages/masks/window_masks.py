"""Pseudo-masks straight from the classifier: attention, refinement and PNG, with no map on the disk between.

The maps of a window of the training list are computed in this process, on its device or in torch's threads, while
worker processes refine those before and write their masks.  They are quantised as stored maps are, so that the masks
are byte for byte those of the way over the disk.
Reads: images, the trained classifier.  Writes: masks by ``stages.masks.building``, and ``stats/00003.json``: the areas
of a finished window and what its maps were, so that it costs nothing when a stopped run goes on, or when the parts of
several machines are put together.  An unfinished window is computed again, but for the masks that it has.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from stages.contracts import AttentionRecord, ImageSet, Part, Progress, read_json, write_json
from stages.errors import DamagedFileError
from stages.masks.attention_maps import MapCensus
from stages.masks.attention_windows import AttentionConfig, Window, WindowAttention, training_windows
from stages.masks.building import Context, Job, is_made, make_and_measure
from stages.masks.jobs import run_jobs, walk_jobs
from stages.masks.measuring import MaskStats, Measured

if TYPE_CHECKING:
    from stages.masks.refinements.random_walk import MapWalker


def make_window_masks(
    views: AttentionConfig,
    context: Context,
    *,
    images: ImageSet,
    open_source: Callable[[], WindowAttention],
    walker: MapWalker | None,
    processes: int,
    progress: Progress,
    part: Part | None,
) -> Measured:
    """Make the masks of all training images or of one part of their windows, and measure them.

    Args:
        views: How to look at the images.
        context: The config and where to write.
        images: The data set.
        open_source: Loads the classifier; called when the first map is wanted, after the processes have started.
        walker: Lets the maps walk; None where they do not.
        processes: How many refine; 1 is this process.
        progress: Hears of every image.
        part: Only this part of the windows; None for all.

    Raises:
        DataError: an image has no labels, cannot be read or changed its size.
        InputError: the classifier gives nothing but NaN.
    """
    windows = training_windows(images, views)
    wanted = windows if part is None else [windows[position] for position in part.positions(len(windows))]
    kept = {window.number: _read_window(context, window) for window in wanted}
    missing = [window for window in wanted if kept[window.number] is None]
    num_images, num_missing = (sum(len(window.records) for window in some) for some in (wanted, missing))
    done = num_images - num_missing
    progress.step("masks", done, num_images)
    if missing:
        censuses = {window.number: MapCensus() for window in missing}
        jobs = _jobs(open_source, missing, censuses, images, walker)
        if walker is not None:
            jobs = walk_jobs(walker, jobs, images.index, context)
        results = run_jobs(make_and_measure, jobs, context, processes, progress, done=done, total=num_images)
        for window, stats in _gather(results, missing):
            kept[window.number] = Measured(stats, censuses[window.number])
            _keep(context, window, Measured(stats, censuses[window.number]))
    found = Measured()
    for measured in filter(None, kept.values()):
        found.stats += measured.stats
        found.maps.add(measured.maps)
    return found


def _jobs(
    open_source: Callable[[], WindowAttention],
    windows: Sequence[Window],
    censuses: Mapping[int, MapCensus],
    images: ImageSet,
    walker: MapWalker | None,
) -> Iterator[Job]:
    batches = open_source().batches(windows)
    if walker is not None and walker.window_images > 1:
        batches = _in_list_order(batches)
    for window, records in batches:
        for record in records:
            censuses[window.number].count(record)
            yield Job(record, images.index.record(record.id).image)


def _in_list_order(
    batches: Iterable[tuple[Window, list[AttentionRecord]]],
) -> Iterator[tuple[Window, list[AttentionRecord]]]:
    """Whole windows, their images in the order of the list instead of by size: a walk goes by neighbours."""
    found: dict[str, AttentionRecord] = {}
    for window, records in batches:
        found.update((record.id, record) for record in records)
        if len(found) == len(window.records):
            yield window, [found.pop(image.id) for image in window.records]


def _gather(results: Iterable[MaskStats], windows: Sequence[Window]) -> Iterator[tuple[Window, list[MaskStats]]]:
    """Each window with the results of all its images, as soon as the last is there."""
    window_of = {image.id: window for window in windows for image in window.records}
    found: dict[int, list[MaskStats]] = {}
    for stats in results:
        window = window_of[stats.id]
        entries = found.setdefault(window.number, [])
        entries.append(stats)
        if len(entries) == len(window.records):
            yield window, found.pop(window.number)


# ---------------------------------------------------------------------------------------------------------------------
# Finished windows
# ---------------------------------------------------------------------------------------------------------------------


def _window_path(context: Context, window: Window) -> Path:
    return context.out.parent / "stats" / f"{window.number:05d}.json"


def _keep(context: Context, window: Window, measured: Measured) -> None:
    """Write down that a window is finished, behind the last of its masks."""
    path, content = _window_path(context, window), measured.to_json()
    if context.writer is None:
        write_json(path, content)
    else:
        context.writer.submit_last(write_json, path, content)


def _read_window(context: Context, window: Window) -> Measured | None:
    """What an earlier call kept of a window; None where it is not finished, or where a mask is gone."""
    path = _window_path(context, window)
    if not path.exists():
        return None
    try:
        found = Measured.from_json(read_json(path))
    except (DamagedFileError, KeyError, TypeError):
        return None
    ids = {image.id for image in window.records}
    is_whole = {entry.id for entry in found.stats} == ids
    return found if is_whole and all(is_made(context, image_id) for image_id in ids) else None
