"""Retraining rounds: what they label and train, what is kept, and that a stopped one goes on."""

from __future__ import annotations

import json
import threading

import numpy as np
import pytest

from stages.contracts import (
    ClassList,
    SilentProgress,
    read_index_mask,
    read_json,
    write_index_mask,
)
from stages.errors import InputError
from stages.training.config import TrainingConfig
from tests.stages.tiny_segmenters import digests, make_config, run, write_folders

STEPS = 10
"""After these the net says more than background."""


@pytest.fixture
def folders(tmp_path):
    return write_folders(tmp_path)


def rounds_config(rounds=1, steps=STEPS, retraining=None, **changes):
    training = TrainingConfig(steps=steps, batch_size=4, learning_rate=0.05)
    values = {"rounds": rounds, "retraining": {"scales": [1.0], **(retraining or {})}, "training": training}
    return make_config(**{"loss": "balanced_cross_entropy", **values, **changes})


def names(folder):
    return {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}


def test_a_round_leaves_its_masks_and_only_the_last_weights(folders, tmp_path):
    run(folders, tmp_path / "out", rounds_config(2))
    masks = {f"rounds/{number}/masks/img{image}.png" for number in (1, 2) for image in range(4)}
    assert names(tmp_path / "out") == masks | {
        *("history.json", "rounds.json", "segmenter.json", "segmenter.safetensors"),
        *("rounds/0/history.json", "rounds/1/history.json", "rounds/1/stats.json", "rounds/2/stats.json"),
    }
    rounds = read_json(tmp_path / "out" / "rounds.json")
    assert [entry["round"] for entry in rounds] == [0, 1, 2]
    assert [entry["masks"] for entry in rounds] == ["make_masks", "rounds/1/masks", "rounds/2/masks"]
    for entry in rounds:
        history = read_json(tmp_path / "out" / entry["history"])
        assert history[-1]["loss"] == entry["last_loss"]
    assert rounds[1]["changed_ratio"] > 0
    assert 0 < rounds[1]["foreground_ratio"] < 1


def test_corrected_masks_stay_as_they_are_in_every_round(folders, tmp_path):
    """The round makes masks of the other images alone, and what it learns of the corrected one is its correction."""
    mask = np.full((40, 48), 255, dtype=np.uint8)
    write_index_mask(tmp_path / "corrected" / "img1.png", mask)
    config = rounds_config(corrected_masks=tmp_path / "corrected")
    assert run(folders, tmp_path / "out", config).mask_supervision == ("img1",)
    found = {path.name for path in (tmp_path / "out" / "rounds" / "1" / "masks").iterdir()}
    assert found == {"img0.png", "img2.png", "img3.png"}
    (folders[1] / "masks" / "img1.png").unlink()
    run(folders, tmp_path / "without", config)
    assert digests(tmp_path / "out") == digests(tmp_path / "without")
    write_index_mask(tmp_path / "corrected" / "img1.png", np.full((40, 48), 2, dtype=np.uint8))
    run(folders, tmp_path / "other", config)
    assert digests(tmp_path / "other") != digests(tmp_path / "out")


def test_the_masks_of_a_round_hold_background_and_the_images_labels_alone(folders, tmp_path):
    """Pseudo-masks with the other class teach the net classes that images do not have; the masks have none of them."""
    for path in (folders[1] / "masks").iterdir():
        mask = read_index_mask(path)
        write_index_mask(path, np.where(np.indices(mask.shape)[1] < 24, mask, (mask == 0) * 2).astype(np.uint8))
    run(folders, tmp_path / "out", rounds_config())
    labels = {
        record["id"]: record["labels"] for record in json.loads((folders[0] / "index.json").read_text())["images"]
    }
    held = set()
    for name, of_image in labels.items():
        mask = read_index_mask(tmp_path / "out" / "rounds" / "1" / "masks" / f"{name}.png")
        assert mask.shape == (40, 48)
        assert set(np.unique(mask).tolist()) <= {0, *(ClassList.class_index(label) for label in of_image)}
        held |= set(np.unique(mask).tolist())
    assert held - {0}


