"""A segmenter's one way through whole images: files are read ahead of it, what it says is finished behind it.

The network works in the caller's thread on a batch at a time, and on fewer images at once where the device's memory is
short.  The next batch is decoded meanwhile, and CRF and writing of the images before run over processes where the CRF
is one of the CPU, else over threads.  Memory does not grow with the number of images.  Torch is imported by the
functions only, so that a process for a CRF starts quickly.
Shapes: B images of one size, C classes with background, L classes that a CRF decides between, H W image pixels.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Generic, TypeVar

import numpy as np
from numpy.typing import NDArray

from stages.data.whole_images import batches_of_one_size, prefetch
from stages.errors import EnvironmentFailure
from stages.ops.crf.dense_crf import CrfConfig, open_crf_batch, probability_unary, resolve_crf_backend
from stages.ops.pool import map_ordered, take_in_order

if TYPE_CHECKING:
    import torch

FileT = TypeVar("FileT")
ReadT = TypeVar("ReadT")
ItemT = TypeVar("ItemT")
ContextT = TypeVar("ContextT")
ResultT = TypeVar("ResultT")

_BATCH = 8
"""Images of one size that go through the network together."""

_BATCH_PX = 1 << 22
"""Pixels of such a batch, unless one image alone has more: the probabilities of all classes are kept for each."""

_NUM_WRITERS = 4

_LIKELY = 0.01
"""The CRF of a prediction gets the classes that reach this probability somewhere: its cost grows with the labels."""


@dataclass(frozen=True)
class Look(Generic[ItemT]):
    """What a network says of one image."""

    item: ItemT
    """What the caller needs to finish the image."""
    image: NDArray[np.uint8]
    """RGB, (H, W, 3)."""
    probabilities: NDArray[np.float32] | None
    """(L, H, W), where they are needed behind the network."""
    refined: NDArray[np.uint8] | None = None
    """The class (H, W) after the CRF as an index into L, where a CUDA device has found it already."""

    def after_crf(self, crf: CrfConfig, device: str) -> NDArray[np.uint8]:
        """The class (H, W) after the CRF as an index into L."""
        if self.refined is not None:
            return self.refined
        assert self.probabilities is not None
        return refine_prediction(self.image, self.probabilities, crf, device=device)


def plan_batches(sized: Iterable[tuple[FileT, tuple[int, int]]], most_px: int | None = None) -> list[list[FileT]]:
    """Batches of images of one (height, width), in their order: equal lists always make equal batches."""
    return batches_of_one_size(sized, most_images=_BATCH, most_px=most_px or _BATCH_PX)


def look_at_images(
    batches: Iterable[Sequence[FileT]],
    *,
    read: Callable[[FileT], tuple[ReadT, NDArray[np.uint8]] | None],
    look: Callable[[Sequence[ReadT], NDArray[np.uint8]], Sequence[Look[ItemT]]],
    finish: Callable[[ContextT, Look[ItemT]], ResultT],
    context: ContextT,
    crf: CrfConfig | None,
    device: torch.device,
    processes: int,
    remedy: str,
) -> Iterator[ResultT]:
    """Yield ``finish(context, ...)`` of what the network says of each image, in the order of the images.

    Args:
        batches: From ``plan_batches``.
        read: Gives an image (H, W, 3) and what goes with it, or None to leave it out; called in a thread.
        look: The network, in inference mode: takes what goes with B images, and their pixels (B, H, W, 3); gives one
            look for each.  Where the device's memory does not hold B images it is called with fewer.
        finish: The work on the CPU behind it; a function of a module, so that a process can be sent to it.
        context: What all images share there; sent to each process once.
        crf: The CRF in ``finish``; on a CUDA device the images of a batch are refined at once before it.
        device: Where the network works, and torch's CRF.
        processes: How many a CRF of the CPU gets.
        remedy: What to do where the device's memory does not hold one image.

    Raises:
        EnvironmentFailure: it does not.
    """
    is_torch = crf is not None and resolve_crf_backend(crf.backend, str(device)) == "torch"
    at_once = crf if is_torch and device.type == "cuda" else None
    looks = _looks(batches, read, look, at_once, device, remedy)
    if crf is not None and not is_torch:
        yield from map_ordered(finish, looks, context=context, processes=processes, in_flight=2)
        return
    num_threads = 1 if is_torch and at_once is None else _NUM_WRITERS
    with ThreadPoolExecutor(max_workers=num_threads) as writers:
        yield from take_in_order(writers, functools.partial(finish, context), looks, limit=2 * num_threads)


def _looks(
    batches: Iterable[Sequence[FileT]],
    read: Callable[[FileT], tuple[ReadT, NDArray[np.uint8]] | None],
    look: Callable[[Sequence[ReadT], NDArray[np.uint8]], Sequence[Look[ItemT]]],
    crf: CrfConfig | None,
    device: torch.device,
    remedy: str,
) -> Iterator[Look[ItemT]]:
    """What the network says of each image, and with ``crf`` what a CUDA device makes of it."""
    import torch

    from stages.ops.multi_scale import in_fitting_parts

    def read_batch(files: Sequence[FileT]) -> list[tuple[ReadT, NDArray[np.uint8]]]:
        return [found for found in map(read, files) if found is not None]

    def look_at(items: Sequence[ReadT], pixels: NDArray[np.uint8]) -> list[Look[ItemT]]:
        with torch.inference_mode():
            parts = in_fitting_parts(lambda part: look(items[part], pixels[part]), slice(0, len(items)))
        looks = list(itertools.chain.from_iterable(parts))
        return looks if crf is None else _refine_at_once(looks, crf, str(device))

    for _, found in prefetch(read_batch, batches, workers=1):
        by_shape: dict[tuple[int, ...], list[tuple[ReadT, NDArray[np.uint8]]]] = {}
        for each in found:  # a file's head may tell another size than its pixels have
            by_shape.setdefault(each[1].shape, []).append(each)
        for (height, width, _), group in by_shape.items():
            try:
                looks = look_at([item for item, _ in group], np.stack([image for _, image in group]))
            except torch.OutOfMemoryError as error:
                raise EnvironmentFailure(
                    f"{device} does not hold one image of {height} × {width} pixels; {remedy}"
                ) from error
            yield from looks


def _refine_at_once(looks: Sequence[Look[ItemT]], crf: CrfConfig, device: str) -> list[Look[ItemT]]:
    """Refine those of a batch that need it, in halves where the device's memory does not hold them all."""
    from stages.ops.multi_scale import in_fitting_parts

    wanted = [look for look in looks if look.probabilities is not None and look.refined is None]

    def refine(part: slice) -> list[NDArray[np.uint8]]:
        chosen = wanted[part]
        given = [look.probabilities for look in chosen if look.probabilities is not None]
        return refine_predictions([look.image for look in chosen], given, crf, device=device)

    parts = in_fitting_parts(refine, slice(0, len(wanted))) if wanted else []
    masks = dict(zip(map(id, wanted), itertools.chain.from_iterable(parts), strict=True))
    return [replace(look, probabilities=None, refined=masks.get(id(look), look.refined)) for look in looks]


