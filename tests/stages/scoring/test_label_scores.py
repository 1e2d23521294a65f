"""The labels of a classifier by hand, and where evaluate scores them."""

import numpy as np
import pytest
import torch

from stages.contracts import Runtime, SilentProgress, open_image_set, read_json, write_json
from stages.evaluate import EvaluateConfig, evaluate
from stages.methods.classifier_files import load_classifier
from stages.scoring.label_scores import predict_logits, score_classifier
from tests.stages.methods.tiny_data import LABELS, write_tiny_classifier, write_tiny_data

RUNTIME = Runtime(device="cpu", workers=0, threads=1)


class Recorder(SilentProgress):
    """Keeps what was said."""

    def __init__(self):
        super().__init__()
        self.steps, self.lines = [], []

    def step(self, task, done, total, *, unit="images", **values):
        self.steps.append((task, done, total, unit))

    def info(self, text):
        self.lines.append(text)


def test_accuracy_and_precision_by_hand(tmp_path):
    image_set = open_image_set(write_tiny_data(tmp_path, val=2), None)
    classifier, _ = load_classifier(write_tiny_classifier(tmp_path / "classifier"), torch.device("cpu"))
    progress = Recorder()
    metrics = score_classifier(classifier, image_set, "val", None, progress, RUNTIME)
    assert progress.steps[0] == ("classifier on val", 0, 2, "images")
    assert progress.steps[-1] == ("classifier on val", 2, 2, "images")
    logits = predict_logits(classifier, image_set, image_set.index.split("val"), None, SilentProgress(), RUNTIME)
    truth = np.array([[False, True, False], [True, False, True]])
    assert metrics["classifier.label_accuracy"] == pytest.approx(((logits > 0) == truth).mean())
    # two images, one positive each or two: AP of a class is 1 when its image ranks first, else 1/2
    expected = np.mean([1.0 if logits[row, k] > logits[1 - row, k] else 0.5 for row, k in ((1, 0), (0, 1), (1, 2))])
    assert metrics["classifier.map"] == pytest.approx(expected)
    assert score_classifier(classifier, image_set, "holdout", None, progress, RUNTIME) == {}


def test_logits_of_exclusive_classes_count_against_each_other(tmp_path):
    """Two images of one label each; what all logits have in common says nothing."""
    labels = [*LABELS[:4], (1,), (0,)]
    image_set = open_image_set(write_tiny_data(tmp_path, labels=labels, val=2), None)
    classifier, _ = load_classifier(write_tiny_classifier(tmp_path / "classifier"), torch.device("cpu"))
    classifier.is_exclusive = True
    metrics = score_classifier(classifier, image_set, "val", None, SilentProgress(), RUNTIME)
    logits = predict_logits(classifier, image_set, image_set.index.split("val"), None, SilentProgress(), RUNTIME)
    right = (logits.argmax(axis=1) == [1, 0]).sum()
    assert metrics["classifier.top1_accuracy"] == right / 2
    # an image whose first class is wrong has two wrong answers: the one that was given and the one that was not
    assert metrics["classifier.label_accuracy"] == pytest.approx(1 - 2 * (2 - right) / 6)
    assert set(metrics) == {"classifier.map", "classifier.label_accuracy", "classifier.top1_accuracy"}


def test_dead_classes_are_named(tmp_path):
    image_set = open_image_set(write_tiny_data(tmp_path, val=3), None)
    folder = write_tiny_classifier(tmp_path / "classifier", dead_class=2)
    classifier, _ = load_classifier(folder, torch.device("cpu"))
    progress = SilentProgress()
    score_classifier(classifier, image_set, "val", None, progress, RUNTIME)
    assert [w for w in progress.warnings if "never predicts blue on the 3 images of val" in w]


def _evaluate(tmp_path, *, short_side_px=None, **data):
    """What evaluate says of a classifier on data without masks."""
    images = write_tiny_data(tmp_path, **data)
    index = read_json(images / "index.json")
    for image in index["images"]:
        image["mask"] = None
    write_json(images / "index.json", index)
    progress = Recorder()
    result = evaluate(
        EvaluateConfig.model_validate({"segmentation": False, "localization": {}}),
        images=images,
        segmenter=None,
        classifier=write_tiny_classifier(tmp_path / "classifier"),
        labels_short_side_px=short_side_px,
        data_root=None,
        out=tmp_path / "out",
        progress=progress,
        runtime=RUNTIME,
    )
    return result.metrics, progress


@pytest.mark.parametrize("short_side_px", [None, 48])
def test_evaluate_scores_the_labels_of_val_as_the_classifier_saw_images(tmp_path, short_side_px):
    metrics, _ = _evaluate(tmp_path, short_side_px=short_side_px, val=3)
    image_set = open_image_set(tmp_path / "prepared", None)
    classifier, _ = load_classifier(tmp_path / "classifier", torch.device("cpu"))
    expected = score_classifier(classifier, image_set, "val", short_side_px, SilentProgress(), RUNTIME)
    assert metrics == expected
    assert set(metrics) == {"classifier.map", "classifier.label_accuracy"}


@pytest.mark.parametrize(("holdout", "is_said"), [(0, True), (2, False)])
def test_without_any_labels_outside_the_training_a_line_says_so(tmp_path, holdout, is_said):
    metrics, progress = _evaluate(tmp_path, val=1, val_labels=False, holdout=holdout)
    assert metrics == {}
    assert any("its accuracy is not measured" in line for line in progress.lines) == is_said
