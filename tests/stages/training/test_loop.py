"""The training loop: exact resume, worker independence, schedules, and what it says when it cannot go on."""

from __future__ import annotations

import itertools
import subprocess
import sys
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch
from torch import nn

from stages.contracts import Runtime, SilentProgress
from stages.errors import ConfigError, EnvironmentFailure, InputError
from stages.training.checkpoints import remove_checkpoint
from stages.training.config import TrainingConfig
from stages.training.loop import train
from stages.training.randomness import batch_order, sample_seed, step_seed
from stages.training.segmenter_objective import LossConfig, SegmenterObjective
from tests.stages.training.kept_state import read_state

SIZE = 8


class RandomCrops:
    """Eleven images whose pixels depend on (seed, epoch, sample) as an augmentation's do."""

    def __init__(self, num_samples: int = 11, seed: int = 3):
        self.num_samples, self.seed = num_samples, seed

    def __len__(self):
        return self.num_samples

    def get(self, index, epoch):
        random = np.random.default_rng(sample_seed(self.seed, epoch, index))
        images = random.integers(0, 256, (SIZE, SIZE, 3), dtype=np.uint8)
        return {"images": images, "labels": np.float32(index % 2), "key": np.array([epoch, index])}


class FailingCrops(RandomCrops):
    def get(self, index, epoch):
        if epoch == 1:
            raise ValueError(f"cannot read image {index}")
        return super().get(index, epoch)


def build_net() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Dropout(0.5), nn.Conv2d(4, 1, 3))


def squared_error(model, batch, step):
    scores = model(batch["images"]).mean((1, 2, 3))
    return {"loss": ((scores - batch["labels"]) ** 2).mean(), "score": scores.mean()}


CONFIG = TrainingConfig(epochs=3, batch_size=4, learning_rate=0.05, warmup_steps=2)  # 11 images: 2 steps an epoch


def run(
    out: Path, *, model=None, objective=squared_error, config=CONFIG, dataset=None, progress=None, watch=None, **runtime
):
    model = build_net() if model is None else model
    groups = [{"params": model[:4].parameters()}, {"params": model[4].parameters(), "lr_factor": 10.0}]
    history = train(
        model,
        objective=objective,
        dataset=RandomCrops() if dataset is None else dataset,
        config=config,
        parameter_groups=groups,
        seed=5,
        out=out,
        progress=progress or SilentProgress(),
        runtime=Runtime(device="cpu", threads=1, **{"workers": 0, "checkpoint_every_s": 0, **runtime}),
        watch=watch,
    )
    return model, history


def as_bytes(model) -> bytes:
    return b"".join(name.encode() + value.numpy().tobytes() for name, value in model.state_dict().items())


class Killed(BaseException):
    pass


def killed_at(step, objective=squared_error):
    def objective_with_kill(model, batch, info):
        losses = objective(model, batch, info)
        if info.step == step:
            raise Killed
        return losses

    return objective_with_kill


# -- exactness --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kill", range(1, 6))
def test_a_training_killed_at_any_step_ends_with_the_same_bytes(tmp_path, kill):
    whole, history = run(tmp_path / "whole")
    with pytest.raises(Killed):
        run(tmp_path / "killed", objective=killed_at(kill), workers=2)
    resumed_steps = []

    def watched(model, batch, info):
        resumed_steps.append(info.step)
        return squared_error(model, batch, info)

    resumed, resumed_history = run(tmp_path / "killed", model=None, objective=watched)
    assert resumed_steps == list(range(kill, 6))
    assert as_bytes(resumed) == as_bytes(whole)
    assert resumed_history == history


def test_a_training_killed_before_the_first_checkpoint_starts_again(tmp_path):
    whole, _ = run(tmp_path / "whole")
    with pytest.raises(Killed):
        run(tmp_path / "killed", objective=killed_at(4), checkpoint_every_s=1000)
    assert not (tmp_path / "killed" / "checkpoint.pt").exists()
    assert as_bytes(run(tmp_path / "killed")[0]) == as_bytes(whole)


