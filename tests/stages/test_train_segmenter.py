"""The segmenter's stage: what it trains on, what it writes, exact resume, and its refusals."""

from __future__ import annotations

import json
import shutil

import numpy as np
import pytest
import torch
from PIL import Image
from pydantic import ValidationError

from stages.contracts import (
    ClassList,
    Runtime,
    SilentProgress,
    read_index_mask,
    read_json,
    write_index_mask,
)
from stages.data.transforms import to_network_input
from stages.errors import ConfigError, DamagedFileError, DataError, EnvironmentFailure, InputError, MissingArtifactError
from stages.masks.mask_files import write_confidence
from stages.nets.segmenters.build import build_segmenter
from stages.nets.segmenters.files import load_segmenter
from stages.training.config import TrainingConfig
from stages.training.segmenter_objective import match_sizes
from stages.training.validation import warn_of_collapse
from tests.stages.tiny_segmenters import NAMES, SIZE, digests, make_config, run, write_folders


@pytest.fixture
def folders(tmp_path):
    return write_folders(tmp_path)


def test_it_writes_the_trained_net_and_its_history(folders, tmp_path):
    result = run(folders, tmp_path / "out")
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == [
        "history.json",
        "segmenter.json",
        "segmenter.safetensors",
    ]
    assert result.mask_supervision == ()
    history = read_json(tmp_path / "out" / "history.json")
    assert [record["step"] for record in history] == [1, 2, 3]
    assert history[-1]["epoch"] == 1.5
    assert json.loads((tmp_path / "out" / "segmenter.json").read_text())["classes"] == list(NAMES)
    segmenter = load_segmenter(tmp_path / "out", torch.device("cpu"))
    assert segmenter(torch.zeros(1, 3, 40, 48)).shape[:2] == (1, 3)


def test_killed_in_the_middle_it_ends_with_the_same_files_whatever_the_workers(folders, tmp_path, monkeypatch):
    run(folders, tmp_path / "whole")
    from stages.ops import losses

    calls = []

    def killing(logits, masks):
        calls.append(1)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return original(logits, masks)

    original = losses.segmentation_cross_entropy
    monkeypatch.setattr(losses, "segmentation_cross_entropy", killing)
    with pytest.raises(KeyboardInterrupt):
        run(folders, tmp_path / "killed", workers=2)
    assert (tmp_path / "killed" / "checkpoint.pt").exists()
    resumed = run(folders, tmp_path / "killed", workers=1)
    assert len(calls) == 3 + 1  # two whole steps, the killed third, and the third again
    assert resumed.mask_supervision == ()
    assert digests(tmp_path / "killed") == digests(tmp_path / "whole")


