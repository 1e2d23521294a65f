"""Whole images on their way into a network that is only evaluated: read ahead, resize, pad, mirror.

Torch-free.  Images are uint8 RGB (H, W, 3); sizes are (height, width) in pixels.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TypeVar

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from stages.contracts import LEAST_INPUT_PX, ImageRecord, ImageSet
from stages.data.transforms import PADDING_COLOUR
from stages.errors import DataError

Job = TypeVar("Job")
Loaded = TypeVar("Loaded")
ItemT = TypeVar("ItemT")


def scaled_size(size: tuple[int, int], *, short_side_px: int | None = None, scale: float = 1.0) -> tuple[int, int]:
    """Size of an image whose shorter side is brought to ``short_side_px`` (None: as it is) and then times ``scale``.

    No side falls below ``LEAST_INPUT_PX``.
    """
    factor = scale if short_side_px is None else scale * short_side_px / min(size)
    return (max(LEAST_INPUT_PX, round(size[0] * factor)), max(LEAST_INPUT_PX, round(size[1] * factor)))


def padded_size(size: tuple[int, int], multiple_px: int) -> tuple[int, int]:
    """``size`` rounded up to whole multiples."""
    return (-(-size[0] // multiple_px) * multiple_px, -(-size[1] // multiple_px) * multiple_px)


def resize_image(image: NDArray[np.uint8], size: tuple[int, int]) -> NDArray[np.uint8]:
    """Resize bicubically, with anti-aliasing where it shrinks; an image of that size is returned as it is."""
    if image.shape[:2] == size:
        return image
    height, width = size
    return np.asarray(Image.fromarray(image).resize((width, height), Image.Resampling.BICUBIC))


def fill_padded(target: NDArray[np.uint8], image: NDArray[np.uint8]) -> None:
    """Write ``image`` to the top left of ``target`` (H, W, 3) and the mean colour around it."""
    height, width = image.shape[:2]
    target[:height, :width] = image
    target[height:] = PADDING_COLOUR
    target[:height, width:] = PADDING_COLOUR


def read_checked(image_set: ImageSet, record: ImageRecord) -> NDArray[np.uint8]:
    """Read an image and make sure that it still has the size that the index says.

    Raises:
        DataError: unreadable, or its size has changed since prepare_data ran.
    """
    image = image_set.read_image(record)
    if image.shape[:2] != record.size:
        raise DataError(
            f"{image_set.root / record.image}: the index says {record.size} pixels (height, width), found "
            f"{image.shape[:2]}; the file changed after prepare_data: run that stage again"
        )
    return image


def batches_of_one_size(
    items: Iterable[tuple[ItemT, tuple[int, int]]], *, most_images: int, most_px: int
) -> list[list[ItemT]]:
    """Group items whose images have one size, in their order, so that equal lists always make equal batches.

    Args:
        items: Each with its image's (height, width).
        most_images: Images of a batch.
        most_px: Pixels of a batch, unless one image alone has more.
    """
    by_size: dict[tuple[int, int], list[ItemT]] = {}
    for item, size in items:
        by_size.setdefault(size, []).append(item)
    batches: list[list[ItemT]] = []
    for (height, width), group in by_size.items():
        count = max(1, min(most_images, most_px // max(1, height * width)))
        batches += [group[start : start + count] for start in range(0, len(group), count)]
    return batches


def prefetch(load: Callable[[Job], Loaded], jobs: Iterable[Job], *, workers: int) -> Iterator[tuple[Job, Loaded]]:
    """Yield ``(job, load(job))`` in order while threads load the next ones; at most ``workers`` + 1 results wait.

    Args:
        load: Called in threads; PIL and numpy let go of the interpreter while they decode and resize.
        jobs: What to load; taken lazily, in the caller's thread.
        workers: Threads; 0 loads in the caller's thread.
    """
    if workers == 0:
        for job in jobs:
            yield job, load(job)
        return
    with ThreadPoolExecutor(max_workers=workers, thread_name_prefix="prefetch") as pool:
        waiting: deque[tuple[Job, Future[Loaded]]] = deque()
        try:
            for job in jobs:
                waiting.append((job, pool.submit(load, job)))
                if len(waiting) > workers:
                    first, future = waiting.popleft()
                    yield first, future.result()
            while waiting:
                first, future = waiting.popleft()
                yield first, future.result()
        finally:
            pool.shutdown(wait=False, cancel_futures=True)
