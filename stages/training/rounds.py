"""Retraining rounds: the trained segmenter labels its own training images, and is trained again on what it says.

Reads: the training images, a segmenter.  Writes under ``out/rounds/<n>``: ``masks/<id>.png`` of round n (class indices
at the image's size; background and the image's labels alone: no true mask is read), ``stats.json`` with how they differ
from the masks before, and of the trainings before the last one history.json, validation.json and, while it works, the
weights.  ``out/rounds.json`` lists the rounds.  A mask that is there is not made again.
Under torchrun each rank labels its share of the images.  Torch is imported by the functions only.
Shapes: B images of one size, C classes with background, L = 1 + the labels of an image, H W image pixels.
Source: Huang et al., "Weakly-Supervised Semantic Segmentation Network with Deep Seeded Region Growing", CVPR 2018, §4
("retrain"): its code trains with plain cross-entropy on the masks that the first segmenter made.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Sequence
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
    read_json,
    write_index_mask,
    write_json,
)
from stages.data.whole_images import read_checked
from stages.errors import InputError
from stages.nets.segmenters.files import RECORD_FILE, WEIGHTS_FILE, load_segmenter
from stages.ops.crf.dense_crf import CrfConfig
from stages.ops.devices import deterministic
from stages.ops.pool import num_processes
from stages.scoring.network_pass import Look, look_at_images, plan_batches
from stages.scoring.prediction import Scales
from stages.training.checkpoints import remove_checkpoint
from stages.training.distributed import is_main, join_ranks, num_ranks, own_slice
from stages.training.segmenter_objective import LossName

if TYPE_CHECKING:
    import torch

_LOOK_EVERY_S = 0.2
"""Seconds between two looks for another rank's files."""

_MANY_LOST = 0.1
"""Share of the images' labels that may have no pixel before there is a warning that objects die out."""

_DROPPED = (RECORD_FILE, WEIGHTS_FILE, "best.safetensors", "last.safetensors")
"""What only the last training's folder keeps."""

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
    """How the training images are labelled between two trainings."""

    config: RetrainingConfig
    image_set: ImageSet
    records: Sequence[ImageRecord]
    short_side_px: int | None
    """Shorter side at which the net sees an image; None for its own size."""
    progress: Progress
    runtime: Runtime


@dataclass(frozen=True)
class Training:
    """One of the trainings of a stage with rounds."""

    number: int
    """0 learns from the masks that were given, n from those of round n."""
    masks: Path
    """Folder of its pseudo-masks."""
    out: Path
    """Where its weights and its history go."""
    start: Path | None
    """Folder of the segmenter whose weights it begins with; None begins as the first one."""


def train_in_rounds(
    train_one: Callable[[Training], None],
    labelling: Labelling,
    *,
    rounds: int,
    masks: Path,
    out: Path,
    results: Sequence[str],
) -> None:
    """Train, label the training images with the result, train again, and so on; called on every rank.

    What is finished is kept: a stopped call continues at its training's checkpoint or its first missing mask.

    Args:
        train_one: Trains and writes ``results``, and continues where it was stopped.
        labelling: The images and how they are labelled.
        rounds: How many trainings follow the first one.
        masks: Folder of the first training's pseudo-masks.
        out: Where the last training's results go, beside ``rounds/``.
        results: Files that say, when they are all there, that a training has ended.

    Raises:
        InputError: a segmenter labels no object at all.
    """
    from stages.ops.collectives import wait_for_all

    with join_ranks(labelling.runtime):
        is_finished = _is_finished(labelling, rounds, out, results)
        wait_for_all()
        for number in range(0 if is_finished else rounds + 1):
            before = _round_folder(out, number - 1)
            if number:
                masks = _make_round_masks(labelling, number, before, previous=masks, out=_round_folder(out, number))
            folder = out if number == rounds else _round_folder(out, number)
            start = before if number and labelling.config.start == "trained" else None
            if not _are_there(folder, results):
                labelling.progress.info(f"round {number} of {rounds}: training on {masks}")
                train_one(Training(number, masks, folder, start))
            wait_for_all()
    if is_main():
        _conclude(out, rounds)


def _round_folder(out: Path, number: int) -> Path:
    """Where a round's files are."""
    return out / "rounds" / str(number)


def _is_finished(labelling: Labelling, rounds: int, out: Path, results: Sequence[str]) -> bool:
    """Whether all is there that stays: ``_conclude`` has taken the weights of the earlier trainings, or will."""
    stay = [name for name in results if name not in _DROPPED]
    masks = [f"masks/{record.id}.png" for record in labelling.records]
    return _are_there(out, results) and all(
        _are_there(_round_folder(out, number), stay if number < rounds else ())
        and (number == 0 or _are_there(_round_folder(out, number), ["stats.json", *masks]))
        for number in range(rounds + 1)
    )


def _are_there(folder: Path, names: Iterable[str]) -> bool:
    return all((folder / name).is_file() for name in names)