def refine_prediction(
    image: NDArray[np.uint8], probabilities: NDArray[np.float32], config: CrfConfig, *, device: str = "cpu"
) -> NDArray[np.uint8]:
    """Class indices (H, W) after a dense CRF.

    Args:
        image: RGB, uint8 (H, W, 3).
        probabilities: float32 (C, H, W).
        config: Numbers and backend.
        device: Where the torch backend works.

    Source:
        Differs: classes that reach 1 % in no pixel are left out; most codes keep all, at two to three times the cost.
    """
    return refine_predictions([image], [probabilities], config, device=device)[0]


def refine_predictions(
    images: Sequence[NDArray[np.uint8]],
    probabilities: Sequence[NDArray[np.float32]],
    config: CrfConfig,
    *,
    device: str = "cpu",
) -> list[NDArray[np.uint8]]:
    """Class indices (H, W) of images as of ``refine_prediction``, by one lattice for all on a CUDA device.

    An image gets what it would get alone, but for float32 rounding.
    """
    likely = [likely_classes(each) for each in probabilities]
    found = [np.full(each.shape[1:], classes[0]) for each, classes in zip(probabilities, likely, strict=True)]
    open_ones = [place for place, classes in enumerate(likely) if len(classes) > 1]  # one class has nothing to change
    if open_ones:
        counts = [len(likely[place]) for place in open_ones]
        batch = open_crf_batch([images[place] for place in open_ones], counts, config, device=device)
        chosen = [probabilities[place][likely[place]] for place in open_ones]
        unaries = [probability_unary(each / each.sum(axis=0, keepdims=True)) for each in chosen]
        for place, marginals in zip(open_ones, batch.infer(unaries, config.iterations), strict=True):
            found[place] = likely[place][marginals.argmax(axis=0)]
    return [mask.astype(np.uint8) for mask in found]


def likely_classes(probabilities: NDArray[np.float32]) -> NDArray[np.intp]:
    """The classes of (C, H, W) that a CRF gets: those that reach ``_LIKELY`` in a pixel.

    Of more than 100 classes the winner of a pixel may be less likely; it is among them too.
    """
    least = min(_LIKELY, 0.99 / len(probabilities))
    return np.flatnonzero(probabilities.max(axis=(1, 2)) >= least)
