import pickle

import numpy as np
import pytest
import torch
from PIL import Image
from pydantic import ValidationError

from stages.contracts import (
    ClassList,
    ImageIndex,
    ImageRecord,
    Runtime,
    SilentProgress,
    open_image_set,
    read_json,
    write_index_mask,
    write_json,
)
from stages.data.transforms import AugmentConfig, Augmenter
from stages.errors import ConfigError, DataError, WeightsError
from stages.methods.cam import Cam, CamConfig
from stages.methods.classifier_files import load_classifier
from stages.methods.gain import GainConfig, GainExtConfig
from stages.methods.gradcam import GradCamConfig
from stages.methods.recam import RecamConfig
from stages.nets.backbones.config import BackboneConfig
from stages.nets.weights import read_tensors
from stages.scoring.label_scores import predict_logits
from stages.train_classifier import LabelledImages, TrainClassifierConfig, train_classifier
from stages.training.config import TrainingConfig
from tests.stages.methods.tiny_data import LABELS, SIZES, write_tiny_data

RUNTIME = Runtime(device="cpu", workers=0, threads=1, checkpoint_every_s=0)


def _config(method=None, *, backbone=None, head="gap", **training):
    options = {"steps": 4, "batch_size": 2, "learning_rate": 0.01, **training}
    return TrainClassifierConfig(
        backbone=backbone or BackboneConfig(name="small"),
        head=head,
        method=method or CamConfig(),
        augment=AugmentConfig(crop_px=32, scale=(0.8, 1.2)),
        training=TrainingConfig(**options),
    )


def _train(data, out, *, config=None, progress=None, seed=0, runtime=RUNTIME, weights=None):
    return train_classifier(
        config or _config(),
        images=data,
        data_root=None,
        weights=weights or {},
        seed=seed,
        out=out,
        progress=progress or SilentProgress(),
        runtime=runtime,
    )


class Recorder(SilentProgress):
    """Keeps what was said."""

    def __init__(self):
        super().__init__()
        self.begun, self.lines = [], []

    def step(self, task, done, total, *, unit="images", **values):
        if not self.begun or self.begun[-1][0] != task:
            self.begun.append((task, total, done, unit))

    def info(self, text):
        self.lines.append(text)


def test_writes_a_classifier_that_loads_and_its_history(tmp_path):
    data = write_tiny_data(tmp_path, val=2)
    result = _train(data, tmp_path / "out")
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == [
        "classifier.json",
        "classifier.safetensors",
        "history.json",
    ]
    history = read_json(tmp_path / "out" / "history.json")
    assert [entry["step"] for entry in history] == [1, 2, 3, 4]
    assert all({"step", "epoch", "learning_rate", "loss"} <= entry.keys() for entry in history)
    assert (result.metrics, result.mask_supervision) == ({}, ()), "evaluate scores it on val"
    load_classifier(tmp_path / "out", torch.device("cpu"))


def test_learns_colours(tmp_path):
    sizes, labels = [(32, 32)] * 12, [(0,), (1,), (2,)] * 4
    data = write_tiny_data(tmp_path, sizes=sizes, labels=labels, holdout=3)
    config = _config(steps=60, batch_size=9, learning_rate=0.05)
    result = _train(data, tmp_path / "out", config=config)
    history = read_json(tmp_path / "out" / "history.json")
    assert history[-1]["loss"] < 0.5 * history[0]["loss"]
    assert result.metrics["classifier.map"] == 1.0


def write_birds(folder, num_classes=40, per_class=8):
    """Plain pictures of 40 colours, six to train on and two held out of each; the format says one label an image."""
    root = folder / "prepared"
    (root / "data").mkdir(parents=True)
    generator = np.random.default_rng(0)
    colours = [(r, g, b) for r in (30, 130, 230) for g in (30, 100, 170, 240) for b in (20, 90, 160, 240)]
    records, holdout = [], []
    for number in range(num_classes * per_class):
        label = number % num_classes
        pixels = np.clip(colours[label] + generator.integers(-12, 13, (32, 32, 3)), 0, 255).astype(np.uint8)
        Image.fromarray(pixels).save(root / "data" / f"{number}.png")
        records.append(ImageRecord(id=str(number), image=f"{number}.png", size=(32, 32), labels=(label,)))
        if number >= num_classes * (per_class - 2):
            holdout.append(str(number))
    index = ImageIndex(
        classes=ClassList(names=tuple(f"bird {label}" for label in range(num_classes))),
        images=tuple(records),
        splits={"train": tuple(record.id for record in records), "holdout": tuple(holdout), "val": ()},
        mask_values={},
        is_single_label=True,
    )
    write_json(root / "index.json", index.model_dump(mode="json"))
    return root


