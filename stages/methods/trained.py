"""A trained classifier on disk: what it is (classifier.json) and its weights (classifier.safetensors).

Reads and writes these two files; imports torch only when weights are loaded.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pydantic import ValidationError

from stages.contracts import ClassList, Progress, StageConfig, read_json, write_json
from stages.errors import DamagedFileError
from stages.methods import MethodConfig, MethodConfigUnion, build_method
from stages.nets.backbones import BackboneConfig

if TYPE_CHECKING:
    import torch

    from stages.methods.base import Method
    from stages.nets.classifier import Classifier

WEIGHTS_FILE = "classifier.safetensors"
DESCRIPTION_FILE = "classifier.json"


class ClassifierDescription(StageConfig):
    """Everything that is needed to build the classifier again, but its weights."""

    backbone: BackboneConfig
    """The backbone as it was trained."""
    method: MethodConfigUnion
    """The method whose layers it has and whose attention it gives."""
    classes: ClassList
    """The foreground classes in the order of its logits."""


def build_classifier(
    description: ClassifierDescription, weights: Mapping[str, Path], progress: Progress | None = None
) -> tuple[Classifier, Method]:
    """The network with its method's layers inserted; a fresh head, drawn from torch's generator.

    Args:
        description: What to build.
        weights: Files of public weights by backbone name, for ``pretrained: true``.
        progress: Told what was loaded.

    Raises:
        WeightsError: the public weights are neither given nor to be had, or do not fit.
    """
    from stages.nets.backbone_builders import build_backbone
    from stages.nets.classifier import Classifier

    classifier = Classifier(build_backbone(description.backbone, weights, progress), description.classes.num_foreground)
    method = build_method(description.method)
    method.prepare(classifier)
    return classifier, method


def save_classifier(folder: Path, description: ClassifierDescription, classifier: Classifier) -> None:
    """Write weights and description to ``folder``; the description comes last and says that the weights are whole."""
    from stages.nets.weights import save_weights

    save_weights(classifier, folder / WEIGHTS_FILE)
    write_json(folder / DESCRIPTION_FILE, _as_json(description))


def read_description(folder: Path) -> ClassifierDescription:
    """What the classifier in ``folder`` is; torch-free.

    Raises:
        DamagedFileError: the file is missing or is no description.
    """
    path = folder / DESCRIPTION_FILE
    try:
        return ClassifierDescription.model_validate(read_json(path))
    except ValidationError as error:
        raise DamagedFileError(
            f"{path} does not describe a classifier of this version; rebuild train_classifier",
            [f"{'.'.join(map(str, problem['loc']))}: {problem['msg']}" for problem in error.errors()],
        ) from error


def load_classifier(folder: Path, device: torch.device) -> tuple[Classifier, Method]:
    """The trained classifier in evaluation mode on ``device``, with its method.

    Args:
        folder: Output folder of ``train_classifier``.
        device: Where to put it.

    Raises:
        DamagedFileError: a file is missing, does not read back, or its weights do not fit the description.
    """
    import torch

    from stages.nets.weights import load_weights

    description = read_description(folder)
    plain = description.backbone.model_copy(update={"pretrained": False})  # our weights replace the public ones
    with torch.random.fork_rng(devices=[]):  # fresh layers draw numbers that are overwritten at once
        classifier, method = build_classifier(description.model_copy(update={"backbone": plain}), {})
    load_weights(classifier, folder / WEIGHTS_FILE)
    return classifier.to(device).eval(), method


def _as_json(description: ClassifierDescription) -> dict[str, Any]:
    """The description as plain JSON; the method with all options of its own class."""
    method: MethodConfig = description.method
    return {
        "backbone": description.backbone.model_dump(mode="json"),
        "method": method.model_dump(mode="json"),
        "classes": description.classes.model_dump(mode="json"),
    }
