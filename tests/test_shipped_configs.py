"""Every shipped YAML loads, says what it is, and each network takes one step with its method on two tiny images.

A network that several configs share is stepped once.
"""

import functools
from pathlib import Path

import pytest
import torch

from pipeline.config.run_config import RunConfig, load_config, shipped_configs
from stages.methods import build_method
from stages.nets.backbones.config import BackboneConfig, HeadName
from stages.nets.classifier import Classifier
from stages.nets.segmenters.build import build_segmenter
from stages.ops.losses import segmentation_cross_entropy
from stages.ops.step import StepInfo

CONFIGS = shipped_configs()

VOC12 = ("cam", "gradcam", "gain", "gain_ext200", "gain_ext1464", "adl")
OTHERS = ("gradcam", "gain", "adl", "has", "acol", "spg", "cutmix")
SEGMENTER_VARIANTS = {f"voc_animals_{loss}": "voc_animals_cam" for loss in ("sec", "balanced", "full")}
"""Configs that differ from their baseline in how the segmenter learns, and so stand in a table of their own."""

BEST = "voc_animals_best"
"""The best road measured: other methods before the segmenter and in it, the same data, network and test."""

EXPECTED = {
    *("custom", "custom_gpu", "demo", "demo_gain_ext30", "cub_adl", "cub_cam"),
    *(f"demo_{method}" for method in OTHERS),
    *(f"voc12_{method}" for method in VOC12),
    *("voc12_largefov_vgg16", "voc12_deeplab_v2"),
    *(f"voc12_resnet50_{method}" for method in VOC12),
    *(f"voc_animals_{method}" for method in (*OTHERS, "cam", "gain_ext50", "gain_ext100", "recam")),
    *SEGMENTER_VARIANTS,
    *(BEST, "voc_animals_affinity"),
}
"""Names of the files."""

FAMILIES = {"demo": "demo", "voc_animals": "voc_animals_cam", "voc12_resnet50": "voc12_resnet50_cam", "cub": "cub_cam"}
"""Beginning of the names of configs that stand in one table, and their baseline."""

AFTER_WARM_UP = 10_000
"""An epoch in which every method does all that it does."""

NETWORK = {"backbone", "head", "method", "net"}
SCHEDULE = {"pixel_images", "pixel_repeat", "am_warmup_epochs"}
"""Options of a method that change nothing in one step."""

every_config = pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)


@functools.cache
def _load(path: Path) -> RunConfig:
    return load_config(path)


def _first_of_each(section: str) -> list:
    """One test case for each different network in that section, named after the first config that has it."""
    parts = {}
    for path in CONFIGS:
        part = getattr(_load(path), section)
        shape = part.model_dump(include=NETWORK, exclude={"method": SCHEDULE})
        parts.setdefault(str(shape), pytest.param(part, id=path.stem))
    return list(parts.values())


def test_the_shipped_configs_are_those_that_are_expected():
    assert {path.stem for path in CONFIGS} == EXPECTED


@every_config
def test_the_header_names_paper_command_hardware_and_expectation(path: Path):
    header = [line for line in path.read_text(encoding="utf-8").splitlines() if line.startswith("#")]
    text = "\n".join(header)
    paper = () if path.stem.startswith("custom") else ("Paper:",)
    for word in (*paper, "Command:", "Hardware:", "Expected:", path.name):
        assert word in text, f"{path.name}: the comment at the top lacks '{word}'"


@every_config
def test_the_run_has_the_name_of_its_file(path: Path):
    assert _load(path).name == path.stem.replace("_", "-")


@pytest.mark.parametrize("family", FAMILIES)
def test_configs_of_one_table_share_data_segmenter_and_test(family: str):
    shared = {"seed", "data", "prepare_data", "train_segmenter", "evaluate"}
    paths = {path.stem: path for path in CONFIGS}
    baseline = _load(paths[FAMILIES[family]])
    for stem, path in paths.items():
        if stem.startswith(family) and stem not in {*SEGMENTER_VARIANTS, BEST}:
            assert _load(path).model_dump(include=shared) == baseline.model_dump(include=shared), stem