def test_many_classes_of_one_label_are_learnt_by_a_softmax_where_sigmoids_learn_little(tmp_path):
    data = write_birds(tmp_path)
    training = {"steps": 60, "batch_size": 40, "learning_rate": 0.02}
    own = _train(data, tmp_path / "own", config=_config(**training))
    assert read_json(tmp_path / "own" / "classifier.json")["loss"] == "cross_entropy"
    assert own.metrics["classifier.top1_accuracy"] > 0.9
    assert own.metrics["classifier.map"] > 0.9
    sigmoids = _config(**training).model_copy(update={"loss": "multilabel_soft_margin"})
    other = _train(data, tmp_path / "other", config=sigmoids)
    assert "classifier.top1_accuracy" not in other.metrics
    assert other.metrics["classifier.map"] < 0.5


def test_the_loss_follows_from_the_format_and_is_in_the_key_where_it_is_a_softmax():
    config = _config()
    assert config.resolved_loss(is_single_label=False) == "multilabel_soft_margin"
    assert config.resolved_loss(is_single_label=True) == "cross_entropy"
    given = config.model_copy(update={"loss": "multilabel_soft_margin"})
    assert given.resolved_loss(is_single_label=True) == "multilabel_soft_margin"
    assert "loss" not in config.key_content(None)
    assert given.key_content(None) == config.key_content(None)
    softmax = config.model_copy(update={"loss": "cross_entropy"})
    assert softmax.key_content(None) == config.key_content(None) | {"loss": "cross_entropy"}


def test_a_softmax_over_images_of_several_labels_is_refused(tmp_path):
    config = _config().model_copy(update={"loss": "cross_entropy"})
    with pytest.raises(ConfigError) as caught:
        _train(write_tiny_data(tmp_path), tmp_path / "out", config=config)
    assert str(caught.value) == (
        "loss: cross_entropy expects exactly one label on each training image, found another number on 3 of 6 "
        "('image1', 'image2', 'image5'); take loss: multilabel_soft_margin, or leave these images out of the train list"
    )
    assert not (tmp_path / "out").exists()


def test_two_trainings_give_equal_bytes_and_another_seed_does_not(tmp_path):
    data = write_tiny_data(tmp_path)
    for name, seed, workers in (("a", 0, 0), ("b", 0, 2), ("c", 1, 0)):
        _train(data, tmp_path / name, seed=seed, runtime=Runtime(device="cpu", workers=workers, threads=1))
    a, b, c = ((tmp_path / name / "classifier.safetensors").read_bytes() for name in "abc")
    assert a == b
    assert a != c


