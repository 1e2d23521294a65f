"""A trained classifier on disk: what it is (classifier.json) and its weights (classifier.safetensors).

Reads and writes these two files, and reads what a classifier starts from; imports torch only when one is built.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pydantic import model_validator

from stages.contracts import ClassList, Progress, StageConfig, read_json, read_model, write_json
from stages.errors import ConfigError, DamagedFileError, WeightsError
from stages.methods import MethodConfig, MethodConfigUnion, build_method
from stages.nets.backbones.config import BackboneConfig, ClassificationLoss, HeadName

if TYPE_CHECKING:
    import torch

    from stages.methods.base import Method
    from stages.nets.classifier import Classifier
    from stages.nets.weights import WeightsReport

START = "classifier"
"""The entry of ``weights:`` with a trained classifier to go on from."""

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
    head: HeadName = "gap"
    """What stands on the backbone."""
    loss: ClassificationLoss = "multilabel_soft_margin"
    """What its logits were trained with, and so what they say."""

    @model_validator(mode="after")
    def _check(self) -> ClassifierDescription:
        check_head(self.head, self.backbone, self.method)
        return self


def check_head(head: HeadName, backbone: BackboneConfig, method: MethodConfig) -> None:
    """Refuse a head that the backbone or the method cannot have.

    Raises:
        ValueError: naming both and what to choose instead.
    """
    problems = []
    if head == "fc" and backbone.name != "vgg16":
        problems.append(
            f"head: fc is VGG16's own fc6 and fc7, which {backbone.name} does not have; "
            "use backbone {name: vgg16} or head: gap"
        )
    if head == "fc" and method.needs_score_maps:
        name = getattr(method, "name", type(method).__name__)
        problems.append(f"{name} reads class score maps, which head: fc does not have; use gradcam or head: gap")
    if problems:
        raise ValueError("; ".join(problems))


def check_start(method: MethodConfig, weights: Mapping[str, Path]) -> None:
    """Refuse a method that begins at a trained classifier where none is given.

    Raises:
        ConfigError: naming the two ways out.
    """
    if method.needs_start and START not in weights:
        raise ConfigError(
            "method.judge: frozen is a copy of a trained classifier, and there is none to copy: am_warmup_epochs is 0 "
            f"and no weights.{START} is given; set method.am_warmup_epochs (half of the training, say), or "
            f"weights.{START} to the {WEIGHTS_FILE} of a run"
        )


def build_classifier(
    description: ClassifierDescription, weights: Mapping[str, Path], progress: Progress | None = None
) -> tuple[Classifier, Method]:
    """The network with its method's layers inserted; a fresh head, drawn from torch's generator.

    Args:
        description: What to build.
        weights: Files of public weights by backbone name, for ``pretrained: true``; or under ``classifier`` the
            weights of a trained classifier, which then replace them.
        progress: Told what was loaded.

    Raises:
        ConfigError: the method names a layer that the network does not have.
        WeightsError: the weights are neither given nor to be had, or do not fit.
    """
    if START in weights:
        description = _without_public_weights(description)
    classifier = _build_network(description, weights, progress)
    method = build_method(description.method)
    method.prepare(classifier)
    if START in weights:
        _check_classes(weights[START], description.classes)
        report = load_start(classifier, weights, has_own_head=description.method.has_own_head)
        if progress is not None:
            progress.info(report.describe())
    return classifier, method


def _build_network(
    description: ClassifierDescription, weights: Mapping[str, Path], progress: Progress | None
) -> Classifier:
    """Backbone and head; what public weights there are for them, loaded."""
    from stages.nets.classifier import Classifier
    from stages.nets.heads import FcHead, load_vgg16
    from stages.nets.weights import build_backbone

    config, num_foreground = description.backbone, description.classes.num_foreground
    if description.head == "gap":
        return Classifier(build_backbone(config, weights, progress), num_foreground, loss=description.loss)
    classifier = Classifier(config.build(), num_foreground, description.head, description.loss)
    if config.pretrained and isinstance(classifier.head, FcHead):
        report = load_vgg16(classifier.backbone, classifier.head, _weight_file(config.name, weights, progress))
        if progress is not None:
            progress.info(report.describe())
    return classifier


def _weight_file(name: str, weights: Mapping[str, Path], progress: Progress | None = None) -> Path:
    """The given file of ``name``, else the public one."""
    from stages.nets.downloads import download_weights
    from stages.nets.weights import weights_problems

    problems = weights_problems(name, weights)
    if problems:
        raise WeightsError(problems[0])
    return weights[name] if name in weights else download_weights(name, progress=progress)


def _check_classes(start: Path, classes: ClassList) -> None:
    """Refuse to go on from a classifier of other classes, which the description beside its weights names."""
    try:  # the description of another version may have options that this one does not know
        found = ClassList.model_validate(read_json(start.with_name(DESCRIPTION_FILE))["classes"]).names
    except (OSError, ValueError, KeyError, TypeError, DamagedFileError):
        return
    if found != classes.names:
        raise WeightsError(
            f"weights.{START}: {start} is a classifier of {', '.join(found)}, and the data set's classes are "
            f"{', '.join(classes.names)}; give one that was trained on these, in this order"
        )


def load_start(classifier: Classifier, weights: Mapping[str, Path], *, has_own_head: bool = False) -> WeightsReport:
    """Load ``weights.classifier``, the trained weights of an equal backbone and head, where the training begins.

    Layers of the method that the file lacks start fresh; layers of another method in the file are not used.

    Args:
        classifier: Gets the weights.
        weights: With the entry ``classifier``.
        has_own_head: The method put a head of its own in place (ACoL): it starts fresh where the file has another's.

    Raises:
        WeightsError: the file is not readable, or backbone or head differ; the tensors are named.
    """
    from stages.nets.weights import WeightsReport, load_tensors, read_tensors

    path = _weight_file(START, weights)
    state = classifier.state_dict()
    tensors = read_tensors(path, state.keys())
    is_other_head = has_own_head and not any(key in tensors for key in state if key.startswith("head."))
    if is_other_head:
        tensors = {key: value for key, value in tensors.items() if not key.startswith("head.")}
    needed = {"backbone"} if is_other_head else {"backbone", "head"}
    fresh = [key for key in state if key not in tensors and key.partition(".")[0] not in needed]
    source = f"weights.{START} from {path.name}"
    try:
        report = load_tensors(classifier, {**{key: state[key] for key in fresh}, **tensors}, source=source)
    except WeightsError as error:
        raise WeightsError(
            f"{error.message}; give {WEIGHTS_FILE} of a run with the same backbone, head and classes", error.problems
        ) from error
    matched = tuple(key for key in report.matched if key not in fresh)
    return WeightsReport(source, matched, (*report.missing, *fresh), report.unexpected)


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
    return read_model(folder / DESCRIPTION_FILE, ClassifierDescription, "train_classifier")


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
    with torch.random.fork_rng(devices=[]):  # fresh layers draw numbers that are overwritten at once
        classifier, method = build_classifier(_without_public_weights(description), {})
    load_weights(classifier, folder / WEIGHTS_FILE)
    return classifier.to(device).eval(), method


def _without_public_weights(description: ClassifierDescription) -> ClassifierDescription:
    """The same classifier at a random start: weights of ours replace all of it."""
    plain = description.backbone.model_copy(update={"pretrained": False})
    return description.model_copy(update={"backbone": plain})


def _as_json(description: ClassifierDescription) -> dict[str, Any]:
    """The description as plain JSON; the method with all options of its own class."""
    return description.model_dump(mode="json") | {"method": description.method.model_dump(mode="json")}