def test_the_masks_are_what_the_first_segmenter_says_of_its_labels(folders, tmp_path):
    import torch
    from PIL import Image

    from stages.data.transforms import to_network_input
    from stages.nets.segmenters.files import load_segmenter

    run(folders, tmp_path / "plain", rounds_config(0))
    run(folders, tmp_path / "out", rounds_config(1))
    segmenter = load_segmenter(tmp_path / "plain", "cpu")
    for number in range(4):
        image = np.array(Image.open(folders[0] / "data" / f"img{number}.png"))
        with torch.inference_mode():
            logits = segmenter(to_network_input(torch.from_numpy(image[None]), torch.device("cpu")))
            logits = torch.nn.functional.interpolate(logits, size=(40, 48), mode="bilinear")
            mirrored = segmenter(to_network_input(torch.from_numpy(image[None, :, ::-1].copy()), torch.device("cpu")))
            mirrored = torch.nn.functional.interpolate(mirrored, size=(40, 48), mode="bilinear").flip(-1)
        probabilities = (logits.softmax(1) + mirrored.softmax(1))[0]
        own = number % 2 + 1
        expected = torch.where(probabilities[own] > probabilities[0], own, 0).numpy()
        found = read_index_mask(tmp_path / "out" / "rounds" / "1" / "masks" / f"img{number}.png")
        assert (found != expected).mean() < 0.01


def test_the_first_training_is_that_of_no_rounds_and_the_result_another(folders, tmp_path):
    run(folders, tmp_path / "none", rounds_config(0))
    run(folders, tmp_path / "one", rounds_config(1))
    none, one = digests(tmp_path / "none"), digests(tmp_path / "one")
    assert one["rounds/0/history.json"] == none["history.json"]
    assert one["segmenter.safetensors"] != none["segmenter.safetensors"]


PLACES = {
    "first training": ("stages.ops.losses.balanced_segmentation_cross_entropy", 4),
    "between weights and record": ("stages.nets.segmenters.files.write_json", 1),
    "second mask": ("stages.training.rounds.write_index_mask", 2),
    "stats": ("stages.training.rounds.write_json", 1),
    "second training": ("stages.ops.losses.balanced_segmentation_cross_entropy", 14),
    "third mask of round 2": ("stages.training.rounds.write_index_mask", 7),
    "list of rounds": ("stages.training.rounds.write_json", 3),
    "cleaning up": ("stages.training.rounds.remove_checkpoint", 2),
}
"""What is killed at which call."""


@pytest.mark.parametrize("place", PLACES)
def test_stopped_anywhere_it_ends_with_the_same_files(folders, tmp_path, place, monkeypatch):
    import importlib

    config = rounds_config(2, retraining={"start": "trained"}, validation={"every_steps": 4, "ratio": 0.5})
    whole, continued = SilentProgress(), SilentProgress()
    run(folders, tmp_path / "whole", config, progress=whole)
    module, _, name = PLACES[place][0].rpartition(".")
    original, calls = getattr(importlib.import_module(module), name), []

    def killing(*arguments, **options):
        calls.append(1)
        if len(calls) == PLACES[place][1]:
            raise KeyboardInterrupt
        return original(*arguments, **options)

    with monkeypatch.context() as patch:
        patch.setattr(PLACES[place][0], killing)
        with pytest.raises(KeyboardInterrupt):
            run(folders, tmp_path / "killed", config)
    run(folders, tmp_path / "killed", config, progress=continued)
    assert digests(tmp_path / "killed") == digests(tmp_path / "whole")
    assert set(continued.warnings) <= set(whole.warnings), "nothing is told that an unstopped call does not tell"


def test_a_finished_round_is_not_trained_again(folders, tmp_path, monkeypatch):
    import stages.train_segmenter as stage

    trained = []

    def counting(*arguments, **options):
        trained.append(options["out"].relative_to(tmp_path).as_posix())
        if len(trained) == 2:
            raise KeyboardInterrupt
        return original(*arguments, **options)

    original = stage.train
    monkeypatch.setattr(stage, "train", counting)
    with pytest.raises(KeyboardInterrupt):
        run(folders, tmp_path / "out", rounds_config(1))
    run(folders, tmp_path / "out", rounds_config(1))
    assert trained == ["out/rounds/0", "out", "out"]


