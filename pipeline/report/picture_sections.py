"""Put pictures on the report's page, and the picture grid of a README into one PNG.

Reads the artifacts of a run; writes one PNG.  Presentation only: nothing here enters a score.
"""

from __future__ import annotations

import zipfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pipeline.report.examples import Example, load_scored_examples, load_training_examples, score_images
from pipeline.report.pictures import Block, colour_css, draw_grid, mask_uri, overlay_heat, photo_uri, write_png
from pipeline.report.step_rows import step_label
from stages.contracts import IGNORE_INDEX, ClassList, ImageSet, open_image_set
from stages.errors import WsssError
from stages.ops.metrics.confusion import SparseConfusions, read_confusions

NUM_TRAINING_EXAMPLES = 8
NUM_SCORED_EXAMPLES = 6
PICTURE_PX = 240
"""Longest side of a picture on the page; keeps a report of 500-pixel photos under 2 MB."""


@dataclass(frozen=True)
class Examples:
    """A list of example pictures as the template wants it, or the sentence that says why there are none."""

    examples: Sequence[Mapping[str, Any]] = ()
    scored: bool = False
    missing: str = ""


def load_confusions(artifacts: Mapping[str, Path]) -> dict[str, SparseConfusions]:
    """The counts of everything that evaluate scored, by name; empty where it did not run."""
    path = artifacts["evaluate"] / "confusions.npz" if "evaluate" in artifacts else None
    return read_confusions(path) if path is not None and path.is_file() else {}


def legend_entries(classes: ClassList) -> list[dict[str, str]]:
    """Name and CSS colour of every mask value, background first and void last."""
    names = [*enumerate(classes.names_with_background), (IGNORE_INDEX, "void or unsure")]
    return [{"name": name, "colour": colour_css(index)} for index, name in names]


def _scores(confusions: Mapping[str, SparseConfusions], thing: str) -> dict[str, float]:
    return score_images(confusions[thing]) if thing in confusions else {}


def show_examples(
    images: ImageSet | None,
    artifacts: Mapping[str, Path],
    confusions: Mapping[str, SparseConfusions],
    predictions: str = "segmenter",
) -> dict[str, Examples]:
    """The three picture sections; a data root that has moved since the run costs the pictures, not the page.

    Args:
        images: The data set; None before prepare_data.
        artifacts: Folder of each stage that ran.
        confusions: Counts of each score.
        predictions: The score of the predictions that are shown (``EvaluateConfig.written_score``).
    """
    training = Examples(missing="this run made no attention maps or pseudo-masks.")
    best, worst = Examples(missing="this run has not evaluated a segmenter."), Examples()
    try:
        if images and "make_attention" in artifacts:
            scores = _scores(confusions, "masks")
            found = load_training_examples(images, artifacts, scores, NUM_TRAINING_EXAMPLES)
            training = _show(found, images.index.classes)
        if images and "evaluate" in artifacts:
            scores = _scores(confusions, predictions)
            good, bad = load_scored_examples(images, artifacts["evaluate"], scores, NUM_SCORED_EXAMPLES)
            best, worst = _show(good, images.index.classes), _show(bad, images.index.classes)
    except (WsssError, zipfile.BadZipFile) as error:
        training = best = Examples(missing=f"the pictures could not be read: {error}")
        worst = Examples()
    return {"training": training, "best": best, "worst": worst}


def _show(examples: Sequence[Example], classes: ClassList) -> Examples:
    return Examples(
        examples=[_show_one(example, classes) for example in examples],
        scored=any(example.miou is not None for example in examples),
        missing="there are no images to show.",
    )


def _show_one(example: Example, classes: ClassList) -> dict[str, Any]:
    tiles = [_photo_tile("image", example.image)]
    if example.attention is not None:
        tiles.append(_photo_tile("attention", overlay_heat(example.image, example.attention)))
    steps = ((step_label(name), mask) for name, mask in example.steps.items())
    masks = (
        *steps,
        ("pseudo-mask", example.pseudo_mask),
        ("prediction", example.prediction),
        ("truth", example.truth),
    )
    tiles += [
        {"title": title, "uri": mask_uri(mask, PICTURE_PX), "is_mask": True}
        for title, mask in masks
        if mask is not None
    ]
    names = classes.names_with_background
    return {
        "id": example.id,
        "score": None if example.miou is None else f"{example.miou * 100:.1f} %",
        "classes": [{"name": names[index], "colour": colour_css(index)} for index in example.classes],
        "tiles": tiles,
    }


def _photo_tile(title: str, pixels: NDArray[np.uint8]) -> dict[str, Any]:
    return {"title": title, "uri": photo_uri(pixels, PICTURE_PX), "is_mask": False}


# ---------------------------------------------------------------------------------------------------------------------
# One PNG
# ---------------------------------------------------------------------------------------------------------------------


def write_picture_grid(
    artifacts: Mapping[str, Path],
    data_root: Path | None,
    out: Path,
    *,
    predictions: str = "segmenter",
    num_rows: int = 4,
    tile_px: int = 128,
) -> Path:
    """Write one PNG: image, attention, pseudo-mask, truth on the left; image, prediction, truth on the right.

    Rows run evenly by rank from good to bad on the left; on the right the first half are the best images, the rest the
    worst.  A side without its stage is left out.

    Args:
        artifacts: Folder of each stage that ran, with prepare_data.
        data_root: Folder of the user's data; None where prepare_data generated the data.
        out: The PNG file to write, atomically.
        predictions: The score of the predictions that are shown.
        num_rows: Images on each side.
        tile_px: Side of one tile.

    Returns:
        ``out``.
    """
    images = open_image_set(artifacts["prepare_data"], data_root)
    confusions = load_confusions(artifacts)
    blocks: list[Block] = []
    if "make_masks" in artifacts:
        training = load_training_examples(images, artifacts, _scores(confusions, "masks"), num_rows)
        blocks.append((("image", "attention", "pseudo-mask", "truth"), [_training_tiles(e) for e in training]))
    if "evaluate" in artifacts:
        scores = _scores(confusions, predictions)
        half = (num_rows + 1) // 2
        best, worst = load_scored_examples(images, artifacts["evaluate"], scores, half if scores else num_rows)
        examples = [*best, *worst[: num_rows - len(best)]]
        blocks.append((("image", "prediction", "truth"), [(e.image, e.prediction, e.truth) for e in examples]))
    if not blocks:
        raise ValueError("a picture grid needs the artifacts of make_masks or evaluate")
    legend = {**{n: i for i, n in enumerate(images.index.classes.names_with_background)}, "void": IGNORE_INDEX}
    return write_png(draw_grid(blocks, legend, tile_px), out)


def _training_tiles(example: Example) -> tuple[NDArray[np.uint8] | None, ...]:
    heat = None if example.attention is None else overlay_heat(example.image, example.attention)
    return example.image, heat, example.pseudo_mask, example.truth
