import pytest
import torch

from stages.contracts import read_json, write_json
from stages.errors import DamagedFileError
from stages.methods.cam import CamConfig
from stages.methods.classifier_files import ClassifierDescription, load_classifier, read_description
from stages.nets.backbones.config import BackboneConfig
from tests.stages.methods.tiny_data import CLASSES, write_tiny_classifier


def test_description_round_trip(tmp_path):
    write_tiny_classifier(tmp_path)
    expected = ClassifierDescription(backbone=BackboneConfig(name="small"), method=CamConfig(), classes=CLASSES)
    assert read_description(tmp_path) == expected


def test_a_classifier_knows_whether_its_classes_exclude_each_other(tmp_path):
    write_tiny_classifier(tmp_path)
    classifier, _ = load_classifier(tmp_path, torch.device("cpu"))
    assert not classifier.is_exclusive
    description = read_json(tmp_path / "classifier.json")
    assert description["loss"] == "multilabel_soft_margin"
    write_json(tmp_path / "classifier.json", description | {"loss": "cross_entropy"})
    classifier, _ = load_classifier(tmp_path, torch.device("cpu"))
    assert classifier.is_exclusive


def test_a_pretrained_backbone_is_loaded_without_public_weights(tmp_path, monkeypatch):
    write_tiny_classifier(tmp_path)
    description = read_json(tmp_path / "classifier.json")
    description["backbone"] |= {"name": "vgg16", "output_stride": 16, "pretrained": True}
    write_json(tmp_path / "classifier.json", description)
    monkeypatch.setattr("stages.nets.weights.load_pretrained", None)  # would be called with a TypeError
    with pytest.raises(DamagedFileError, match="does not hold this net"):
        load_classifier(tmp_path, torch.device("cpu"))


def test_a_missing_description_names_the_file(tmp_path):
    with pytest.raises(DamagedFileError, match=r"classifier\.json"):
        read_description(tmp_path)


def test_a_description_of_another_version_says_what_to_rebuild(tmp_path):
    write_json(tmp_path / "classifier.json", {"backbone": {"name": "small"}, "classes": {"names": ["a"]}})
    with pytest.raises(DamagedFileError, match="rebuild train_classifier") as caught:
        read_description(tmp_path)
    assert caught.value.problems == ("method: Field required",)