@pytest.mark.parametrize("stop", [2, 4], ids=["before a judge is taken", "after"])
@pytest.mark.parametrize(
    "method",
    [CamConfig(), GainConfig(am_warmup_epochs=1), RecamConfig(softmax_warmup_epochs=1)],
    ids=lambda method: method.name,
)
def test_an_interrupted_training_ends_with_the_same_bytes(tmp_path, monkeypatch, method, stop):
    data, config = write_tiny_data(tmp_path, holdout=1), _config(method, steps=6)
    _train(data, tmp_path / "whole", config=config)
    kind = type(method.build())
    objective = kind.objective

    def stop_at_a_step(self, classifier, images, labels, step, *, masks=None):
        if step.step == stop:
            raise KeyboardInterrupt
        return objective(self, classifier, images, labels, step)

    with monkeypatch.context() as patch:
        patch.setattr(kind, "objective", stop_at_a_step)
        with pytest.raises(KeyboardInterrupt):
            _train(data, tmp_path / "cut", config=config)
    assert not (tmp_path / "cut" / "classifier.json").exists()
    progress = Recorder()
    _train(data, tmp_path / "cut", config=config, progress=progress)
    assert progress.begun[0] == ("train classifier", 6, stop, "steps")
    for name in ("classifier.safetensors", "classifier.json", "history.json"):
        assert (tmp_path / "cut" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()


def test_the_hold_out_is_not_trained_on_and_scores(tmp_path, monkeypatch):
    import stages.train_classifier as stage

    seen = []
    train = stage.train
    monkeypatch.setattr(
        stage, "train", lambda *args, **o: seen.extend(r.id for r in o["dataset"].records) or train(*args, **o)
    )
    data = write_tiny_data(tmp_path, val=1, val_labels=False, holdout=2)
    progress = Recorder()
    result = _train(data, tmp_path / "out", progress=progress)
    assert seen == ["image2", "image3", "image4"]
    assert progress.begun[-1] == ("classifier on holdout", 2, 0, "images")
    assert set(result.metrics) == {"classifier.map", "classifier.label_accuracy"}


def test_unlabelled_training_images_are_all_named(tmp_path):
    data = write_tiny_data(tmp_path, labels=[(0,), None, (1,), None, (2,), (0,)])
    with pytest.raises(DataError) as caught:
        _train(data, tmp_path / "out")
    assert [problem.split("'")[1] for problem in caught.value.problems] == ["image1", "image3"]


def test_nothing_left_to_train_on(tmp_path):
    with pytest.raises(DataError, match="besides its hold-out"):
        _train(write_tiny_data(tmp_path, holdout=6), tmp_path / "out")


def test_samples_are_a_pure_function_of_seed_epoch_and_index(tmp_path):
    image_set = open_image_set(write_tiny_data(tmp_path), None)
    data = LabelledImages(image_set, image_set.index.split("train"), Augmenter(AugmentConfig(crop_px=32)), seed=5)
    assert len(data) == 6
    sample = data.get(1, 0)
    assert sample.keys() == {"images", "labels"}
    assert (sample["images"].shape, sample["images"].dtype) == ((32, 32, 3), np.uint8)
    assert (sample["labels"].tolist(), sample["labels"].dtype) == ([0.0, 1.0, 1.0], np.float32)
    data.get(0, 0)
    sent = pickle.loads(pickle.dumps(data))  # noqa: S301 - as a worker process gets it
    np.testing.assert_array_equal(sent.get(1, 0)["images"], sample["images"])
    assert (data.get(1, 1)["images"] != sample["images"]).any()


def test_logits_do_not_depend_on_batches_and_follow_the_short_side(tmp_path):
    data = write_tiny_data(tmp_path, val=3)
    _train(data, tmp_path / "out")
    image_set = open_image_set(data, None)
    classifier, _ = load_classifier(tmp_path / "out", torch.device("cpu"))
    records = image_set.index.split("train")
    together = predict_logits(classifier, image_set, records, 24, SilentProgress(), RUNTIME)
    alone = [predict_logits(classifier, image_set, [record], 24, SilentProgress(), RUNTIME)[0] for record in records]
    np.testing.assert_allclose(together, np.stack(alone), rtol=1e-4, atol=1e-6)
    full = predict_logits(classifier, image_set, records, None, SilentProgress(), RUNTIME)
    assert (
        np.abs(full[1] - together[1]).max() < 1e-6 < np.abs(full[2] - together[2]).max()
    )  # 40×24 stays, 33×47 shrinks


class PixelCam(Cam):
    """CAM that wants to see its masks, as GAIN_ext does."""

    def __init__(self):
        self.masks = []

    def objective(self, classifier, images, labels, step, *, masks=None):
        self.masks.append(masks)
        return {**super().objective(classifier, images, labels, step), "seen": masks.float().mean()}


class PixelCamConfig(CamConfig):
    """Reads the masks of the second training image."""

    def build(self):
        return METHOD

    def pixel_labelled(self, candidates):
        return (candidates[1].id,)


METHOD = PixelCam()


def test_a_method_gets_the_masks_it_names_and_only_those_and_they_are_recorded(tmp_path):
    data = write_tiny_data(tmp_path, sizes=SIZES[:3], labels=LABELS[:3])
    write_index_mask(data / "data" / "no-such-mask1.png", np.ones(SIZES[1], dtype=np.uint8))
    config = _config(PixelCamConfig(), batch_size=3, steps=2)
    result = _train(data, tmp_path / "out", config=config)
    assert result.mask_supervision == ("image1",)
    for masks in METHOD.masks:
        assert masks.shape == (3, 32, 32)
        assert sorted(int(mask.min()) for mask in masks) == [1, 255, 255]
    assert "seen" in read_json(tmp_path / "out" / "history.json")[0]


# -- another head -----------------------------------------------------------------------------------------------------

VGG16 = BackboneConfig(name="vgg16", output_stride=16, pretrained=False)


def test_a_head_that_backbone_or_method_cannot_have_is_refused():
    with pytest.raises(ValidationError, match="which squeezenet1_1 does not have; use backbone"):
        _config(GradCamConfig(), backbone=BackboneConfig(name="squeezenet1_1"), head="fc")
    refusal = "cam reads class score maps, which head: fc does not have; use gradcam or head: gap"
    with pytest.raises(ValidationError, match=refusal):
        _config(backbone=VGG16, head="fc")
    assert _config(GradCamConfig(), backbone=VGG16, head="fc").head == "fc"


def test_vgg16_trains_with_its_own_head_and_says_so_on_disk(tmp_path, monkeypatch):
    monkeypatch.setattr("stages.nets.heads.FC_CHANNELS", 8)
    data = write_tiny_data(tmp_path)
    for name in "ab":
        _train(data, tmp_path / name, config=_config(GradCamConfig(), backbone=VGG16, head="fc", steps=2))
    assert read_json(tmp_path / "a" / "classifier.json")["head"] == "fc"
    a, b = ((tmp_path / name / "classifier.safetensors").read_bytes() for name in "ab")
    assert a == b, "dropout draws from the seed of the step"
    classifier, _ = load_classifier(tmp_path / "a", torch.device("cpu"))
    assert classifier(torch.randn(1, 3, 48, 80)).logits.shape == (1, 3)


# -- a trained classifier to go on from -------------------------------------------------------------------------------


class ExtraCam(Cam):
    """CAM with a layer of its own."""

    def prepare(self, classifier):
        classifier.extra = torch.nn.Linear(2, 2)

    def objective(self, classifier, images, labels, step, *, masks=None):
        losses = super().objective(classifier, images, labels, step, masks=masks)
        return {"loss": losses["loss"] + classifier.extra(torch.ones(1, 2)).sum() ** 2}


class ExtraCamConfig(CamConfig):
    """Builds ExtraCam."""

    def build(self):
        return ExtraCam()


@pytest.fixture
def starts(monkeypatch):
    """The tensors that each training began with."""
    import stages.train_classifier as stage

    train, found = stage.train, []

    def keep(classifier, **options):
        found.append({name: value.clone() for name, value in classifier.state_dict().items()})
        return train(classifier, **options)

    monkeypatch.setattr(stage, "train", keep)
    return found


def test_a_training_goes_on_from_a_trained_classifier_and_a_line_says_so(tmp_path, starts):
    data, progress = write_tiny_data(tmp_path), Recorder()
    _train(data, tmp_path / "first", config=_config(ExtraCamConfig()))
    file = tmp_path / "first" / "classifier.safetensors"
    _train(data, tmp_path / "second", progress=progress, seed=5, weights={"classifier": file})
    trained = read_tensors(file)
    assert starts[1].keys() == {name for name in trained if not name.startswith("extra.")}
    assert all(torch.equal(value, trained[name]) for name, value in starts[1].items())
    line = f"weights.classifier from classifier.safetensors: {len(starts[1])} tensors loaded"
    assert f"{line}, 2 not used (extra.bias, extra.weight)" in progress.lines


def test_layers_that_only_the_new_method_has_start_fresh(tmp_path, starts):
    data, progress = write_tiny_data(tmp_path), Recorder()
    _train(data, tmp_path / "first")
    file = tmp_path / "first" / "classifier.safetensors"
    _train(data, tmp_path / "second", config=_config(ExtraCamConfig()), progress=progress, weights={"classifier": file})
    trained = read_tensors(file)
    assert set(starts[1]) - set(trained) == {"extra.weight", "extra.bias"}
    assert all(torch.equal(starts[1][name], value) for name, value in trained.items())
    assert any("2 start fresh (extra.weight, extra.bias)" in line for line in progress.lines)


def test_no_public_weights_are_read_when_a_trained_classifier_replaces_them(tmp_path, starts, monkeypatch):
    monkeypatch.setattr("stages.nets.heads.FC_CHANNELS", 8)
    monkeypatch.setattr("stages.nets.heads.load_vgg16", None)  # would be called with a TypeError
    data = write_tiny_data(tmp_path)
    _train(data, tmp_path / "first", config=_config(GradCamConfig(), backbone=VGG16, head="fc", steps=1))
    file = tmp_path / "first" / "classifier.safetensors"
    public = BackboneConfig(name="vgg16", output_stride=16)
    config = _config(GradCamConfig(), backbone=public, head="fc", steps=1)
    _train(data, tmp_path / "second", config=config, weights={"classifier": file})
    assert all(torch.equal(starts[1][name], value) for name, value in read_tensors(file).items())
    assert read_json(tmp_path / "second" / "classifier.json")["backbone"]["pretrained"] is True


def test_a_classifier_of_other_classes_is_refused_by_their_names(tmp_path):
    data = write_tiny_data(tmp_path)
    _train(data, tmp_path / "first", config=_config(steps=1))
    described = read_json(tmp_path / "first" / "classifier.json")
    described["classes"]["names"] = ["red", "blue", "green"]
    write_json(tmp_path / "first" / "classifier.json", described)
    weights = {"classifier": tmp_path / "first" / "classifier.safetensors"}
    with pytest.raises(
        WeightsError, match="is a classifier of red, blue, green, and the data set's classes are red, gre"
    ):
        _train(data, tmp_path / "second", weights=weights)


def test_a_frozen_judge_needs_a_warm_up_or_a_start(tmp_path):
    data, config = write_tiny_data(tmp_path), _config(GainConfig(am_warmup_epochs=0))
    with pytest.raises(ConfigError, match=r"set method\.am_warmup_epochs .*, or weights\.classifier"):
        _train(data, tmp_path / "out", config=config)
    assert not (tmp_path / "out").exists(), "refused before the training"
    _train(data, tmp_path / "first")
    _train(data, tmp_path / "out", config=config, weights={"classifier": tmp_path / "first" / "classifier.safetensors"})
    assert all(record["mining"] > 0 for record in read_json(tmp_path / "out" / "history.json"))


def test_a_warm_up_as_long_as_the_training_is_refused():
    with pytest.raises(ValidationError, match=r"warm-up of 5 epochs leaves nothing of training\.epochs 5"):
        _config(GainConfig(am_warmup_epochs=5), steps=None, epochs=5)
    _config(GainConfig(am_warmup_epochs=5, alpha=0), steps=None, epochs=5)
    with pytest.raises(ValidationError, match="warm-up of 6 epochs"):
        _config(GainExtConfig(ext_warmup_epochs=6), steps=None, epochs=5)


def test_a_warm_up_as_long_as_the_training_is_refused_once_its_steps_are_known(tmp_path):
    data = write_tiny_data(tmp_path)  # six images, three steps an epoch
    with pytest.raises(
        ConfigError, match="warm-up of 2 epochs leaves nothing of the training's 6 steps, of which an epo"
    ):
        _train(data, tmp_path / "out", config=_config(GainConfig(am_warmup_epochs=2), steps=6))
    assert not (tmp_path / "out").exists()
    _train(data, tmp_path / "out", config=_config(GainConfig(am_warmup_epochs=2), steps=7))


def test_a_classifier_of_another_net_is_refused_by_its_tensors(tmp_path):
    from safetensors.torch import save_file

    data = write_tiny_data(tmp_path)
    _train(data, tmp_path / "first", config=_config(steps=1))
    tensors = read_tensors(tmp_path / "first" / "classifier.safetensors")
    tensors["head.weight"] = torch.zeros(2, 64, 1, 1)
    tensors["backbone.features.99.weight"] = torch.zeros(1)
    del tensors["backbone.features.0.weight"]
    save_file(tensors, tmp_path / "other.safetensors")
    with pytest.raises(
        WeightsError, match=r"give classifier\.safetensors of a run with the same backbone, head"
    ) as caught:
        _train(data, tmp_path / "second", weights={"classifier": tmp_path / "other.safetensors"})
    assert caught.value.problems == (
        "head.weight: the net has shape (3, 64, 1, 1), the file (2, 64, 1, 1)",
        "backbone.features.0.weight: missing in the file",
        "backbone.features.99.weight: not in the net",
    )
