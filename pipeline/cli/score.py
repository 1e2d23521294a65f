"""``wsss score``: two folders of masks, whoever made them."""

from __future__ import annotations

import enum
import math
from pathlib import Path
from typing import Annotated

import typer

from pipeline.cli.options import JsonOption, as_path
from pipeline.cli.output import get_output


class Unsure(enum.StrEnum):
    """What a predicted 255 is."""

    BACKGROUND = "background"
    DROP = "drop"


def score(
    context: typer.Context,
    truth: Annotated[
        Path, typer.Argument(metavar="TRUTH", parser=as_path, help="Folder of true masks: PNG of class indices.")
    ],
    predictions: Annotated[
        Path, typer.Argument(metavar="PRED", parser=as_path, help="Folder of predicted masks of the same names.")
    ],
    classes: Annotated[
        str | None, typer.Option(metavar="A,B,…", help="Names of the foreground classes in order; default numbers.")
    ] = None,
    unsure: Annotated[
        Unsure, typer.Option(help="Whether a predicted 255 is background, or does not count.")
    ] = Unsure.BACKGROUND,
    as_json: JsonOption = False,
) -> None:
    """Score predicted masks against true ones, whose 255 is not counted: mIoU, IoU by class, pixel accuracy."""
    from stages.scoring.folder_scores import score_folders

    output = get_output(context)
    output.document = {"truth": truth, "predictions": predictions}
    names = None if classes is None else [name.strip() for name in classes.split(",")]
    with output.progress("score") as progress:
        found = score_folders(truth, predictions, classes=names, unsure=unsure.value, progress=progress)
    output.document |= {
        "images": found.num_images,
        "miou": found.miou,
        "pixel_accuracy": found.pixel_accuracy,
        "iou": found.iou,
        "not_scored": list(found.not_scored),
    }
    width = max(map(len, found.iou))
    for name, value in found.iou.items():
        output.tell(f"  {name:{width}}  {'–' if math.isnan(value) else f'{value * 100:5.1f} %'}")
    totals = f"mIoU {found.miou * 100:.1f} %, pixel accuracy {found.pixel_accuracy * 100:.1f} %"
    output.tell(f"{totals}, {found.num_images} images")
    if found.not_scored:
        output.tell(
            f"{len(found.not_scored)} of {predictions} have no true mask and are not scored: "
            f"{', '.join(found.not_scored[:3])}{' …' if len(found.not_scored) > 3 else ''}"
        )
