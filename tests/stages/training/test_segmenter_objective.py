"""The segmenter's losses by their options: what each trains, logs and keeps out of the key."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from stages.contracts import Runtime, read_index_mask, read_json, write_index_mask
from stages.data.transforms import AugmentConfig
from stages.errors import InputError
from stages.ops import losses, sec
from stages.training.config import TrainingConfig
from stages.training.segmenter_objective import LossConfig, SegmenterObjective
from tests.stages.tiny_segmenters import digests, make_config, run, write_folders

WHOLE = AugmentConfig(crop_px=32, scale=(1.0, 1.0), resize="squash", flip=False)


@pytest.fixture
def folders(tmp_path):
    return write_folders(tmp_path)


def sec_config(steps=3, **changes):
    training = TrainingConfig(steps=steps, batch_size=4, learning_rate=0.02)
    return make_config(**{"loss": "sec", "augment": WHOLE, "training": training, **changes})


def kill_at(monkeypatch, name, call, original):
    """Let ``name`` of the SEC module fail as Ctrl-C does at its ``call``-th call."""
    calls = []

    def killing(*arguments, **options):
        calls.append(1)
        if len(calls) == call:
            raise KeyboardInterrupt
        return original(*arguments, **options)

    monkeypatch.setattr(sec, name, killing)


def sparse(folders):
    """Make cues of the masks: a few cells of each are known."""
    for path in (folders[1] / "masks").iterdir():
        mask = read_index_mask(path)
        keep = np.zeros(mask.shape, bool)
        keep[::3, ::3] = True
        write_index_mask(path, np.where(keep, mask, 255).astype(np.uint8))


# -- SEC --------------------------------------------------------------------------------------------------------------


def test_sec_learns_and_all_its_parts_fall(folders, tmp_path):
    run(folders, tmp_path / "out", sec_config(60))
    history = read_json(tmp_path / "out" / "history.json")
    first, last = history[0], history[-1]
    for name in ("seed", "expand"):
        assert last[name] < 0.7 * first[name], (name, first[name], last[name])
    peak = max(record["constrain"] for record in history)
    assert last["constrain"] < 0.7 * peak, "an untrained net says the same everywhere, which no CRF changes"
    for record in history:
        assert record["loss"] == pytest.approx(record["seed"] + record["expand"] + record["constrain"], rel=1e-5)


def test_sec_that_diverges_stops_with_the_reason(folders, tmp_path, monkeypatch):
    """A loss is read a step later, when the net gives NaN already, which the CRF refuses."""
    original, calls = sec.seeding_loss, []

    def diverging(*arguments):
        calls.append(1)
        return original(*arguments) * (float("nan") if len(calls) == 2 else 1)

    monkeypatch.setattr(sec, "seeding_loss", diverging)
    with pytest.raises(InputError, match=r"the loss is not finite at step 2 of 4 .*lower training\.learning_rate"):
        run(folders, tmp_path / "out", sec_config(4), runtime=Runtime(device="cpu", threads=1, workers=0))
    assert len(calls) == 3


def test_sec_cut_off_ends_with_the_same_files(folders, tmp_path, monkeypatch):
    run(folders, tmp_path / "whole", sec_config())
    with monkeypatch.context() as patch:
        kill_at(patch, "constrain_loss", 3, sec.constrain_loss)
        with pytest.raises(KeyboardInterrupt):
            run(folders, tmp_path / "killed", sec_config(), workers=2)
    assert (tmp_path / "killed" / "checkpoint.pt").exists()
    run(folders, tmp_path / "killed", sec_config(), workers=1)
    assert digests(tmp_path / "killed") == digests(tmp_path / "whole")


@pytest.mark.parametrize("loss", ["sec", "bootstrapped_cross_entropy", "smoothed_cross_entropy"])
def test_a_step_in_two_passes_is_the_step_of_the_whole_batch(folders, tmp_path, loss):
    sparse(folders)
    net = {"name": "largefov", "backbone": {"name": "small", "output_stride": 4, "freeze_bn": True}, "channels": 16}
    net |= {"dropout": 0.0, "batch_norm": False}
    histories = []
    for passes in (1, 2):
        training = TrainingConfig(steps=3, batch_size=4, learning_rate=0.02, accumulate_steps=passes)
        run(folders, tmp_path / str(passes), make_config(net=net, loss=loss, training=training))
        histories.append(read_json(tmp_path / str(passes) / "history.json"))
    for one, two in zip(*histories, strict=True):
        assert one == pytest.approx(two, rel=1e-4)
    assert len({record["loss"] for record in histories[0]}) == 3, "steps that change nothing would agree as well"


def batch_of(masks, **more):
    torch.manual_seed(0)
    return {"images": torch.randn(len(masks), 3, *masks.shape[1:]), "masks": masks, **more}


class Constant(torch.nn.Module):
    """Says the same of every image."""

    def __init__(self, logits):
        super().__init__()
        self.logits = logits

    def forward(self, images):
        return self.logits.expand(len(images), -1, -1, -1)


def test_a_crop_has_the_classes_that_its_mask_holds_and_a_whole_image_those_of_its_labels():
    """The mask holds class 1 only; labels that say so change nothing, labels of both classes do."""
    masks = torch.full((1, 16, 16), 255, dtype=torch.uint8)
    masks[:, :3] = 1
    net, objective = Constant(torch.randn(1, 3, 4, 4)), SegmenterObjective(LossConfig(loss="sec"))
    cropped = objective(net, batch_of(masks), None)
    same = objective(net, batch_of(masks, labels=torch.tensor([[1.0, 0.0]])), None)
    other = objective(net, batch_of(masks, labels=torch.tensor([[1.0, 1.0]])), None)
    assert cropped["expand"] == same["expand"]
    assert other["expand"] != same["expand"]
    assert other["seed"] == same["seed"]


def test_samples_have_labels_only_where_sec_sees_whole_images(folders, tmp_path, monkeypatch):
    seen = []

    def watching(probabilities, labels):
        seen.append(labels.float().tolist())
        return original(probabilities, labels)

    original = sec.expansion_loss
    monkeypatch.setattr(sec, "expansion_loss", watching)
    for path in (folders[1] / "masks").iterdir():  # nothing but background: labels cannot come from there
        write_index_mask(path, np.zeros_like(read_index_mask(path)))
    run(folders, tmp_path / "whole", sec_config(1))
    run(folders, tmp_path / "crops", sec_config(1, augment=AugmentConfig(crop_px=32)))
    whole, crops = seen
    assert sorted(whole) == [[0, 1], [0, 1], [1, 0], [1, 0]]
    assert crops == [[0, 0]] * 4


def test_the_crf_sees_the_pixels_of_the_file(folders, tmp_path, monkeypatch):
    seen = []

    def watching(probabilities, images, config, *, shrink):
        seen.append((images.numpy().copy(), shrink))
        return original(probabilities, images, config, shrink=shrink)

    original = sec.refine_cells
    monkeypatch.setattr(sec, "refine_cells", watching)
    run(folders, tmp_path, sec_config(1, sec={"crf_shrink": 5}))
    images, shrink = seen[0]
    assert shrink == 5
    assert images.dtype == np.uint8
    assert images.shape == (4, 32, 32, 3)
    assert images.max() == 250, "the squares' colour is in the file as 250"


def test_sec_does_not_weigh_cues():
    with pytest.raises(ValueError, match="loss: sec counts all cues alike"):
        make_config(loss="sec", loss_weighting="confidence")


# -- cross-entropies --------------------------------------------------------------------------------------------------


def test_each_loss_is_the_one_of_its_name_with_its_option():
    torch.manual_seed(1)
    logits, masks = torch.randn(1, 3, 8, 8), torch.randint(0, 3, (2, 8, 8), dtype=torch.uint8)
    masks[0, :2] = 255
    net, both = Constant(logits), logits.expand(2, -1, -1, -1)
    expected = {
        "cross_entropy": losses.segmentation_cross_entropy(both, masks),
        "balanced_cross_entropy": losses.balanced_segmentation_cross_entropy(both, masks),
        "bootstrapped_cross_entropy": losses.bootstrapped_cross_entropy(both, masks, trust=0.6),
        "smoothed_cross_entropy": losses.smoothed_cross_entropy(both, masks, smoothing=0.3),
    }
    assert len({round(float(value), 5) for value in expected.values()}) == 4
    for loss, value in expected.items():
        config = LossConfig(loss=loss, bootstrap_trust=0.6, label_smoothing=0.3)
        found = SegmenterObjective(config)(net, batch_of(masks), None)
        assert found["loss"] == pytest.approx(float(value), rel=1e-5), loss
        assert ("labelled" in found) == (loss != "balanced_cross_entropy")


@pytest.mark.parametrize(
    ("loss", "option"),
    [("bootstrapped_cross_entropy", {"bootstrap_trust": 0.5}), ("smoothed_cross_entropy", {"label_smoothing": 0.4})],
)
def test_an_option_of_a_loss_changes_what_is_trained(folders, tmp_path, loss, option):
    run(folders, tmp_path / "default", make_config(loss=loss))
    run(folders, tmp_path / "other", make_config(loss=loss, **option))
    assert digests(tmp_path / "default") != digests(tmp_path / "other")


# -- keys -------------------------------------------------------------------------------------------------------------


def test_the_options_of_a_loss_are_in_the_key_only_with_that_loss():
    plain = make_config().key_content()
    assert not {"bootstrap_trust", "label_smoothing", "sec"} & set(plain)
    assert make_config(bootstrap_trust=0.1, label_smoothing=0.2, sec={"crf_shrink": 8}).key_content() == plain
    assert make_config(loss="bootstrapped_cross_entropy").key_content()["bootstrap_trust"] == 0.8
    assert make_config(loss="smoothed_cross_entropy").key_content()["label_smoothing"] == 0.1


def test_the_key_of_sec_has_its_crf_with_the_backend_that_runs():
    content = make_config(loss="sec").key_content()
    assert content["sec"]["crf"]["backend"] in ("pydensecrf", "numba", "torch")
    assert make_config(loss="sec").key_content("cuda")["sec"]["crf"]["backend"] == "torch"
    assert make_config(loss="sec").resolved("cuda").sec.crf.backend == "torch"
    assert content == make_config(loss="sec", loss_resolution="cells").key_content(), "SEC is always one of cells"