def test_rounds_begin_again_or_go_on_and_may_have_their_own_loss(folders, tmp_path):
    variants = {
        "initial": {},
        "trained": {"start": "trained"},
        "plain": {"loss": "cross_entropy"},
        "scales": {"scales": [0.75, 1.25], "flip": False},
        "crf": {"crf": {"preset": "irn"}},
    }
    results = {}
    for name, retraining in variants.items():
        run(folders, tmp_path / name, rounds_config(1, retraining=retraining))
        results[name] = digests(tmp_path / name)
    assert len({found["segmenter.safetensors"] for found in results.values()}) == len(variants)
    assert len({found["rounds/0/history.json"] for found in results.values()}) == 1
    losses = {name: read_json(tmp_path / name / "history.json")[0]["loss"] for name in ("initial", "trained")}
    assert losses["trained"] < losses["initial"]


def test_held_out_images_are_compared_with_the_masks_of_their_round(folders, tmp_path):
    config = rounds_config(1, validation={"every_steps": 5, "ratio": 0.5})
    run(folders, tmp_path / "out", config)
    first, last = (read_json(tmp_path / "out" / name) for name in ("rounds/0/validation.json", "validation.json"))
    assert first["held_out"] == last["held_out"]
    shares = [document["curve"][0]["masked_foreground"] for document in (first, last)]
    assert shares[0] != shares[1]


def test_a_segmenter_that_labels_no_object_ends_the_rounds(folders, tmp_path, monkeypatch):
    import torch

    from stages.nets.segmenters.largefov import LargeFov

    def background_only(self, images):
        logits = torch.zeros(len(images), 3, 8, 8)
        logits[:, 0] = 1 + 0 * self.classifier.bias.sum()
        return logits

    monkeypatch.setattr(LargeFov, "forward", background_only)
    with pytest.raises(InputError, match="label the 4 training images for round 1 says background everywhere"):
        run(folders, tmp_path, rounds_config(steps=2))


def test_objects_that_die_out_are_told(folders, tmp_path, monkeypatch):
    """A net that says red everywhere leaves nothing of the two green objects."""
    import torch

    from stages.nets.segmenters.largefov import LargeFov

    def red_only(self, images):
        logits = torch.zeros(len(images), 3, 8, 8)
        logits[:, 1] = 1 + 0 * self.classifier.bias.sum()
        logits[:, 2] = -1
        return logits

    plain, told = SilentProgress(), SilentProgress()
    run(folders, tmp_path / "plain", rounds_config(), progress=plain)
    assert not any("have no pixel" in text for text in plain.warnings)
    monkeypatch.setattr(LargeFov, "forward", red_only)
    run(folders, tmp_path / "out", rounds_config(steps=2), progress=told)
    [text] = [text for text in told.warnings if "have no pixel" in text]
    assert text.startswith("round 1: 2 of the 4 labels of images have no pixel")


def test_rounds_are_of_pseudo_masks_without_confidence():
    with pytest.raises(ValueError, match="true masks need none"):
        rounds_config(supervision="full")
    with pytest.raises(ValueError, match="rounds make masks without confidence"):
        rounds_config(loss_weighting="confidence")


def test_how_rounds_are_trained_is_in_the_key_only_where_there_are_some():
    plain = make_config().key_content()
    assert "retraining" not in plain
    assert make_config(retraining={"flip": False}).key_content() == plain
    content = rounds_config(retraining={"crf": {"preset": "irn"}, "loss": "smoothed_cross_entropy"}).key_content("cuda")
    assert content["rounds"] == 1
    assert content["retraining"]["crf"]["backend"] == "torch"
    assert content["label_smoothing"] == 0.1, "a round's loss is used, too"
    assert rounds_config(retraining={"crf": {"preset": "irn"}}).resolved("cuda").retraining.crf.backend == "torch"


def test_a_rank_waits_for_the_files_of_the_others(tmp_path):
    from stages.training.rounds import _wait_for

    files = [tmp_path / "first", tmp_path / "second"]
    files[0].touch()
    writer = threading.Timer(0.3, files[1].touch)
    writer.start()
    _wait_for(files)
    assert files[1].exists()
    writer.join()