def _conclude(out: Path, rounds: int) -> None:
    """List the rounds and drop the weights of all but the last; a call that was stopped here does it again."""
    listed = []
    for number in range(rounds + 1):
        folder = _round_folder(out, number)
        trained = out if number == rounds else folder
        labels = {"masks": "make_masks"} if number == 0 else read_json(folder / "stats.json")
        history = (trained / "history.json").relative_to(out).as_posix()
        loss = read_json(trained / "history.json")[-1]["loss"]
        listed.append({"round": number, "history": history, "last_loss": loss, **labels})
    write_json(out / "rounds.json", listed)
    remove_checkpoint(out)
    for number in range(rounds):
        remove_checkpoint(_round_folder(out, number))
        for name in _DROPPED:
            (_round_folder(out, number) / name).unlink(missing_ok=True)


# ---------------------------------------------------------------------------------------------------------------------
# The masks of a round
# ---------------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Context:
    """What the writing of all masks shares."""

    crf: CrfConfig | None
    folder: Path
    num_classes: int
    """C."""
    device: str
    """Where the CRF's torch backend works."""


def _make_round_masks(labelling: Labelling, number: int, segmenter: Path, *, previous: Path, out: Path) -> Path:
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

    folder, image_set = out / "masks", labelling.image_set
    # before asking what is there: another rank may be writing already
    own = own_slice(plan_batches((record, record.size) for record in labelling.records))
    todo = [batch for batch in own if any(not (folder / f"{record.id}.png").exists() for record in batch)]
    progress = labelling.progress if is_main() else SilentProgress()
    total = sum(map(len, own))
    done = total - sum(map(len, todo))
    progress.step(f"masks of round {number}", done, total)
    with join_ranks(labelling.runtime) as device:
        if todo:
            model = load_segmenter(segmenter, device)
            context = _Context(labelling.config.crf, folder, image_set.index.classes.num_classes, str(device))
            with deterministic(device):
                for _ in look_at_images(
                    todo,
                    read=lambda record: (record, read_checked(image_set, record)),
                    look=lambda records, pixels: _look(labelling, model, device, records, pixels),
                    finish=_write_mask,
                    context=context,
                    crf=context.crf,
                    device=device,
                    processes=max(1, num_processes(labelling.runtime.processes) // num_ranks()),
                    remedy="take fewer or smaller retraining.scales, or use runtime.device=cpu",
                ):
                    done += 1
                    progress.step(f"masks of round {number}", done, total)
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


def _look(
    labelling: Labelling,
    model: torch.nn.Module,
    device: torch.device,
    records: Sequence[ImageRecord],
    pixels: NDArray[np.uint8],
) -> list[Look[ImageRecord]]:
    """Mean probabilities over scales of each image's own labels and background, scaled to sum to 1."""
    import torch

    from stages.data.transforms import to_network_input
    from stages.ops.multi_scale import multi_scale_probabilities

    config, images = labelling.config, to_network_input(torch.from_numpy(pixels), device)
    mean = multi_scale_probabilities(
        model, images, scales=config.scales, flip=config.flip, short_side_px=labelling.short_side_px
    )
    looks = []
    for record, image, probabilities in zip(records, pixels, mean.cpu().numpy(), strict=True):
        chosen = probabilities[_possible_classes(record, len(probabilities))].clip(min=_LEAST)
        looks.append(Look(record, image, chosen / chosen.sum(axis=0, keepdims=True)))
    return looks


def _possible_classes(record: ImageRecord, num_classes: int) -> NDArray[np.uint8]:
    """Class indices that an image's mask may hold: background and its labels; all where it has no labels."""
    if record.labels is None:
        return np.arange(num_classes, dtype=np.uint8)
    return np.array([BACKGROUND_INDEX, *(ClassList.class_index(label) for label in record.labels)], dtype=np.uint8)


def _write_mask(context: _Context, look: Look[ImageRecord]) -> None:
    """Write one image's mask, after the CRF where there is one."""
    if context.crf is not None:
        found = look.after_crf(context.crf, context.device)
    else:
        assert look.probabilities is not None
        found = look.probabilities.argmax(axis=0)
    mask = _possible_classes(look.item, context.num_classes)[found]
    write_index_mask(context.folder / f"{look.item.id}.png", mask)


def _wait_for(files: Sequence[Path]) -> None:
    """Wait until all ``files`` are there, whichever rank writes them.

    No barrier, because the others may take hours, and NCCL's ends a training after ten minutes.  When a rank fails,
    torchrun stops the others.
    """
    for path in files:
        while not path.exists():
            time.sleep(_LOOK_EVERY_S)


def _warn_of_shrinking(labelling: Labelling, num_lost: int, number: int) -> None:
    """Warn when objects are dying out: each round learns background where the round before saw nothing else."""
    num_labels = sum(len(record.labels or ()) for record in labelling.records)
    if num_lost > _MANY_LOST * num_labels:
        labelling.progress.warn(
            f"round {number}: {num_lost:,} of the {num_labels:,} labels of images have no pixel in the masks that the "
            "segmenter made; training on them makes objects rarer still. Take loss: balanced_cross_entropy, a longer "
            "training, or fewer rounds"
        )


def _compare(records: Sequence[ImageRecord], previous: Path, folder: Path, number: int) -> dict[str, Any]:
    """What the masks of a round hold, and how many of the pixels labelled before have changed their class.

    Raises:
        InputError: there is no object in any of them.
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
