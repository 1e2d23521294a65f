"""Pseudo-masks that a trained segmenter makes of its own training images, for another round of training.

Reads: the training images, a segmenter.  Writes: ``masks/<id>.png`` (class indices at the image's size; background and
the image's labels alone: no true mask is read) and ``stats.json``.  A mask that is there is not made again.
The network works in this process; the CRF of what it gives works over processes meanwhile, or on a GPU on the images
of a batch at once.  Under torchrun each rank labels its share of the images.  Torch is imported by the functions only.
Shapes: B images of one size, C classes with background, L = 1 + the labels of an image, H W image pixels.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
from numpy.typing import NDArray

from stages.contracts import (
    BACKGROUND_INDEX,
    IGNORE_INDEX,
    ClassList,
    ImageRecord,
    ImageSet,
    Progress,
    Runtime,
    SilentProgress,
    StageConfig,
    read_index_mask,
    write_json,
)
from stages.data.whole_images import batches_of_one_size
from stages.errors import InputError
from stages.nets.segmenters.files import load_segmenter
from stages.ops.crf.dense_crf import CrfConfig
from stages.ops.devices import deterministic
from stages.ops.pool import take_in_order
from stages.scoring.prediction import Scales
from stages.training.distributed import is_main, join_ranks, own_slice
from stages.training.round_labels import LabelledImage, LabellingContext, possible_classes, write_labels
from stages.training.segmenter_objective import LossName

if TYPE_CHECKING:
    import torch

_BATCH = 8
"""Images of one size that go through the network together; also what is done at once or again."""

_BATCH_PX = 1 << 22
"""Pixels of such a batch, unless one image alone has more."""

_LOOK_EVERY_S = 0.2
"""Seconds between two looks for another rank's files."""

_MANY_LOST = 0.1
"""Share of the images' labels that may have no pixel before it is said that objects die out."""

_LEAST = 1e-12
"""Keeps the sum over an image's labels above zero where the net is sure of another class."""


class RetrainingConfig(StageConfig):
    """How the segmenter labels its training images, and how it is trained on what it says."""

    scales: Scales = (0.5, 0.75, 1.0, 1.25, 1.5)
    """Factors on the network's input size; probabilities are averaged."""
    flip: bool = True
    """Whether each scale also sees the mirror image."""
    crf: CrfConfig | None = None
    """A dense CRF on the probabilities; null for none."""
    start: Literal["initial", "trained"] = "initial"
    """initial: each round begins where the first training did; trained: at the weights of the round before."""
    loss: LossName | None = None
    """Loss of the rounds; null takes that of the first training.  DSRG's and others' is cross_entropy."""

    def key_content(self, device: str = "cpu") -> dict[str, Any]:
        """The options as JSON, the CRF's backend by name."""
        crf = None if self.crf is None else self.crf.key_content(device)
        return self.model_dump(mode="json") | {"crf": crf}


@dataclass(frozen=True)
class Labelling:
    """What labels the training images between two trainings."""

    config: RetrainingConfig
    image_set: ImageSet
    records: Sequence[ImageRecord]
    short_side_px: int | None
    """Shorter side at which the net sees an image; None for its own size."""
    progress: Progress
    runtime: Runtime


def make_round_masks(labelling: Labelling, number: int, *, segmenter: Path, previous: Path, out: Path) -> Path:
    """Write the pseudo-masks of round ``number`` and how they differ from the previous ones; called on every rank.

    Args:
        labelling: The images and how they are labelled.
        number: 1-based.
        segmenter: Folder of the one that labels.
        previous: Folder of the masks that it was trained on.
        out: Where to write.

    Returns:
        The folder of the masks.

    Raises:
        InputError: the segmenter says background everywhere.
    """
    from stages.ops.collectives import wait_for_all

    folder, progress = out / "masks", labelling.progress if is_main() else SilentProgress()
    own = own_slice(_plan(labelling.records))  # before asking what is there: another rank may be writing already
    todo = [batch for batch in own if not all((folder / f"{record.id}.png").exists() for record in batch)]
    total, left = (sum(len(batch) for batch in batches) for batches in (own, todo))
    progress.begin(f"masks of round {number}", total=total, done=total - left)
    with join_ranks(labelling.runtime) as device:
        if todo:
            num_classes = labelling.image_set.index.classes.num_classes
            context = LabellingContext(labelling.config.crf, folder, num_classes, str(device))
            with deterministic(device):
                predicted = _predictions(labelling, todo, segmenter, device)
                for _ in write_labels(context, predicted, labelling.runtime):
                    progress.advance(1)
        stats = out / "stats.json"
        if is_main():
            _wait_for([folder / f"{record.id}.png" for record in labelling.records])
            if not stats.exists():
                found = _compare(labelling.records, previous, folder, number)
                _warn_of_shrinking(labelling, found["num_lost_labels"], number)
                write_json(stats, found)
        _wait_for([stats])
        wait_for_all()
    return folder


