"""What people do from a notebook or a script, each in one call on arrays or files.

    import wsss

    maps = wsss.attention(model, "dog.jpg", [207])              any torchvision or timm classifier
    mask = wsss.refine("dog.jpg", maps=maps, labels=[0])        threshold and dense CRF
    wsss.score("masks", "predictions").miou                     two folders of masks
    wsss.Segmenter.load("exported").predict("dog.jpg")          a trained segmenter
    wsss.run("custom", data={"root": "my_images"}).metrics      the whole pipeline

The six stages are here too, as plain functions: ``wsss.prepare_data(PrepareDataConfig(), …)``.
Importing this package imports neither torch nor Prefect.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from pipeline.config.run_config import RunConfig as RunConfig
    from stages.evaluate import evaluate as evaluate
    from stages.make_attention import make_attention as make_attention
    from stages.make_masks import make_masks as make_masks
    from stages.prepare_data import prepare_data as prepare_data
    from stages.scoring.folder_scores import FolderScores as FolderScores
    from stages.train_classifier import train_classifier as train_classifier
    from stages.train_segmenter import train_segmenter as train_segmenter
    from wsss.maps import attention as attention
    from wsss.maps import refine as refine
    from wsss.running import run as run
    from wsss.scores import score as score
    from wsss.segmenter import Segmenter as Segmenter

_HOMES = {
    "FolderScores": "stages.scoring.folder_scores",
    "RunConfig": "pipeline.config.run_config",
    "Segmenter": "wsss.segmenter",
    "attention": "wsss.maps",
    "evaluate": "stages.evaluate",
    "make_attention": "stages.make_attention",
    "make_masks": "stages.make_masks",
    "prepare_data": "stages.prepare_data",
    "refine": "wsss.maps",
    "run": "wsss.running",
    "score": "wsss.scores",
    "train_classifier": "stages.train_classifier",
    "train_segmenter": "stages.train_segmenter",
}
__all__ = [
    "FolderScores",
    "RunConfig",
    "Segmenter",
    "attention",
    "evaluate",
    "make_attention",
    "make_masks",
    "prepare_data",
    "refine",
    "run",
    "score",
    "train_classifier",
    "train_segmenter",
]


def __getattr__(name: str) -> Any:  # noqa: ANN401 - any of the functions and classes
    """Import the name's home when it is first used."""
    if name not in _HOMES:
        raise AttributeError(f"module 'wsss' has no attribute '{name}'; it has {', '.join(_HOMES)}")
    return getattr(importlib.import_module(_HOMES[name]), name)


def __dir__() -> list[str]:
    """The public names, for completion in a notebook."""
    return sorted(_HOMES)
