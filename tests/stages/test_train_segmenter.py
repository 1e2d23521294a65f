"""The segmenter's stage: what it trains on, what it writes, exact resume, and its refusals."""

from __future__ import annotations

import hashlib
import json
import shutil

import numpy as np
import pytest
import torch
from PIL import Image

from stages.contracts import (
    ClassList,
    ImageIndex,
    ImageRecord,
    Runtime,
    SilentProgress,
    read_index_mask,
    read_json,
    write_index_mask,
    write_json,
)
from stages.data.transforms import AugmentConfig
from stages.errors import DamagedFileError, DataError, MissingArtifactError
from stages.nets.trained import load_segmenter
from stages.soft_masks import write_confidence
from stages.train_segmenter import TrainSegmenterConfig, match_sizes, train_segmenter
from stages.training import TrainingConfig

SIZE = (40, 48)
NAMES = ("red", "green")


def paint(label: int, number: int):
    """A square of the class's colour on grey noise, and its mask."""
    random = np.random.default_rng(number)
    image = random.integers(90, 120, (*SIZE, 3), dtype=np.uint8)
    mask = np.zeros(SIZE, np.uint8)
    top, left = random.integers(0, 16, 2)
    mask[top : top + 22, left : left + 22] = label + 1
    image[mask > 0, label] = 250
    return image, mask


@pytest.fixture
def folders(tmp_path):
    """prepare_data's and make_masks' output for four training images."""
    images, masks = tmp_path / "images", tmp_path / "masks"
    records = []
    for number in range(4):
        label = number % 2
        image, mask = paint(label, number)
        name = f"img{number}"
        (images / "data").mkdir(parents=True, exist_ok=True)
        Image.fromarray(image).save(images / "data" / f"{name}.png")
        write_index_mask(images / "data" / f"{name}-mask.png", mask)
        unsure = mask.copy()
        unsure[:2] = 255
        write_index_mask(masks / "masks" / f"{name}.png", unsure)
        records.append(
            ImageRecord(id=name, image=f"{name}.png", size=SIZE, labels=(label,), full_mask=f"{name}-mask.png")
        )
    index = ImageIndex(
        classes=ClassList(names=NAMES),
        images=tuple(records),
        splits={"train": tuple(r.id for r in records)},
        mask_values={0: 0, 1: 1, 2: 2, 255: 255},
    )
    write_json(images / "index.json", index.model_dump(mode="json"))
    return images, masks


def make_config(steps=3, **changes) -> TrainSegmenterConfig:
    values = {
        "init": "random",
        "net": {"name": "largefov", "backbone": {"name": "small", "output_stride": 4}, "channels": 16},
        "augment": AugmentConfig(crop_px=32, scale=(0.8, 1.2)),
        "training": TrainingConfig(steps=steps, batch_size=2, learning_rate=0.01),
    }
    return TrainSegmenterConfig.model_validate({**values, **changes})


def run(folders, out, config=None, *, progress=None, workers=0, **changes):
    images, masks = folders
    arguments = {
        "images": images,
        "masks": masks,
        "classifier": None,
        "data_root": None,
        "weights": {},
        "seed": 1,
        "out": out,
        "progress": progress or SilentProgress(),
        "runtime": Runtime(device="cpu", threads=1, workers=workers, checkpoint_every_s=0),
    }
    return train_segmenter(config or make_config(), **{**arguments, **changes})


def digests(folder):
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in folder.iterdir()}


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


def test_another_seed_or_loss_gives_another_net(folders, tmp_path):
    run(folders, tmp_path / "a")
    run(folders, tmp_path / "b", seed=2)
    run(folders, tmp_path / "c", make_config(loss="balanced_cross_entropy"))
    run(folders, tmp_path / "d", make_config(loss_resolution="cells"))
    weights = {digests(tmp_path / name)["segmenter.safetensors"] for name in "abcd"}
    assert len(weights) == 4


def test_the_classifier_gives_its_backbone(folders, tmp_path):
    from stages.methods.cam import CamConfig
    from stages.methods.trained import ClassifierDescription, build_classifier, save_classifier
    from stages.nets.backbones import BackboneConfig

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
@pytest.mark.parametrize("mask", [np.zeros((40, 47), np.uint8), np.full(SIZE, 3, np.uint8)], ids=["size", "value"])
def test_a_pseudo_mask_that_does_not_fit_is_named(folders, tmp_path, mask, workers):
    for number in range(4):
        write_index_mask(folders[1] / "masks" / f"img{number}.png", mask)
    with pytest.raises(DamagedFileError, match=r"img\d.png: expected \(40, 48\) pixels of values below 3 or 255"):
        run(folders, tmp_path / "out", workers=workers)


def test_masks_without_objects_are_warned_of(folders, tmp_path):
    for number in range(4):
        write_index_mask(folders[1] / "masks" / f"img{number}.png", np.zeros(SIZE, np.uint8))
    progress = SilentProgress()
    run(folders, tmp_path / "out", progress=progress)
    assert "hold no object pixel" in progress.warnings[-1]


def test_a_collapsed_net_is_warned_of(folders, tmp_path, monkeypatch):
    from stages.nets.largefov import LargeFov

    def background_only(self, images):
        logits = torch.zeros(len(images), 3, 8, 8)
        logits[:, 0] = 1 + 0 * self.classifier.bias.sum()
        return logits

    monkeypatch.setattr(LargeFov, "forward", background_only)
    progress = SilentProgress()
    run(folders, tmp_path / "out", progress=progress)
    assert "predicts only background on 4 training crops" in progress.warnings[-1]


def test_imagenet_init_of_a_net_without_public_weights_is_refused_by_the_config():
    with pytest.raises(ValueError, match="small has no public weights"):
        make_config(init="imagenet")


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