@pytest.mark.parametrize("stem", SEGMENTER_VARIANTS)
def test_configs_that_compare_segmenters_share_all_before_them(stem: str):
    shared = {"seed", "data", "prepare_data", "train_classifier", "make_attention", "evaluate"}
    paths = {path.stem: path for path in CONFIGS}
    found, baseline = _load(paths[stem]), _load(paths[SEGMENTER_VARIANTS[stem]])
    assert found.model_dump(include=shared) == baseline.model_dump(include=shared)
    assert found.train_segmenter.net == baseline.train_segmenter.net
    assert found.train_segmenter.training == baseline.train_segmenter.training


def test_the_best_road_is_compared_on_equal_terms():
    found, baseline = (_load({path.stem: path for path in CONFIGS}[stem]) for stem in (BEST, "voc_animals_cam"))
    shared = {"seed", "data", "prepare_data", "make_attention", "make_masks", "evaluate"}
    assert found.model_dump(include=shared) == baseline.model_dump(include=shared)
    assert found.train_segmenter.net == baseline.train_segmenter.net
    assert found.train_segmenter.training == baseline.train_segmenter.training


@pytest.fixture(scope="module", autouse=True)
def _forget_large_networks():
    yield
    _classifier_with_fc.cache_clear()


@pytest.mark.parametrize("options", _first_of_each("train_classifier"))
def test_each_classifier_takes_one_step(options):
    torch.manual_seed(0)
    classifier = _classifier(options.backbone, options.head)
    method = build_method(options.method)
    method.prepare(classifier)
    images = torch.randn(2, 3, 65, 97) * torch.linspace(0, 3, 97)  # ADL drops all of a flat map
    labels, masks = torch.eye(3)[:2], torch.full((2, 65, 97), 255)
    masks[0, :, :48] = 1  # true: the first image's class
    masks[0, :, 48:] = 0
    reads_masks = options.method.name == "gain_ext"
    step = StepInfo(step=0, num_steps=1, epoch=AFTER_WARM_UP, device=torch.device("cpu"))
    losses = method.objective(classifier.train(), images, labels, step, masks=masks if reads_masks else None)
    assert ("pixel" in losses) == reads_masks
    assert not reads_masks or losses["pixel"] > 0
    _step(classifier, losses["loss"])


@pytest.mark.parametrize("options", _first_of_each("train_segmenter"))
def test_each_segmenter_takes_one_step(options):
    torch.manual_seed(0)
    segmenter = build_segmenter(options.net, 4, init="random", weights={})
    masks = torch.randint(0, 4, (2, 65, 97))
    logits = torch.nn.functional.interpolate(
        segmenter(torch.randn(2, 3, 65, 97)), size=masks.shape[-2:], mode="bilinear"
    )
    _step(segmenter, segmentation_cross_entropy(logits, masks))


def _classifier(backbone: BackboneConfig, head: HeadName) -> Classifier:
    """A plain network at a random start; VGG16 with fc6 and fc7 is large, and no method inserts anything there."""
    if head == "fc":
        return _classifier_with_fc(backbone.model_dump_json())
    return Classifier(backbone.build(), 3, head)


@functools.cache
def _classifier_with_fc(backbone: str) -> Classifier:
    return Classifier(BackboneConfig.model_validate_json(backbone).build(), 3, "fc")


def _step(module, loss):
    """One step down a finite loss; it moves at least one tensor."""
    module.zero_grad()
    loss.backward()
    assert torch.isfinite(loss)
    moved = next(p for p in module.parameters() if p.grad is not None and p.grad.abs().max() > 0)
    before = moved.detach().clone()
    torch.optim.SGD(module.parameters(), lr=0.01).step()
    assert not torch.equal(moved, before)