def _plan(records: Sequence[ImageRecord]) -> list[list[ImageRecord]]:
    """Images of one size together, in list order: the same batches in a continued call."""
    return batches_of_one_size(((record, record.size) for record in records), most_images=_BATCH, most_px=_BATCH_PX)


def _predictions(
    labelling: Labelling, batches: Sequence[Sequence[ImageRecord]], segmenter: Path, device: torch.device
) -> Iterator[list[LabelledImage]]:
    """Run the network over ``batches``; the next one's images are decoded meanwhile."""
    model = load_segmenter(segmenter, device)

    def read(batch: Sequence[ImageRecord]) -> NDArray[np.uint8]:
        return np.stack([labelling.image_set.read_image(record) for record in batch])

    with ThreadPoolExecutor(max_workers=1) as reader:
        for batch, pixels in zip(batches, take_in_order(reader, read, batches, limit=2), strict=True):
            scored = _score(labelling, model, pixels, device)
            yield [_label(*each) for each in zip(batch, pixels, scored, strict=True)]


def _label(record: ImageRecord, image: NDArray[np.uint8], probabilities: NDArray[np.float32]) -> LabelledImage:
    """Of the probabilities (C, H, W) those of the image's labels, which share the whole."""
    chosen = probabilities[possible_classes(record, len(probabilities))].clip(min=_LEAST)
    return LabelledImage(record, image, chosen / chosen.sum(axis=0, keepdims=True))


def _score(
    labelling: Labelling, model: torch.nn.Module, pixels: NDArray[np.uint8], device: torch.device
) -> NDArray[np.float32]:
    """Probabilities (B, C, H, W) of images (B, H, W, 3)."""
    import torch

    from stages.data.transforms import to_network_input
    from stages.ops.multi_scale import in_fitting_batches, multi_scale_probabilities

    config = labelling.config

    def score(batch: torch.Tensor) -> tuple[torch.Tensor]:
        images = to_network_input(batch, device)
        return (
            multi_scale_probabilities(
                model, images, scales=config.scales, flip=config.flip, short_side_px=labelling.short_side_px
            ),
        )

    with torch.inference_mode():
        return in_fitting_batches(score, torch.from_numpy(pixels))[0].numpy()


def _wait_for(files: Sequence[Path]) -> None:
    """Return when all ``files`` are there, whichever rank writes them.

    Differs from a barrier: it may take hours, and NCCL's ends a training after ten minutes.  A rank that fails ends the
    others, for torchrun stops them.
    """
    for path in files:
        while not path.exists():
            time.sleep(_LOOK_EVERY_S)


def _warn_of_shrinking(labelling: Labelling, num_lost: int, number: int) -> None:
    """Say that objects are dying out; each further round would say background where the one before did."""
    num_labels = sum(len(record.labels or ()) for record in labelling.records)
    if num_lost > _MANY_LOST * num_labels:
        labelling.progress.warn(
            f"round {number}: {num_lost:,} of the {num_labels:,} labels of images have no pixel in the masks that the "
            "segmenter made; training on them makes objects rarer still. Take loss: balanced_cross_entropy, a longer "
            "training, or fewer rounds"
        )


def _compare(records: Sequence[ImageRecord], previous: Path, folder: Path, number: int) -> dict[str, Any]:
    """What the masks of a round hold, and how many of the pixels that were labelled before have another class now.

    Raises:
        InputError: they hold no object.
    """
    total = foreground = labelled = changed = num_lost = 0
    for record in records:
        before, now = (read_index_mask(place / f"{record.id}.png") for place in (previous, folder))
        known = before != IGNORE_INDEX
        total, foreground = total + now.size, foreground + int((now != BACKGROUND_INDEX).sum())
        labelled, changed = labelled + int(known.sum()), changed + int((known & (before != now)).sum())
        present = set(np.unique(now).tolist())
        num_lost += sum(ClassList.class_index(label) not in present for label in record.labels or ())
    if not foreground:
        raise InputError(
            f"the segmenter that should label the {len(records)} training images for round {number} says background "
            "everywhere; train longer, raise training.learning_rate, use loss: balanced_cross_entropy, or take fewer "
            "rounds"
        )
    return {
        "masks": f"rounds/{number}/masks",
        "foreground_ratio": foreground / total,
        "changed_ratio": changed / max(labelled, 1),
        "num_lost_labels": num_lost,
    }