def test_resume_in_the_middle_of_a_history_record_keeps_its_mean(tmp_path):
    config = TrainingConfig(steps=300, batch_size=2, learning_rate=0.01)  # a record every 3 steps
    _, history = run(tmp_path / "whole", config=config, checkpoint_every_s=1000)
    with pytest.raises(Killed):
        run(tmp_path / "killed", config=config, objective=killed_at(7))
    _, resumed = run(tmp_path / "killed", config=config, checkpoint_every_s=1000)
    assert resumed == history
    assert len(history) == 100
    assert [record["step"] for record in history[:3]] == [3, 6, 9]


def test_a_finished_training_called_again_takes_no_step_and_keeps_its_bytes(tmp_path):
    first, history = run(tmp_path)

    def never(model, batch, info):
        raise AssertionError("a finished training took a step")

    again, history_again = run(tmp_path, objective=never)
    assert as_bytes(again) == as_bytes(first)
    assert history_again == history


@pytest.mark.parametrize("workers", [1, 2, 5])
def test_the_number_of_workers_changes_nothing(tmp_path, workers):
    alone, history = run(tmp_path / "alone", workers=0)
    helped, helped_history = run(tmp_path / "helped", workers=workers)
    assert as_bytes(helped) == as_bytes(alone)
    assert helped_history == history


def test_the_callers_random_state_changes_nothing(tmp_path):
    first, _ = run(tmp_path / "first")
    model = build_net()
    torch.rand(17)
    assert as_bytes(run(tmp_path / "second", model=model)[0]) == as_bytes(first)


def test_another_seed_gives_other_weights(tmp_path):
    first, _ = run(tmp_path / "first")
    second, _ = run(tmp_path / "second", dataset=RandomCrops(seed=4))
    assert as_bytes(first) != as_bytes(second)


def test_dropout_differs_between_steps(tmp_path):
    drawn = []

    def objective(model, batch, info):
        drawn.append(torch.rand(3).tolist())
        return squared_error(model, batch, info)

    run(tmp_path, objective=objective)
    assert len({tuple(values) for values in drawn}) == 6


def test_deterministic_mode_is_given_back(tmp_path):
    before = torch.are_deterministic_algorithms_enabled()
    inside = []

    def objective(model, batch, info):
        inside.append(torch.are_deterministic_algorithms_enabled())
        return squared_error(model, batch, info)

    run(tmp_path, objective=objective)
    assert inside == [True] * 6
    assert torch.are_deterministic_algorithms_enabled() == before


# -- order and seeds --------------------------------------------------------------------------------------------------


def test_each_epoch_is_another_permutation_with_the_rest_left_out():
    keys = list(batch_order(11, CONFIG, seed=0))
    assert [len(batch) for batch in keys] == [4] * 6
    epochs = [[key for batch in keys[i : i + 2] for key in batch] for i in (0, 2, 4)]
    for number, epoch in enumerate(epochs):
        assert {e for e, _ in epoch} == {number}
        assert len({index for _, index in epoch}) == 8
    assert [i for _, i in epochs[0]] != [i for _, i in epochs[1]]
    assert keys[3:] == list(batch_order(11, CONFIG, seed=0, start=3))
    assert keys != list(batch_order(11, CONFIG, seed=1))


def test_a_data_set_smaller_than_a_batch_is_one_batch_an_epoch():
    keys = list(batch_order(3, CONFIG, seed=0))
    assert [sorted(index for _, index in batch) for batch in keys] == [[0, 1, 2]] * 3