def test_killed_while_it_writes_its_results_it_ends_with_the_same_files(folders, tmp_path, monkeypatch):
    run(folders, tmp_path / "whole")
    with monkeypatch.context() as patch:
        patch.setattr("stages.train_segmenter.save_segmenter", lambda *a: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            run(folders, tmp_path / "killed")
    run(folders, tmp_path / "killed")
    assert digests(tmp_path / "killed") == digests(tmp_path / "whole")


def test_it_learns_to_tell_the_colours(folders, tmp_path):
    progress = SilentProgress()
    config = make_config(steps=60, training=TrainingConfig(steps=60, batch_size=4, learning_rate=0.02))
    run(folders, tmp_path / "out", config, progress=progress)
    history = read_json(tmp_path / "out" / "history.json")
    assert history[-1]["loss"] < 0.3 * history[0]["loss"]
    assert progress.warnings == []


def test_full_supervision_reads_true_masks_and_says_so(folders, tmp_path):
    images, masks = folders
    shutil.rmtree(masks)
    result = run((images, None), tmp_path / "full", make_config(supervision="full"))
    assert result.mask_supervision == ("img0", "img1", "img2", "img3")


def test_weak_supervision_reads_no_true_mask(folders, tmp_path):
    run(folders, tmp_path / "with")
    for path in (folders[0] / "data").glob("*-mask.png"):
        path.unlink()
    run(folders, tmp_path / "without")
    assert digests(tmp_path / "with") == digests(tmp_path / "without")


def corrected(folders, *numbers, void_columns=0):
    """A folder of other masks of some of the images, with a green square in each."""
    folder = folders[0].parent / "hands"
    for number in numbers:
        mask = read_index_mask(folders[1] / "masks" / f"img{number}.png")
        mask[10:30, 5:25] = 2
        mask[:, :void_columns] = 255
        write_index_mask(folder / f"img{number}.png", mask)
    return folder


def take_as_pseudo_masks(folders, folder):
    for path in folder.iterdir():
        shutil.copy(path, folders[1] / "masks" / path.name)


def test_corrected_masks_are_learned_in_place_of_pseudo_masks(folders, tmp_path):
    folder = corrected(folders, 2)
    result = run(folders, tmp_path / "corrected", make_config(corrected_masks=folder))
    assert result.mask_supervision == ("img2",), "so no score of training images counts it"
    run(folders, tmp_path / "before")
    take_as_pseudo_masks(folders, folder)
    run(folders, tmp_path / "by hand")
    assert digests(tmp_path / "corrected") == digests(tmp_path / "by hand") != digests(tmp_path / "before")


def test_a_corrected_image_needs_no_pseudo_mask(folders, tmp_path):
    config = make_config(corrected_masks=corrected(folders, 2))
    run(folders, tmp_path / "with", config)
    (folders[1] / "masks" / "img2.png").unlink()
    progress = SilentProgress()
    run(folders, tmp_path / "without", config, progress=progress)
    assert digests(tmp_path / "with") == digests(tmp_path / "without")
    assert not any("are left out" in text for text in progress.warnings)


def test_a_corrected_mask_is_sure_wherever_it_is_not_void(folders, tmp_path):
    write_confidences(folders, lambda mask: np.zeros(mask.shape, dtype=np.uint8))
    folder = corrected(folders, 2, void_columns=20)
    run(folders, tmp_path / "corrected", make_config(loss_weighting="confidence", corrected_masks=folder))
    mask = read_index_mask(folder / "img2.png")
    write_confidence(folders[1] / "confidence" / "img2.png", np.where(mask == 255, 0, 255).astype(np.uint8))
    take_as_pseudo_masks(folders, folder)
    run(folders, tmp_path / "by hand", make_config(loss_weighting="confidence"))
    assert digests(tmp_path / "corrected") == digests(tmp_path / "by hand")


def test_a_corrected_image_can_be_seen_more_often(folders, tmp_path):
    folder = corrected(folders, 2)
    epoch = {"epochs": 1, "batch_size": 1, "learning_rate": 0.01}
    run(folders, tmp_path / "often", make_config(corrected_masks=folder, corrected_repeat=5, training=epoch))
    assert read_json(tmp_path / "often" / "history.json")[-1]["step"] == 3 + 5


def test_corrected_masks_that_do_not_fit_train_nothing(folders, tmp_path):
    folder = corrected(folders, 0, 1)
    write_index_mask(folder / "img0.png", np.full(SIZE, 3, dtype=np.uint8))
    write_index_mask(folder / "img1.png", np.zeros((SIZE[1], SIZE[0]), dtype=np.uint8))
    with pytest.raises(DataError, match="2 of the corrected masks cannot be learned") as caught:
        run(folders, tmp_path / "out", make_config(corrected_masks=folder))
    values, size = caught.value.problems
    assert "values 3 are no class" in values
    assert "expected 40×48" in size
    assert not (tmp_path / "out").exists()
    write_index_mask(folder / "val7.png", np.zeros(SIZE, dtype=np.uint8))
    with pytest.raises(ConfigError, match="cannot be used"):
        run(folders, tmp_path / "out", make_config(corrected_masks=folder))
    with pytest.raises(ValidationError, match="corrected_masks replace pseudo-masks"):
        make_config(corrected_masks=folder, supervision="full")


def test_corrected_images_are_not_held_out(folders, tmp_path):
    held_out = {"every_steps": 3, "ratio": 0.5}
    run(folders, tmp_path / "before", make_config(validation=held_out))
    chosen = read_json(tmp_path / "before" / "validation.json")["held_out"]
    folder = corrected(folders, *(int(name.removeprefix("img")) for name in chosen))
    run(folders, tmp_path / "after", make_config(validation=held_out, corrected_masks=folder))
    assert not set(read_json(tmp_path / "after" / "validation.json")["held_out"]) & set(chosen)
    with pytest.raises(ConfigError, match="all 4 training images have a corrected mask"):
        run(folders, tmp_path / "none", make_config(validation=held_out, corrected_masks=corrected(folders, *range(4))))


def test_another_seed_or_loss_gives_another_net(folders, tmp_path):
    run(folders, tmp_path / "a")
    run(folders, tmp_path / "b", seed=2)
    run(folders, tmp_path / "c", make_config(loss="balanced_cross_entropy"))
    run(folders, tmp_path / "d", make_config(loss_resolution="cells"))
    weights = {digests(tmp_path / name)["segmenter.safetensors"] for name in "abcd"}
    assert len(weights) == 4


def test_the_classifier_gives_its_backbone(folders, tmp_path):
    from stages.methods.cam import CamConfig
    from stages.methods.classifier_files import ClassifierDescription, build_classifier, save_classifier
    from stages.nets.backbones.config import BackboneConfig

    torch.manual_seed(0)
    description = ClassifierDescription(
        backbone=BackboneConfig(name="small", output_stride=4), method=CamConfig(), classes=ClassList(names=NAMES)
    )
    classifier, _ = build_classifier(description, {})
    save_classifier(tmp_path / "classifier", description, classifier)
    frozen = TrainingConfig(steps=1, batch_size=2, learning_rate=1e-12, weight_decay=0)
    config = make_config(init="classifier", training=frozen)
    run(folders, tmp_path / "out", config, classifier=tmp_path / "classifier")
    trained = load_segmenter(tmp_path / "out", "cpu").trunk.state_dict()
    for name, value in classifier.backbone.named_parameters():
        torch.testing.assert_close(trained[name], value.detach(), rtol=0, atol=1e-6)
    with pytest.raises(MissingArtifactError, match="run train_classifier first"):
        run(folders, tmp_path / "none", config)


# -- sizes ------------------------------------------------------------------------------------------------------------


def test_cells_take_the_mask_at_their_centres():
    masks = torch.arange(16, dtype=torch.uint8).reshape(1, 4, 4)
    logits, cells = match_sizes(torch.zeros(1, 3, 2, 2, dtype=torch.bfloat16), masks, "cells")
    assert cells.tolist() == [[[5, 7], [13, 15]]]
    assert cells.dtype == torch.uint8
    assert logits.dtype == torch.float32


def test_pixels_upsample_the_logits():
    logits = torch.tensor([[[[0.0, 4.0]]]])
    upsampled, masks = match_sizes(logits, torch.zeros(1, 2, 4, dtype=torch.uint8), "pixels")
    assert upsampled.tolist() == [[[[0, 1, 3, 4], [0, 1, 3, 4]]]]
    assert masks.shape == (1, 2, 4)


def write_confidences(folders, value_of):
    """Write ``confidence/<id>.png`` beside the pseudo-masks, from each mask."""
    for path in (folders[1] / "masks").iterdir():
        write_confidence(folders[1] / "confidence" / path.name, value_of(read_index_mask(path)))


def test_full_confidence_trains_as_none_does(folders, tmp_path):
    """Void pixels count in neither loss, so their confidence does not matter."""
    write_confidences(folders, lambda mask: np.where(mask == 255, 0, 255).astype(np.uint8))
    run(folders, tmp_path / "plain")
    run(folders, tmp_path / "sure", make_config(loss_weighting="confidence"))
    assert digests(tmp_path / "plain") == digests(tmp_path / "sure")


@pytest.mark.parametrize("resolution", ["pixels", "cells"])
@pytest.mark.parametrize("loss", ["cross_entropy", "balanced_cross_entropy"])
def test_pixels_without_confidence_count_as_void(folders, tmp_path, resolution, loss):
    config = make_config(loss=loss, loss_resolution=resolution)
    weighted = make_config(loss=loss, loss_resolution=resolution, loss_weighting="confidence")
    write_confidences(folders, lambda mask: np.where(np.indices(mask.shape)[1] < 20, 0, 255).astype(np.uint8))
    run(folders, tmp_path / "weighted", weighted)
    run(folders, tmp_path / "plain", config)
    for path in (folders[1] / "masks").iterdir():
        mask = read_index_mask(path)
        mask[:, :20] = 255
        write_index_mask(path, mask)
    run(folders, tmp_path / "void", config)
    losses = {
        name: [record["loss"] for record in read_json(tmp_path / name / "history.json")]
        for name in ("weighted", "void", "plain")
    }
    assert losses["weighted"] == pytest.approx(losses["void"], rel=1e-5)
    assert losses["weighted"] != pytest.approx(losses["plain"], rel=1e-2)


def test_a_confidence_that_is_not_there_or_does_not_fit_is_named(folders, tmp_path):
    config = make_config(loss_weighting="confidence")
    with pytest.raises(MissingArtifactError, match="which make_masks writes with soft: true"):
        run(folders, tmp_path / "a", config)
    write_confidences(folders, lambda mask: np.full((4, 4), 255, np.uint8))
    with pytest.raises(DamagedFileError, match=r"img\d\.png: expected \(40, 48\) pixels, found \(4, 4\)"):
        run(folders, tmp_path / "b", config)
    shutil.rmtree(folders[1] / "confidence")
    (folders[1] / "confidence").mkdir()
    with pytest.raises(DamagedFileError, match="rebuild make_masks with soft: true"):
        run(folders, tmp_path / "c", config)


# -- warnings and refusals --------------------------------------------------------------------------------------------


def test_images_without_a_pseudo_mask_are_left_out_with_a_warning(folders, tmp_path):
    (folders[1] / "masks" / "img2.png").unlink()
    progress = SilentProgress()
    run(folders, tmp_path / "out", progress=progress)
    assert "1 of 4 training images have no pseudo-mask and are left out" in progress.warnings


def test_no_mask_at_all_is_refused(folders, tmp_path):
    shutil.rmtree(folders[1])
    with pytest.raises(DataError, match=r"none of the 4 images of split train has a pseudo-mask in .*masks"):
        run(folders, tmp_path / "out")
    with pytest.raises(MissingArtifactError, match="run make_masks first"):
        run((folders[0], None), tmp_path / "out")


@pytest.mark.parametrize("workers", [0, 2])
def test_a_pseudo_mask_of_another_size_is_named(folders, tmp_path, workers):
    for number in range(4):
        write_index_mask(folders[1] / "masks" / f"img{number}.png", np.zeros((40, 47), np.uint8))
    with pytest.raises(DamagedFileError, match=r"img\d.png: expected \(40, 48\) pixels, found \(40, 47\); rebuild"):
        run(folders, tmp_path / "out", workers=workers)


@pytest.mark.parametrize("num_wrong", [1, 4])
def test_pseudo_masks_with_a_class_too_many_are_of_another_class_list(folders, tmp_path, num_wrong):
    for number in range(num_wrong):
        write_index_mask(folders[1] / "masks" / f"img{number}.png", np.full(SIZE, 3, np.uint8))
    reason = (
        r"img\d.png is of another class list: expected values below 3 \(background, red, green\) or 255, found \[3\]"
    )
    with pytest.raises(DataError, match=reason) as caught:
        run(folders, tmp_path / "out")
    assert caught.value.exit_code == 2


def test_pseudo_masks_of_the_same_classes_in_another_order_are_refused(folders, tmp_path):
    for path in (folders[1] / "masks").iterdir():
        mask = read_index_mask(path)
        write_index_mask(path, np.choose(mask.clip(max=3), [0, 2, 1, 255]).astype(np.uint8))
    with pytest.raises(DataError, match=r"or of one in another order: 4 of 4 show a class .*red, green"):
        run(folders, tmp_path / "out")


def test_masks_without_objects_are_warned_of(folders, tmp_path):
    for number in range(4):
        write_index_mask(folders[1] / "masks" / f"img{number}.png", np.zeros(SIZE, np.uint8))
    progress = SilentProgress()
    run(folders, tmp_path / "out", progress=progress)
    assert "hold no object pixel" in progress.warnings[-1]


def test_a_collapsed_net_is_warned_of(folders, tmp_path, monkeypatch):
    from stages.nets.segmenters.largefov import LargeFov

    def background_only(self, images):
        logits = torch.zeros(len(images), 3, 8, 8)
        logits[:, 0] = 1 + 0 * self.classifier.bias.sum()
        return logits

    monkeypatch.setattr(LargeFov, "forward", background_only)
    progress = SilentProgress()
    run(folders, tmp_path / "out", progress=progress)
    assert "predicts only background on 4 training crops" in progress.warnings[-1]


@pytest.mark.parametrize(
    ("masked", "said", "is_warned"),
    [
        ([1, 1, 1, 2], {1}, True),  # a quarter holds the other class
        ([1, 1, 1, 1], {1}, False),  # there is no other
        ([1, 1, 1, 2], {1, 2}, False),
        ([2, 2, 0, 0], {1}, True),  # crops without objects say nothing
        ([1] * 8 + [2] * 2, {1}, False),  # a fifth
    ],
)
def test_a_net_that_knows_one_class_alone_is_warned_of(masked, said, is_warned):
    class Crops:
        def __len__(self):
            return len(masked)

        def get(self, index, epoch):
            mask = np.zeros((8, 8), np.uint8)
            mask[:4] = masked[index]
            return {"images": np.zeros((8, 8, 3), np.uint8), "masks": mask}

    class Net(torch.nn.Module):
        def forward(self, images):
            logits = torch.zeros(len(images), 3, 8, 8)
            logits[:, 0, 4:] = 1
            for place, class_index in enumerate(sorted(said)):
                logits[:, class_index, place] = 1
            return logits

    progress = SilentProgress()
    warn_of_collapse(Net(), Crops(), Runtime(device="cpu"), progress, ["background", "red", "green"])
    assert [text.partition("; ")[0] for text in progress.warnings] == (
        [
            f"the segmenter predicts no class but red on {len(masked)} training crops, and the masks of "
            f"{masked.count(2)} of them hold others"
        ]
        if is_warned
        else []
    )


def test_imagenet_init_of_a_net_without_public_weights_is_refused_by_the_config():
    with pytest.raises(ValueError, match="small has no public weights"):
        make_config(init="imagenet")


@pytest.mark.parametrize("init", ["random", "classifier"])
def test_only_imagenet_weights_can_be_decimated(init):
    net = {"name": "largefov", "backbone": {"name": "vgg16", "output_stride": 8}, "fc_init": "decimated"}
    with pytest.raises(ValueError, match=f"init: {init} has no fc6 and fc7"):
        make_config(init=init, net=net)
    assert make_config(init="imagenet", net=net).net.fc_init == "decimated"


def test_a_pseudo_mask_that_does_not_read_is_damaged(folders, tmp_path):
    for path in (folders[1] / "masks").iterdir():
        path.write_bytes(b"no mask")
    with pytest.raises(DamagedFileError, match=r"img\d\.png: not a readable mask .*; rebuild make_masks"):
        run(folders, tmp_path / "out")


def test_pooled_nets_need_two_images_a_batch(folders, tmp_path):
    net = {"name": "deeplabv3plus", "encoder": "resnet18"}
    training = TrainingConfig(steps=1, batch_size=2, learning_rate=0.01)
    with pytest.raises(ValueError, match=r"deeplabv3plus needs a training\.batch_size of at least 2"):
        make_config(net=net, training=training.model_copy(update={"batch_size": 1}))
    for number in range(3):
        (folders[1] / "masks" / f"img{number}.png").unlink()
    with pytest.raises(DataError, match="deeplabv3plus needs at least 2 training images with a mask, found 1"):
        run(folders, tmp_path / "out", make_config(net=net, training=training))


def test_fewer_images_than_a_batch_leave_each_pass_of_a_pooled_net_two(folders, tmp_path):
    net = {"name": "deeplabv3plus", "encoder": "resnet18"}
    training = TrainingConfig(steps=1, batch_size=8, learning_rate=0.01, accumulate_steps=3)
    with pytest.raises(DataError, match="deeplabv3plus needs at least 6 training images with a mask, found 4"):
        run(folders, tmp_path / "out", make_config(net=net, training=training))


# -- held-out images --------------------------------------------------------------------------------------------------

WATCHED = {"validation": {"every_steps": 2, "ratio": 0.5}}


def test_the_curve_the_held_out_images_and_both_weights_are_written(folders, tmp_path):
    run(folders, tmp_path / "out", make_config(steps=5, **WATCHED))
    names = {path.name for path in (tmp_path / "out").iterdir()}
    assert {"validation.json", "best.safetensors", "segmenter.safetensors"} <= names
    assert not names & {"last.safetensors", "checkpoint.pt"}
    document = read_json(tmp_path / "out" / "validation.json")
    assert document["compared_with"] == "pseudo-masks"
    assert [look["step"] for look in document["curve"]] == [2, 4, 5]
    assert all(0 <= value <= 1 for look in document["curve"] for name, value in look.items() if name != "step")
    scores = {look["step"]: look["miou"] for look in document["curve"]}
    assert scores[document["best_step"]] == max(scores.values())
    assert 1 <= len(document["held_out"]) <= 3


def test_held_out_images_are_not_trained_on(folders, tmp_path):
    config = make_config(steps=4, **WATCHED)
    run(folders, tmp_path / "one", config)
    (held_out,) = read_json(tmp_path / "one" / "validation.json")["held_out"][:1]
    path = folders[1] / "masks" / f"{held_out}.png"
    write_index_mask(path, np.where(read_index_mask(path) == 255, 255, 0).astype(np.uint8))
    run(folders, tmp_path / "two", config)
    weights, curves = (
        [digests(tmp_path / name)[file] for name in ("one", "two")]
        for file in ("segmenter.safetensors", "validation.json")
    )
    assert weights[0] == weights[1]
    assert curves[0] != curves[1]


def test_the_score_is_that_of_the_delivered_net(folders, tmp_path):
    """Counted pixel by pixel, against the pseudo-masks of the held-out images at their own size."""
    config = make_config(
        steps=80,
        training=TrainingConfig(steps=80, batch_size=2, learning_rate=0.02),
        validation={"every_steps": 40, "ratio": 0.5, "keep": "best"},
    )
    run(folders, tmp_path / "out", config)
    document = read_json(tmp_path / "out" / "validation.json")
    best = max(look["miou"] for look in document["curve"])
    segmenter = load_segmenter(tmp_path / "out", "cpu")
    counts = np.zeros((3, 3), np.int64)
    for name in document["held_out"]:
        image = np.asarray(Image.open(folders[0] / "data" / f"{name}.png"))
        with torch.inference_mode():
            logits = segmenter(to_network_input(torch.from_numpy(image[None].copy()), torch.device("cpu")))
            logits = torch.nn.functional.interpolate(logits, size=SIZE, mode="bilinear")
        truth, prediction = read_index_mask(folders[1] / "masks" / f"{name}.png"), logits.argmax(1)[0].numpy()
        for row in range(3):
            for column in range(3):
                counts[row, column] += ((truth == row) & (prediction == column)).sum()
    ious = [
        counts[i, i] / (counts[i].sum() + counts[:, i].sum() - counts[i, i])
        for i in range(3)
        if counts[i].sum() + counts[:, i].sum()
    ]
    assert best == pytest.approx(np.mean(ious), abs=1e-6)
    assert counts[:, 1:].sum() > 0, "a net that says background everywhere shows little"
    assert (tmp_path / "out" / "last.safetensors").exists()


@pytest.mark.parametrize("keep", ["last", "best"])
def test_killed_between_two_looks_it_ends_with_the_same_files(folders, tmp_path, keep, monkeypatch):
    config = make_config(
        training=TrainingConfig(steps=5, batch_size=2, learning_rate=0.05, ema_decay=0.5, accumulate_steps=2),
        validation={"every_steps": 2, "ratio": 0.5, "keep": keep},
    )
    run(folders, tmp_path / "whole", config)
    from stages.ops import losses

    original, calls = losses.segmentation_cross_entropy, []

    def killing(logits, masks):
        calls.append(1)
        if len(calls) == 6:  # the second pass of the third step
            raise KeyboardInterrupt
        return original(logits, masks)

    with monkeypatch.context() as patch:
        patch.setattr(losses, "segmentation_cross_entropy", killing)
        with pytest.raises(KeyboardInterrupt):
            run(folders, tmp_path / "killed", config)
    run(folders, tmp_path / "killed", config)
    assert digests(tmp_path / "killed") == digests(tmp_path / "whole")


def test_looking_at_no_held_out_image_changes_no_step(folders, tmp_path):
    """The same images trained on, looked at or not: the same weights."""
    config = make_config(steps=4, **WATCHED)
    run(folders, tmp_path / "watched", config)
    for name in read_json(tmp_path / "watched" / "validation.json")["held_out"]:
        (folders[1] / "masks" / f"{name}.png").unlink()
    run(folders, tmp_path / "plain", make_config(steps=4))
    files = [digests(tmp_path / name)["segmenter.safetensors"] for name in ("watched", "plain")]
    assert files[0] == files[1]


def background_only(self, images):
    logits = torch.zeros(len(images), 3, 8, 8)
    logits[:, 0] = 1 + 0 * self.classifier.bias.sum()
    return logits


def test_a_net_that_stays_at_background_is_stopped_with_the_reason(folders, tmp_path, monkeypatch):
    from stages.nets.segmenters.largefov import LargeFov

    monkeypatch.setattr(LargeFov, "forward", background_only)
    watched = {"every_steps": 2, "ratio": 0.5, "collapse_after": 2}
    reason = r"stopped at step 4: the segmenter says background everywhere on \d held-out images, at 2 looks in a row"
    with pytest.raises(InputError, match=reason) as caught:
        run(folders, tmp_path / "out", make_config(steps=20, validation=watched))
    assert "lower training.learning_rate, use loss: balanced_cross_entropy" in caught.value.message
    run(folders, tmp_path / "all", make_config(steps=8, validation={**watched, "collapse_after": None}))
    run(folders, tmp_path / "few", make_config(steps=8, validation={**watched, "collapse_after": 5}))


def test_masks_without_objects_are_no_collapse(folders, tmp_path, monkeypatch):
    from stages.nets.segmenters.largefov import LargeFov

    monkeypatch.setattr(LargeFov, "forward", background_only)
    for path in (folders[1] / "masks").iterdir():
        write_index_mask(path, np.zeros(SIZE, np.uint8))
    run(folders, tmp_path, make_config(steps=4, validation={"every_steps": 1, "ratio": 0.5, "collapse_after": 1}))


def test_held_out_masks_without_a_labelled_pixel_show_nothing(folders, tmp_path):
    config = make_config(**WATCHED)
    run(folders, tmp_path / "one", config)
    for name in read_json(tmp_path / "one" / "validation.json")["held_out"]:
        write_index_mask(folders[1] / "masks" / f"{name}.png", np.full(SIZE, 255, np.uint8))
    run(folders, tmp_path / "two", config)
    for look in read_json(tmp_path / "two" / "validation.json")["curve"]:
        assert {value for name, value in look.items() if name != "step"} == {0}


def test_the_delivered_net_is_looked_at_for_a_collapse(folders, tmp_path, monkeypatch):
    import stages.train_segmenter as stage

    seen = []
    monkeypatch.setattr(
        stage, "warn_of_collapse", lambda net, *_: seen.append({k: v.clone() for k, v in net.state_dict().items()})
    )
    # steps this long spoil the net: the best look is the first
    training = TrainingConfig(steps=6, batch_size=2, learning_rate=3.0)
    validation = {"every_steps": 1, "ratio": 0.5, "keep": "best", "collapse_after": None}
    run(folders, tmp_path, make_config(training=training, validation=validation))
    assert read_json(tmp_path / "validation.json")["best_step"] < 6
    for name, value in load_segmenter(tmp_path, "cpu").state_dict().items():
        assert torch.equal(value, seen[0][name]), name


def test_full_supervision_is_held_out_and_recorded_too(folders, tmp_path):
    result = run((folders[0], None), tmp_path / "out", make_config(supervision="full", **WATCHED))
    assert result.mask_supervision == ("img0", "img1", "img2", "img3")
    assert read_json(tmp_path / "out" / "validation.json")["compared_with"] == "true masks"


def test_one_image_cannot_be_held_out(folders, tmp_path):
    for number in range(3):
        (folders[1] / "masks" / f"img{number}.png").unlink()
    with pytest.raises(
        DataError, match="validation holds out a share of the images with a mask, of which there is only"
    ):
        run(folders, tmp_path, make_config(training=TrainingConfig(steps=1, batch_size=1), **WATCHED))


@pytest.mark.parametrize(
    ("sizes", "named"),
    [
        ({"short_side_px": 36}, r" of 40 × 48 pixels, seen at 36 × 43, which .* smaller augment\.short_side_px"),
        ({}, r" of 40 × 48 pixels, which .* set validation: null"),
    ],
    ids=["resized", "own size"],
)
@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB"),
        RuntimeError("[enforce fail at alloc_cpu.cpp:121] DefaultCPUAllocator: can't allocate memory: 20 bytes"),
    ],
    ids=["cuda", "cpu"],
)
def test_a_held_out_image_larger_than_memory_is_named_and_no_batch_is_blamed(
    folders, tmp_path, monkeypatch, error, sizes, named
):
    def predict_logits(*arguments, **options):
        raise error

    monkeypatch.setattr("stages.ops.multi_scale.predict_logits", predict_logits)
    config = make_config(augment={"crop_px": 32, "scale": [0.8, 1.2], **sizes}, **WATCHED)
    with pytest.raises(
        EnvironmentFailure, match=r"^cpu is out of memory for the held-out image 'img\d'" + named
    ) as found:
        run(folders, tmp_path, config)
    assert "batch_size" not in str(found.value)


