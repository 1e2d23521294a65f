"""Images on their way to their pseudo-masks: from stored attention, through a random walk, over processes.

Reads attention shards; what is written is ``stages.masks.building``'s.  One image at a time is held for each process,
so memory does not grow with the data set.
"""

from __future__ import annotations

import itertools
from collections import deque
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

from stages.contracts import ImageIndex, Progress
from stages.data.whole_images import prefetch
from stages.masks.attention_maps import find_attention
from stages.masks.building import Context, Job, find_mask, is_made, read_ahead
from stages.ops.pool import map_ordered
from stages.ops.rate import ImageRate

if TYPE_CHECKING:
    from stages.masks.refinements.random_walk import MapWalker

ResultT = TypeVar("ResultT")

_GPU_BATCH_IMAGES = 8
"""Images that a GPU refines at once."""
_READING_THREADS = 2
"""Threads that decode the next images for it."""


def stored_jobs(index: ImageIndex, attention: Path, wanted: Collection[str]) -> Iterator[Job]:
    """Pair the stored attention of each wanted image with its file, shard by shard.

    Args:
        index: The data set.
        attention: Output folder of ``make_attention``.
        wanted: Ids; those without attention are passed over.

    Raises:
        InputError: the maps of an image are not of the labels that it has.
    """
    for record in find_attention(index, attention, wanted):
        yield Job(record, index.record(record.id).image)


def walk_jobs(walker: MapWalker, jobs: Iterable[Job], index: ImageIndex, context: Context) -> Iterator[Job]:
    """Let the maps of the images that have no mask yet walk, a window of the training list at a time.

    Args:
        walker: The features and the walk.
        jobs: In the order of the training list, where the walker's windows are of several images.
        index: The data set.
        context: Where masks are found that are finished.
    """
    train, size = index.split("train"), walker.window_images
    window_of = {record.id: place // size for place, record in enumerate(train)}
    for number, group in itertools.groupby(jobs, key=lambda job: window_of[job.record.id]):
        found = [job._replace(mask=find_mask(context, job.record)) for job in group]
        unmade = [job.record for job in found if job.mask is None and job.record.labels]
        walked = walker.walk(unmade, train[number * size : (number + 1) * size]) if unmade else {}
        yield from (job._replace(walked=walked.get(job.record.id)) for job in found)
    walker.conclude()


def run_jobs(
    function: Callable[[Context, Sequence[Job]], list[ResultT]],
    jobs: Iterable[Job],
    context: Context,
    processes: int,
    progress: Progress,
    *,
    done: int,
    total: int,
) -> Iterator[ResultT]:
    """``function`` of every job, in their order, each told to ``progress``.

    Masks that an earlier call made cost next to nothing: they are told together with the next new one, so that the time
    left does not go by them.

    Args:
        function: Takes the context and a few jobs; a function of a module, so that a process can be sent to it.
        jobs: Taken lazily, in this process.
        context: What all jobs share.
        processes: How many work; 1 is this process.
        progress: Hears of every finished image and, from the second batch on, of images per second.
        done: Images that were finished before the first job.
        total: Images that are finished after the last.
    """
    progress.step("masks", done, total)
    rate, told = ImageRate(), done
    are_new: deque[bool] = deque()
    batches = _noted(_batches(jobs, 1 if context.device == "cpu" else _GPU_BATCH_IMAGES), context, are_new)
    if context.writer is not None:  # a device waits neither for a disk nor for a decoder
        batches = (ready for _, ready in prefetch(partial(read_ahead, context), batches, workers=_READING_THREADS))
    for results in map_ordered(function, batches, context=context, processes=processes):
        done += len(results)
        if are_new.popleft():
            progress.step("masks", done, total, unit="images", **rate.add(len(results)))
            told = done
        yield from results
    if told < done:
        progress.step("masks", done, total)


def _batches(jobs: Iterable[Job], size: int) -> Iterator[list[Job]]:
    left = iter(jobs)
    while batch := list(itertools.islice(left, size)):
        yield batch


def _noted(batches: Iterable[list[Job]], context: Context, are_new: deque[bool]) -> Iterator[list[Job]]:
    """The batches, for each of which ``are_new`` gets whether it has an image that is still to be made."""
    for batch in batches:
        are_new.append(not all(is_made(context, job.record.id) for job in batch))
        yield batch