def test_seeds_depend_on_every_part_and_fit():
    parts = list(itertools.product(range(3), repeat=3))
    assert len({sample_seed(*part) for part in parts}) == 27
    assert len({step_seed(*part) for part in parts}) == 27
    assert all(0 <= sample_seed(*part) < 2**32 for part in parts)
    assert sample_seed(1, 2, 3) == 730673814  # a changed derivation changes every trained net: bump the VERSIONs
    torch.manual_seed(step_seed(0, 0))


def test_the_batch_arrives_normalised_and_with_its_keys(tmp_path):
    seen = []

    def objective(model, batch, info):
        seen.append((info.epoch, batch["key"].clone(), batch["images"].clone(), info.num_steps))
        return squared_error(model, batch, info)

    run(tmp_path, objective=objective)
    epoch, keys, images, num_steps = seen[3]
    assert (epoch, num_steps) == (1, 6)
    assert keys[:, 0].tolist() == [1] * 4
    assert images.shape == (4, 3, SIZE, SIZE)
    pixels = RandomCrops().get(int(keys[2, 1]), 1)["images"]
    expected = (pixels[5, 6] / 255 - np.array([0.485, 0.456, 0.406])) / np.array([0.229, 0.224, 0.225])
    np.testing.assert_allclose(images[2, :, 5, 6].numpy(), expected, rtol=1e-5, atol=1e-6)


# -- schedule and optimiser -------------------------------------------------------------------------------------------


def test_schedules_by_hand():
    poly = TrainingConfig(steps=10, learning_rate=2.0, poly_power=0.5, warmup_steps=2)
    assert poly.learning_rate_at(0, 10) == pytest.approx(1.0)
    assert poly.learning_rate_at(1, 10) == pytest.approx(2 * 0.9**0.5)
    assert poly.learning_rate_at(9, 10) == pytest.approx(2 * 0.1**0.5)
    step = TrainingConfig(steps=10, learning_rate=1.0, schedule="step", step_every=4, step_factor=0.1)
    assert [step.learning_rate_at(s, 10) for s in (0, 3, 4, 8)] == pytest.approx([1, 1, 0.1, 0.01])
    constant = TrainingConfig(steps=10, learning_rate=0.3, schedule="constant")
    assert {constant.learning_rate_at(s, 10) for s in range(10)} == {0.3}


def test_one_step_of_sgd_by_hand(tmp_path):
    """w = 1, loss = 3 w: gradient 3 + decay 0.1 x 1; rates 0.1 and 0.1 x 10."""
    model = nn.Module()
    model.body, model.head, model.fixed = (nn.Parameter(torch.ones(1)) for _ in range(3))
    model.fixed.requires_grad_(False)
    train(
        model,
        objective=lambda model, batch, step: {"loss": (3 * model.body + 3 * model.head + model.fixed).sum()},
        dataset=RandomCrops(2),
        config=TrainingConfig(steps=1, batch_size=2, learning_rate=0.1, weight_decay=0.1),
        parameter_groups=[
            {"params": [model.body, model.fixed]},
            {"params": [model.head], "lr_factor": 10.0, "weight_decay": 0.0},
        ],
        seed=0,
        out=tmp_path,
        progress=SilentProgress(),
        runtime=Runtime(device="cpu", threads=1, workers=0),
    )
    assert model.body.item() == pytest.approx(1 - 0.1 * 3.1)
    assert model.head.item() == pytest.approx(1 - 1.0 * 3.0)
    assert model.fixed.item() == 1


def test_clipping_limits_the_step(tmp_path):
    config = TrainingConfig(steps=1, batch_size=2, learning_rate=1.0, weight_decay=0, clip_norm=0.5)
    model = build_net()
    before = [p.detach().clone() for p in model.parameters()]
    groups = [{"params": model.parameters()}]
    train(
        model,
        objective=lambda m, b, s: {"loss": 1000 * squared_error(m, b, s)["loss"]},
        dataset=RandomCrops(),
        config=config,
        parameter_groups=groups,
        seed=0,
        out=tmp_path,
        progress=SilentProgress(),
        runtime=Runtime(device="cpu", threads=1, workers=0),
    )
    moved = sum(((a - b) ** 2).sum() for a, b in zip(before, model.parameters(), strict=True)) ** 0.5
    assert moved.item() == pytest.approx(0.5, rel=1e-3)


