"""Attention and scores in bf16 are those in fp32 to its rounding; fp16 needs CUDA and is refused before any work."""

from pathlib import Path

import numpy as np
import pytest
import torch

from stages.contracts import ImageRecord, Runtime, SilentProgress, iter_attention, read_json
from stages.errors import ConfigError
from stages.evaluate import EvaluateConfig, evaluate
from stages.make_attention import MakeAttentionConfig, make_attention
from stages.make_masks import MakeMasksConfig, make_masks
from stages.masks.attention_windows import read_views
from stages.masks.extraction import AttentionExtractor, Views, build_inputs
from stages.methods import build_method
from stages.methods.acol import AcolConfig
from stages.methods.cam import CamConfig
from stages.methods.gradcam import GradCamConfig
from stages.nets.backbones.config import BackboneConfig
from stages.nets.classifier import Classifier
from stages.ops.devices import autocast, check_precision
from stages.ops.multi_scale import multi_scale_probabilities, predict_logits
from stages.scoring.image_prediction import predict_pictures
from stages.scoring.prediction import PredictionConfig
from stages.scoring.window_prediction import PredictOptions
from tests.stages.methods.tiny_data import write_tiny_classifier, write_tiny_data
from tests.stages.trained_nets import save_lively_segmenter

CPU = Runtime(device="cpu", workers=0, threads=1, processes=1)
STEPS = 12
"""Of 256: bf16 has 8 bits, and a few layers add up."""


def first_layer() -> str:
    return next(name for name in BackboneConfig(name="small").build().named_layers() if "." not in name)


@pytest.mark.parametrize("name", ["cam", "acol", "gradcam", "gradcam by gradient"])
@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_maps_are_those_of_fp32_to_the_rounding(name, precision):
    """fp16 on a CPU is slow and not offered, but the same numbers as on CUDA."""
    config = {
        "cam": CamConfig(),
        "acol": AcolConfig(head_channels=32),
        "gradcam": GradCamConfig(),
        "gradcam by gradient": GradCamConfig(layer=first_layer(), channel_weights="gradient"),
    }[name]
    views = Views((1.0,), False, None)
    image = np.random.default_rng(0).integers(0, 255, (24, 30, 3), dtype=np.uint8)
    record = ImageRecord(id="a", image="a.png", size=(24, 30), labels=(0, 2))
    found = []
    for wanted in ("fp32", precision):
        torch.manual_seed(0)
        classifier = Classifier(BackboneConfig(name="small").build(), 3)
        method = build_method(config)
        method.prepare(classifier)
        extractor = AttentionExtractor(
            classifier.eval(), method, views=views, map_stride=4, num_foreground=3, device=torch.device("cpu"),
            warn=print, precision=wanted,
        )  # fmt: skip
        assert extractor._forward(build_inputs([image], views)[0], [(0, 2)]).dtype == torch.float32
        found.append(extractor.records([record], build_inputs([image], views))[0])
    full, half = found
    assert full.peaks.max() > 0
    assert half.peaks == pytest.approx(full.peaks, rel=0.05)
    difference = np.abs(half.maps.astype(int) - full.maps)
    assert difference.max() <= STEPS
    assert difference.any(), "it was computed otherwise"


def test_stored_and_promised_maps_follow_the_precision(tmp_path):
    data, classifier = write_tiny_data(tmp_path), write_tiny_classifier(tmp_path / "classifier")
    common = {"images": data, "classifier": classifier, "data_root": None, "progress": SilentProgress(), "runtime": CPU}
    found = {}
    for precision in ("fp32", "bf16"):
        config = MakeAttentionConfig(scales=(1.0,), flip=False, precision=precision)
        make_attention(config, out=tmp_path / precision, **common)
        found[precision] = np.concatenate([record.maps.ravel() for record in iter_attention(tmp_path / precision)])
        make_attention(config.model_copy(update={"keep_maps": False}), out=tmp_path / f"{precision}-views", **common)
    difference = np.abs(found["fp32"].astype(int) - found["bf16"])
    assert 0 < difference.max() <= STEPS
    assert "precision" not in read_json(tmp_path / "fp32-views" / "views.json"), "as it was before there was a choice"
    assert read_views(tmp_path / "fp32-views").precision == "fp32"
    assert read_views(tmp_path / "bf16-views").precision == "bf16"


