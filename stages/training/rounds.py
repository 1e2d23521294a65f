"""Retraining rounds: the trained segmenter labels its own training images, and is trained again on what it says.

Writes under ``out/rounds/<n>``: the pseudo-masks of round n (``stages.training.round_masks``), and of the trainings
before the last one history.json, validation.json and, while it works, the weights.  ``out/rounds.json`` lists the
rounds.
Source: Huang et al., "Weakly-Supervised Semantic Segmentation Network with Deep Seeded Region Growing", CVPR 2018, §4
("retrain"): its code trains with plain cross-entropy on the masks that the first segmenter made.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from stages.contracts import read_json, write_json
from stages.nets.segmenters.files import RECORD_FILE, WEIGHTS_FILE
from stages.training.checkpoints import remove_checkpoint
from stages.training.distributed import is_main, join_ranks
from stages.training.round_masks import Labelling, make_round_masks


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
    train_one: Callable[[Training], None], labelling: Labelling, *, rounds: int, masks: Path, out: Path
) -> None:
    """Train, label the training images with the result, train again, and so on; called on every rank.

    What is finished is kept: a stopped call continues at its training's checkpoint or its first missing mask.

    Args:
        train_one: Trains and writes segmenter.safetensors, segmenter.json and history.json, and continues where it was
            stopped.
        labelling: The images and how they are labelled.
        rounds: How many trainings follow the first one.
        masks: Folder of the first training's pseudo-masks.
        out: Where the last training's results go, beside ``rounds/``.

    Raises:
        InputError: a segmenter labels no object at all.
    """
    from stages.ops.collectives import wait_for_all

    with join_ranks(labelling.runtime):
        is_finished = _is_trained(out)
        wait_for_all()
        for number in range(0 if is_finished else rounds + 1):
            before = round_folder(out, number - 1)
            if number:
                own = round_folder(out, number)
                masks = make_round_masks(labelling, number, segmenter=before, previous=masks, out=own)
            folder = out if number == rounds else round_folder(out, number)
            start = before if number and labelling.config.start == "trained" else None
            if not _is_trained(folder):
                labelling.progress.info(f"round {number} of {rounds}: training on {masks}")
                train_one(Training(number, masks, folder, start))
            wait_for_all()
    if is_main():
        _conclude(out, rounds)


def round_folder(out: Path, number: int) -> Path:
    """Where a round's files are."""
    return out / "rounds" / str(number)


def _is_trained(folder: Path) -> bool:
    return (folder / RECORD_FILE).exists()  # written after the weights


def _conclude(out: Path, rounds: int) -> None:
    """List the rounds and drop the weights of all but the last; a call that was stopped here does it again."""
    listed = []
    for number in range(rounds + 1):
        folder = round_folder(out, number)
        trained = out if number == rounds else folder
        labels = {"masks": "make_masks"} if number == 0 else read_json(folder / "stats.json")
        history = (trained / "history.json").relative_to(out).as_posix()
        loss = read_json(trained / "history.json")[-1]["loss"]
        listed.append({"round": number, "history": history, "last_loss": loss, **labels})
    write_json(out / "rounds.json", listed)
    remove_checkpoint(out)
    for number in range(rounds):
        remove_checkpoint(round_folder(out, number))
        for name in (RECORD_FILE, WEIGHTS_FILE, "best.safetensors", "last.safetensors"):
            (round_folder(out, number) / name).unlink(missing_ok=True)
