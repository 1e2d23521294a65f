"""Every shipped YAML loads, says what it is, and each of its networks takes one step on two tiny images."""

from pathlib import Path

import pytest

from pipeline.config import load_config, shipped_configs

CONFIGS = shipped_configs()


def test_there_are_shipped_configs():
    assert {"custom", "demo", "voc12_cam", "voc_animals_cam"} <= {path.stem for path in CONFIGS}


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_the_header_names_paper_command_hardware_and_expectation(path: Path):
    header = [line for line in path.read_text(encoding="utf-8").splitlines() if line.startswith("#")]
    text = "\n".join(header)
    for word in ("Command:", "Hardware:", "Expected:", path.name):
        assert word in text, f"{path.name}: the comment at the top lacks '{word}'"


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_each_network_takes_one_step(path: Path):
    import torch

    from stages.methods import build_method
    from stages.nets.backbone_builders import build_plain_backbone
    from stages.nets.classifier import Classifier
    from stages.nets.segmenters import build_segmenter
    from stages.ops.losses import segmentation_cross_entropy
    from stages.ops.step import StepInfo

    run = load_config(path)
    torch.manual_seed(0)
    images = torch.randn(2, 3, 65, 97)

    classifier = Classifier(build_plain_backbone(run.train_classifier.backbone), 3)
    method = build_method(run.train_classifier.method)
    method.prepare(classifier)
    step = StepInfo(step=0, num_steps=1, epoch=0, device=torch.device("cpu"))
    _step(classifier, method.objective(classifier, images, torch.eye(3)[:2], step)["loss"])

    segmenter = build_segmenter(run.train_segmenter.net, 4, init="random", weights={})
    masks = torch.randint(0, 4, (2, 65, 97))
    logits = torch.nn.functional.interpolate(segmenter(images), size=masks.shape[-2:], mode="bilinear")
    _step(segmenter, segmentation_cross_entropy(logits, masks))


def _step(module, loss):
    import torch

    before = [parameter.detach().clone() for parameter in module.parameters()]
    loss.backward()
    torch.optim.SGD(module.parameters(), lr=0.1).step()
    assert torch.isfinite(loss)
    assert any(not torch.equal(old, new) for old, new in zip(before, module.parameters(), strict=True))