def test_masks_are_the_same_from_stored_maps_and_from_those_that_are_not_kept(tmp_path):
    data, classifier = write_tiny_data(tmp_path), write_tiny_classifier(tmp_path / "classifier")
    common = {"images": data, "data_root": None, "progress": SilentProgress(), "runtime": CPU}
    masks = []
    for keep in (True, False):
        attention, out = tmp_path / f"attention-{keep}", tmp_path / f"masks-{keep}"
        config = MakeAttentionConfig(scales=(1.0,), flip=False, precision="bf16", keep_maps=keep)
        make_attention(config, classifier=classifier, out=attention, **common)
        rule = MakeMasksConfig(refine="random_walk")
        make_masks(rule, classifier=classifier, attention=attention, out=out, precision="bf16", **common)
        masks.append({path.name: path.read_bytes() for path in (out / "masks").glob("*.png")})
    assert len(masks[0]) == 6
    assert masks[0] == masks[1]


def test_logits_are_float32_and_mostly_of_one_mind(tmp_path):
    from stages.nets.segmenters.files import load_segmenter

    net = load_segmenter(save_lively_segmenter(tmp_path), torch.device("cpu"))
    images = torch.randn(1, 3, 32, 40, generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        full, half = (predict_logits(net, images, precision=precision) for precision in ("fp32", "bf16"))
        mean = multi_scale_probabilities(net, images, scales=(1.0,), flip=True, precision="bf16")
    assert half.dtype == mean.dtype == torch.float32
    assert not torch.equal(full, half)
    assert (full - half).abs().max() < 0.05 * full.abs().max()
    assert (full.argmax(1) == half.argmax(1)).float().mean() > 0.95
    assert torch.allclose(mean.sum(1), torch.ones(()), atol=1e-5)


def test_predict_follows_evaluate_and_masks_of_fp32_keep_their_origin():
    options = PredictOptions.of(PredictionConfig(precision="bf16"))
    assert options.precision == "bf16"
    assert options.key_content()["precision"] == "bf16"
    assert "precision" not in PredictOptions().key_content()


def test_fp16_without_cuda_is_refused_before_any_work(tmp_path):
    nowhere = {"images": tmp_path / "none", "data_root": None, "progress": SilentProgress(), "runtime": CPU}
    out, classifier = tmp_path / "out", tmp_path / "none"
    calls = {
        "make_attention.precision": lambda: make_attention(
            MakeAttentionConfig(precision="fp16"), classifier=classifier, out=out, **nowhere
        ),
        "evaluate.precision": lambda: evaluate(
            EvaluateConfig(precision="fp16"), segmenter=tmp_path / "none", out=out, **nowhere
        ),
        "--precision": lambda: predict_pictures(
            None, [], PredictOptions(precision="fp16"), out=out, progress=SilentProgress(), runtime=CPU
        ),
    }
    for option, call in calls.items():
        with pytest.raises(ConfigError, match=rf"{option}.* fp16 needs CUDA, found cpu; use fp32 or bf16"):
            call()
    assert not out.exists()
    check_precision("bf16", CPU, "any")


def test_maps_that_were_promised_in_fp16_are_refused_without_cuda(tmp_path: Path):
    from stages.masks.attention_windows import AttentionConfig, write_views

    data, classifier = write_tiny_data(tmp_path), write_tiny_classifier(tmp_path / "classifier")
    write_views(tmp_path / "attention", AttentionConfig(precision="fp16"))
    with pytest.raises(ConfigError, match=r"make_attention.precision fp16 needs CUDA"):
        make_masks(
            MakeMasksConfig(), images=data, attention=tmp_path / "attention", classifier=classifier, data_root=None,
            out=tmp_path / "out", progress=SilentProgress(), runtime=CPU,
        )  # fmt: skip


def test_autocast_changes_nothing_in_fp32():
    with autocast("cpu", "fp32"):
        assert not torch.is_autocast_enabled("cpu")
    with autocast("cpu", "bf16"):
        assert torch.get_autocast_dtype("cpu") == torch.bfloat16