def test_history_holds_means_and_where_it_stood(tmp_path):
    seen = []

    def objective(model, batch, info):
        losses = squared_error(model, batch, info)
        seen.append(losses["loss"].item())
        return losses

    config = TrainingConfig(steps=200, batch_size=5, learning_rate=0.01, schedule="constant")
    _, history = run(tmp_path, objective=objective, config=config, checkpoint_every_s=1000)
    assert len(history) == 100
    assert history[0]["loss"] == pytest.approx((seen[0] + seen[1]) / 2)
    assert set(history[0]) == {"step", "epoch", "learning_rate", "loss", "score"}
    assert history[-1]["step"] == 200
    assert history[-1]["epoch"] == 100.0
    assert history[-1]["learning_rate"] == 0.01


def test_it_learns(tmp_path):
    class TwoColours(RandomCrops):
        def get(self, index, epoch):
            sample = super().get(index, epoch)
            return {**sample, "images": (sample["images"] // 2 + 127 * (index % 2)).astype(np.uint8)}

    model = build_net()
    model[3].p = 0.0  # dropout's noise would hide it
    config = TrainingConfig(steps=60, batch_size=8, learning_rate=0.02)
    _, history = run(tmp_path, model=model, config=config, dataset=TwoColours(), checkpoint_every_s=1000)
    losses = [record["loss"] for record in history]
    assert np.mean(losses[-10:]) < 0.2 * losses[0]


def test_bf16_trains_and_keeps_fp32_weights(tmp_path):
    dtypes = set()

    def objective(model, batch, info):
        dtypes.add(model[0](batch["images"]).dtype)
        losses = squared_error(model, batch, info)
        return {name: value.float() for name, value in losses.items()}

    config = TrainingConfig(steps=2, batch_size=4, precision="bf16")
    model, _ = run(tmp_path, objective=objective, config=config)
    assert dtypes == {torch.bfloat16}
    assert {p.dtype for p in model.parameters()} == {torch.float32}


# -- bad input --------------------------------------------------------------------------------------------------------


def test_a_loss_that_is_not_finite_stops_with_the_reason(tmp_path):
    def objective(model, batch, info):
        losses = squared_error(model, batch, info)
        return {**losses, "loss": losses["loss"] / (0.0 if info.step >= 2 else 1.0)}

    with pytest.raises(InputError, match=r"not finite at step 3 of 6 \(loss inf, score .*lower training.learning_rate"):
        run(tmp_path, objective=objective)
    # the checkpoint under out is from before the failure: none was written with a bad loss in it
    assert read_state(tmp_path)["step"] == 2


def test_the_last_step_is_checked_too(tmp_path):
    config = TrainingConfig(steps=1, batch_size=4, precision="bf16")
    with pytest.raises(InputError, match=r"step 1 of 1 .*precision fp32"):
        run(tmp_path, config=config, objective=lambda m, b, s: {"loss": squared_error(m, b, s)["loss"] * float("nan")})


DAMAGE = {
    "cut": lambda data: data[: len(data) // 2],
    "flipped": lambda data: data[: len(data) // 2] + bytes([data[len(data) // 2] ^ 1]) + data[len(data) // 2 + 1 :],
    "empty": lambda data: b"",
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_damaged_checkpoint_is_set_aside_with_a_warning(tmp_path, damage):
    whole, _ = run(tmp_path / "whole")
    data = (tmp_path / "whole" / "checkpoint.pt").read_bytes()
    (tmp_path / "cut").mkdir()
    (tmp_path / "cut" / "checkpoint.pt").write_bytes(DAMAGE[damage](data))
    progress = SilentProgress()
    model, _ = run(tmp_path / "cut", progress=progress)
    assert as_bytes(model) == as_bytes(whole)
    assert "does not read back" in progress.warnings[0]
    assert (tmp_path / "cut" / "checkpoint.damaged").exists()


def test_the_checkpoint_of_another_training_is_refused(tmp_path):
    run(tmp_path)
    with pytest.raises(InputError, match=r"belongs to another training \(other config\)"):
        run(tmp_path, config=CONFIG.model_copy(update={"learning_rate": 0.06}))


def test_remove_checkpoint_leaves_nothing(tmp_path):
    run(tmp_path)
    (tmp_path / "checkpoint.damaged").touch()
    remove_checkpoint(tmp_path)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("workers", [0, 2])
def test_an_error_of_the_data_arrives_as_it_was(tmp_path, workers):
    with pytest.raises(ValueError, match="cannot read image"):
        run(tmp_path, dataset=FailingCrops(), workers=workers)


def test_an_empty_data_set_is_refused(tmp_path):
    with pytest.raises(InputError, match="no image to train on"):
        run(tmp_path, dataset=RandomCrops(0))


def test_fp16_needs_cuda(tmp_path):
    with pytest.raises(ConfigError, match="fp16 needs CUDA, found cpu; use fp32 or bf16"):
        run(tmp_path, config=CONFIG.model_copy(update={"precision": "fp16"}))


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({}, "exactly one of epochs and steps"),
        ({"epochs": 1, "steps": 1}, "exactly one of epochs and steps"),
        ({"steps": 1, "schedule": "step"}, "needs step_every"),
        ({"steps": 1, "nesterov": True, "momentum": 0}, "nesterov needs a momentum"),
        ({"steps": 1, "learning_rte": 1}, "Extra inputs"),
    ],
)
def test_a_wrong_config_is_refused(values, message):
    with pytest.raises(ValueError, match=message):
        TrainingConfig(**values)


@pytest.mark.skipif(torch.cuda.is_available(), reason="asks for a device that is not there")
def test_a_missing_device_is_named():
    from stages.ops.devices import resolve_device

    with pytest.raises(EnvironmentFailure, match=r"'cuda:0', but torch finds only .*cpu"):
        resolve_device(Runtime(device="cuda:0"))
    assert resolve_device(Runtime(device="cpu")) == torch.device("cpu")


def test_importing_the_configs_needs_no_torch():
    code = (
        "import sys, stages.training.loop, stages.train_segmenter; "
        "sys.exit(any(m in sys.modules for m in ('torch', 'albumentations', 'cv2', 'scipy')))"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


@pytest.mark.parametrize("error", [PermissionError(13, "permission denied"), MemoryError()])
def test_a_checkpoint_that_cannot_be_read_now_is_kept(tmp_path, monkeypatch, error):
    run(tmp_path)

    def fail(*arguments, **options):
        raise error

    monkeypatch.setattr(torch, "load", fail)
    with pytest.raises(type(error)):
        run(tmp_path)
    assert (tmp_path / "checkpoint.pt").is_file()


# -- several passes, averaged weights, biases, a watch ----------------------------------------------------------------


class HalfVoid(RandomCrops):
    """Masks (8, 8) whose share of labelled pixels differs much between images; the first has none."""

    def get(self, index, epoch):
        sample = super().get(index, epoch)
        mask = np.random.default_rng(index).integers(0, 3, (SIZE, SIZE), dtype=np.uint8)
        mask.ravel()[index * 6 :] = 255
        return {"images": sample["images"], "masks": mask}


def without_batch_norm():
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(3, 4, 3, padding=1), nn.ReLU(), nn.Identity(), nn.Identity(), nn.Conv2d(4, 3, 1))


@pytest.mark.parametrize("passes", [2, 3, 5])
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_a_step_in_several_passes_is_the_step_of_the_whole_batch(tmp_path, passes, precision):
    """Passes weigh by their labelled pixels: with equal weights the losses would differ by more than a tenth."""
    objective = SegmenterObjective(LossConfig())
    found = []
    for count in (1, passes):
        config = TrainingConfig(
            steps=6, batch_size=5, learning_rate=0.05, clip_norm=0.5, accumulate_steps=count, precision=precision
        )
        model = without_batch_norm()
        found.append(run(tmp_path / f"{count}", model=model, config=config, objective=objective, dataset=HalfVoid()))
    (whole, history), (parts, parts_history) = found
    tolerance = 1e-6 if precision == "fp32" else 2e-3
    torch.testing.assert_close(parts.state_dict(), whole.state_dict(), rtol=0, atol=tolerance)
    assert [set(record) for record in parts_history] == [{"step", "epoch", "learning_rate", "loss"}] * 6
    losses = [[record["loss"] for record in one] for one in (history, parts_history)]
    assert losses[1] == pytest.approx(losses[0], abs=tolerance)
    assert len(set(losses[0])) == 6


def test_a_loss_that_is_a_mean_over_images_weighs_uneven_passes_by_their_images(tmp_path):
    config = TrainingConfig(steps=3, batch_size=5, learning_rate=0.05)
    whole, history = run(tmp_path / "whole", model=without_batch_norm(), config=config)
    parted = config.model_copy(update={"accumulate_steps": 3})
    parts, parts_history = run(tmp_path / "parts", model=without_batch_norm(), config=parted)
    torch.testing.assert_close(parts.state_dict(), whole.state_dict(), rtol=0, atol=1e-6)
    assert parts_history[-1]["score"] == pytest.approx(history[-1]["score"], abs=1e-6)


def test_a_step_without_a_labelled_pixel_in_any_pass_learns_nothing(tmp_path):
    class AllVoid(HalfVoid):
        def get(self, index, epoch):
            return {**super().get(index, epoch), "masks": np.full((SIZE, SIZE), 255, np.uint8)}

    model = without_batch_norm()
    before = as_bytes(model)
    config = TrainingConfig(steps=2, batch_size=4, learning_rate=1.0, weight_decay=0, accumulate_steps=2)
    _, history = run(
        tmp_path, model=model, config=config, objective=SegmenterObjective(LossConfig()), dataset=AllVoid()
    )
    assert as_bytes(model) == before
    assert [record["loss"] for record in history] == [0, 0]


def test_more_passes_than_images_are_refused(tmp_path):
    with pytest.raises(ValueError, match=r"batch_size 4 cannot be computed in 5 passes; lower\s+accumulate_steps"):
        TrainingConfig(steps=1, batch_size=4, accumulate_steps=5)
    config = TrainingConfig(steps=1, batch_size=20, accumulate_steps=12)
    with pytest.raises(
        InputError, match=r"a step has 11 images .*too few for 12 passes .*lower training.accumulate_steps"
    ):
        run(tmp_path, config=config)


def test_biases_learn_at_their_own_rate_and_need_not_decay(tmp_path):
    """Gradient 0 but for decay 0.1: weights shrink by 0.1 × 0.1 (head: × 10), biases by twice that or not."""
    for decays in (True, False):
        model = build_net()
        for parameter in model.parameters():
            parameter.data.fill_(1.0)
        run(
            tmp_path / f"{decays}",
            model=model,
            objective=lambda m, b, s: {"loss": sum((p * 0).sum() for p in m.parameters())},
            config=TrainingConfig(
                steps=1, batch_size=2, learning_rate=0.1, weight_decay=0.1, bias_lr_factor=2, bias_weight_decay=decays
            ),
        )
        shrunk = {name: round(1 - parameter.mean().item(), 4) for name, parameter in model.named_parameters()}
        bias, head_bias = (0.02, 0.2) if decays else (0, 0)
        # 1 is BatchNorm: its offset is called bias and is none
        expected = {"0.weight": 0.01, "0.bias": bias, "1.weight": 0.01, "1.bias": 0.01}
        assert shrunk == {**expected, "4.weight": 0.1, "4.bias": head_bias}


AVERAGED = CONFIG.model_copy(update={"ema_decay": 0.6})


def test_the_averaged_weights_are_delivered_and_change_no_step(tmp_path):
    seen, told = [], []

    def objective(model, batch, info):
        seen.append({name: value.clone() for name, value in model.state_dict().items()})
        return squared_error(model, batch, info)

    progress = SilentProgress()
    progress.info = told.append
    last, history = run(tmp_path / "last")
    model, averaged_history = run(tmp_path / "averaged", config=AVERAGED, objective=objective, progress=progress)
    assert averaged_history == history
    assert told == ["the weights are the moving average over the steps (ema_decay 0.6)"]
    steps = [*seen[1:], last.state_dict()]  # what each step left
    for name, start in seen[0].items():
        if name.endswith("num_batches_tracked"):
            assert model.state_dict()[name] == 6
            continue
        expected = start
        for step, value in enumerate(steps):
            decay = min(0.6, (1 + step) / (10 + step))
            expected = decay * expected + (1 - decay) * value[name]
        # BatchNorm counts each batch before the objective sees the net, so its statistics are compared at the end only
        if "running" not in name:
            torch.testing.assert_close(model.state_dict()[name], expected, rtol=1e-5, atol=1e-6)


class Looks:
    """A watch that remembers the weights it saw."""

    def __init__(self, every_steps=2):
        self.every_steps, self.identity, self.seen = every_steps, "looks", []

    def look(self, model, step):
        self.seen.append({"step": step, "mean": model[0].weight.mean().item(), "training": model.training})

    def state_dict(self):
        return {"seen": self.seen}

    def load_state_dict(self, state):
        self.seen = state["seen"]


@pytest.mark.parametrize("kill", range(1, 6))
def test_the_average_and_what_the_watch_saw_survive_a_kill_at_any_step(tmp_path, kill):
    config = AVERAGED.model_copy(update={"accumulate_steps": 2, "bias_lr_factor": 2.0})
    looks, resumed_looks = Looks(), Looks()
    whole, history = run(tmp_path / "whole", config=config, watch=looks)
    with pytest.raises(Killed):
        run(tmp_path / "killed", config=config, watch=Looks(), objective=killed_at(kill))
    resumed, resumed_history = run(tmp_path / "killed", config=config, watch=resumed_looks)
    assert as_bytes(resumed) == as_bytes(whole)
    assert resumed_history == history
    assert resumed_looks.seen == looks.seen
    assert [look["step"] for look in looks.seen] == [2, 4, 6]
    again, _ = run(tmp_path / "killed", config=config, watch=Looks())
    assert as_bytes(again) == as_bytes(whole), "a finished training called again delivers the averaged weights too"


def test_the_watch_sees_the_averaged_weights_and_changes_no_step(tmp_path):
    plain, averaged = Looks(4), Looks(4)
    without, _ = run(tmp_path / "without")
    model, _ = run(tmp_path / "plain", watch=plain)
    assert as_bytes(model) == as_bytes(without)
    assert [look["step"] for look in plain.seen] == [4, 6], "the last step is looked at, too"
    model, _ = run(tmp_path / "averaged", config=AVERAGED, watch=averaged)
    assert averaged.seen[-1]["mean"] == model[0].weight.mean().item() != plain.seen[-1]["mean"]


def test_fp16_scales_its_loss_and_the_scale_survives_a_kill(tmp_path, monkeypatch):
    """On the CPU, where only the check of the device stands in the way."""
    monkeypatch.setattr("stages.training.loop._check_start", lambda *_: None)
    # the scale doubles after every two steps: each step after a resume has to know how many there were
    scaler = torch.amp.GradScaler
    monkeypatch.setattr(torch.amp, "GradScaler", lambda *a, **k: scaler(*a, **k, init_scale=64.0, growth_interval=2))
    config = CONFIG.model_copy(update={"precision": "fp16", "ema_decay": 0.5})
    objective = lambda m, b, s: {name: value.float() for name, value in squared_error(m, b, s).items()}  # noqa: E731
    whole, history = run(tmp_path / "whole", config=config, objective=objective)
    with pytest.raises(Killed):
        run(tmp_path / "killed", config=config, objective=killed_at(3, objective))
    kept = read_state(tmp_path / "killed")["scaler"]
    assert (kept["scale"], kept["_growth_tracker"]) == (128.0, 1)
    resumed, resumed_history = run(tmp_path / "killed", config=config, objective=objective)
    assert as_bytes(resumed) == as_bytes(whole)
    assert resumed_history == history


def test_options_are_written_and_read_back():
    used = {"accumulate_steps": 2, "ema_decay": 0.9, "bias_lr_factor": 2.0, "bias_weight_decay": False}
    config = TrainingConfig(steps=1, **used)
    assert used.items() <= config.model_dump(mode="json").items()
    assert TrainingConfig.model_validate_json(config.model_dump_json()) == config
    assert TrainingConfig.model_validate(CONFIG.model_dump()) == CONFIG


# -- bad input of the new kind ----------------------------------------------------------------------------------------


def test_the_checkpoint_of_another_network_is_refused_by_tensor(tmp_path):
    run(tmp_path)
    torch.manual_seed(0)
    other = nn.Sequential(nn.Conv2d(3, 4, 5), nn.BatchNorm2d(4), nn.ReLU(), nn.Dropout(0.5), nn.Linear(4, 1))
    reason = r"of another network \(2 tensors differ\); delete it or train elsewhere"
    with pytest.raises(InputError, match=reason) as caught:
        run(tmp_path, model=other)
    assert "0.weight: the net has shape (4, 3, 5, 5), the checkpoint (4, 3, 3, 3)" in caught.value.problems
    assert caught.value.exit_code == 2


def test_the_checkpoint_of_a_training_that_was_watched_is_another_one(tmp_path):
    run(tmp_path, watch=Looks())
    with pytest.raises(InputError, match=r"another training \(other watch\)"):
        run(tmp_path)


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB"),
        RuntimeError("[enforce fail at alloc_cpu.cpp:121] DefaultCPUAllocator: can't allocate memory: 20 bytes"),
        cv2.error("OpenCV(4.12.0) alloc.cpp:73: error: (-4:Insufficient memory) Failed to allocate 20 bytes"),
        MemoryError(),
        RuntimeError("DataLoader worker (pid 7) is killed by signal: Killed. "),
    ],
    ids=["cuda", "cpu", "opencv", "numpy", "loader"],
)
def test_a_crop_larger_than_memory_is_named_with_its_batch(tmp_path, error):
    def objective(model, batch, info):
        raise error

    reason = r"cpu is out of memory at batch_size 4 in 2 passes with crops of 8 x 8 px; raise training.accumulate_steps"
    with pytest.raises(InputError, match=reason):
        run(tmp_path, objective=objective, config=CONFIG.model_copy(update={"accumulate_steps": 2}))


def test_memory_that_runs_out_later_is_the_machines(tmp_path):
    """Steps of the same size fitted before."""
    calls = []

    def objective(model, batch, info):
        calls.append(1)
        if len(calls) > 2:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return squared_error(model, batch, info)

    with pytest.raises(EnvironmentFailure, match="out of memory at batch_size 4"):
        run(tmp_path, objective=objective)


def test_another_runtime_error_is_nobodys_memory(tmp_path):
    def objective(model, batch, info):
        raise RuntimeError("shapes do not match")

    with pytest.raises(RuntimeError, match="shapes do not match"):
        run(tmp_path, objective=objective)
