"""``wsss.score``: two folders of masks in, scores out."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Literal

from stages.scoring.folder_scores import FolderScores, score_folders


def score(
    truth: str | os.PathLike[str],
    predictions: str | os.PathLike[str],
    *,
    classes: Sequence[str] | None = None,
    unsure: Literal["background", "drop"] = "background",
) -> FolderScores:
    """Compare the masks of two folders: ``.miou``, ``.iou`` by class, ``.pixel_accuracy``, ``.miou_by_image``.

    Arguments and errors as for ``stages.scoring.folder_scores.score_folders``.
    """
    return score_folders(Path(truth), Path(predictions), classes=classes, unsure=unsure)