# -- passes, scales ---------------------------------------------------------------------------------------------------


def test_each_pass_of_a_pooled_net_needs_two_images():
    net = {"name": "deeplabv3plus", "encoder": "resnet18"}
    training = TrainingConfig(steps=1, batch_size=4, learning_rate=0.01, accumulate_steps=4)
    with pytest.raises(ValueError, match=r"at least 2 in each pass of training\.accumulate_steps"):
        make_config(net=net, training=training)
    assert make_config(net=net, training=training.model_copy(update={"accumulate_steps": 2})).max_devices == 2


@pytest.mark.parametrize("resolution", ["pixels", "cells"])
def test_every_scale_of_deeplab_v2_has_a_loss(folders, tmp_path, resolution):
    from stages.ops.losses import segmentation_cross_entropy
    from stages.training.segmenter_objective import LossConfig, SegmenterObjective

    torch.manual_seed(0)
    config = make_config(net={"name": "deeplabv2", "backbone": {"name": "small"}})
    segmenter = build_segmenter(config.net, 3, init="random", weights={})
    masks = torch.randint(0, 3, (2, 32, 32), dtype=torch.uint8)
    masks[0, :9] = 255
    images = torch.randn(2, 3, 32, 32)
    segmenter.eval()
    found = SegmenterObjective(LossConfig(loss_resolution=resolution))(
        segmenter, {"images": images, "masks": masks}, None
    )
    views = segmenter.training_logits(images)
    assert len(views) == 4
    expected = sum(segmentation_cross_entropy(*match_sizes(view, masks, resolution)) for view in views)
    torch.testing.assert_close(found["loss"], expected)
    run(folders, tmp_path, config)
    assert read_json(tmp_path / "history.json")[0]["loss"] > 2, "four losses of about ln 3"
