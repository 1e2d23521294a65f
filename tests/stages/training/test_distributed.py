"""Two processes train as one: the same losses, the same weights, one writer."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from stages.contracts import Runtime
from stages.errors import ConfigError, EnvironmentFailure, InputError
from stages.training import distributed
from stages.training.distributed import device_problems, is_main, num_ranks, own_slice, resolve_devices, this_rank
from tests.stages.training.kept_state import read_state
from tests.stages.training.rank_scenarios import CONFIG, EQUAL, OTHERS, fit, run_scenarios, segment

ROOT = Path(__file__).parents[3]


def start_rank(folder: Path, rank: int) -> subprocess.Popen:
    told = {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2", "TORCHELASTIC_RUN_ID": "test"}
    quiet = {"GLOO_SOCKET_IFNAME": "lo0" if sys.platform == "darwin" else "lo", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "tests.stages.training.rank_scenarios", str(folder)]
    return subprocess.Popen(command, cwd=ROOT, env={**os.environ, **told, **quiet}, stderr=subprocess.PIPE, text=True)


@pytest.fixture(scope="module")
def two(tmp_path_factory):
    """What each of two ranks made of all scenarios, and their folder."""
    folder = tmp_path_factory.mktemp("two")
    ranks = [start_rank(folder, rank) for rank in range(2)]
    try:
        errors = [rank.communicate(timeout=240)[1] for rank in ranks]
    finally:
        for rank in ranks:
            rank.kill()
    assert [rank.returncode for rank in ranks] == [0, 0], "\n".join(errors)
    return [torch.load(folder / f"rank-{rank}.pt", weights_only=True) for rank in range(2)], folder


@pytest.fixture(scope="module")
def one(tmp_path_factory):
    """The same scenarios in this process."""
    return run_scenarios(tmp_path_factory.mktemp("one"), [*EQUAL, *OTHERS])


def losses(result) -> torch.Tensor:
    return torch.tensor([record["loss"] for record in result["history"]])


# -- n devices take the steps of one ----------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("name", EQUAL)
def test_two_ranks_have_the_loss_curve_and_the_weights_of_one(two, one, name):
    (first, _), _ = two
    assert [record["step"] for record in first[name]["history"]] == [1, 2, 3, 4, 5]
    assert losses(one[name]).unique().numel() == 5, "nothing was learnt"
    torch.testing.assert_close(losses(first[name]), losses(one[name]), rtol=0, atol=1e-5)
    torch.testing.assert_close(first[name]["tensors"], one[name]["tensors"], rtol=1e-4, atol=1e-5)


@pytest.mark.slow
def test_a_parameter_counts_as_zero_where_it_has_no_gradient_and_is_left_alone_where_none_has_one(two, one):
    (first, _), _ = two
    for tensors in (first["uneven parameters"]["tensors"], one["uneven parameters"]["tensors"]):
        assert tensors["none"].tolist() == [1.0, 1.0], "a gradient of zero would have brought weight decay"
        assert abs(tensors["some"] - 1).min() > 3e-4


@pytest.mark.slow
@pytest.mark.parametrize("name", [*EQUAL, *OTHERS])
def test_all_ranks_have_the_same_history_and_the_same_bytes(two, name):
    (first, second), _ = two
    assert first[name]["history"] == second[name]["history"]
    for key, tensor in first[name]["tensors"].items():
        assert torch.equal(tensor, second[name]["tensors"][key]), key


@pytest.mark.slow
def test_a_training_killed_and_resumed_on_two_ranks_ends_with_the_same_bytes(two):
    (first, _), folder = two
    assert first["killed"]["history"] == first["whole"]["history"]
    for key, tensor in first["whole"]["tensors"].items():
        assert torch.equal(tensor, first["killed"]["tensors"][key]), key
    # the checkpoint is one file, of the main rank
    assert [path.name for path in (folder / "killed").iterdir()] == ["checkpoint.pt"]


@pytest.mark.slow
def test_a_training_of_two_ranks_is_taken_over_by_one(two, one, tmp_path):
    (first, _), folder = two
    assert read_state(folder / "left")["step"] == 3
    shutil.copytree(folder / "left", tmp_path / "out")
    history, model = segment(tmp_path / "out")
    assert history[:3] == first["cross_entropy"]["history"][:3], "these steps were taken on two ranks"
    torch.testing.assert_close(losses({"history": history}), losses(one["cross_entropy"]), rtol=0, atol=1e-5)
    torch.testing.assert_close(dict(model.state_dict()), one["cross_entropy"]["tensors"], rtol=1e-4, atol=1e-5)


@pytest.mark.slow
def test_two_ranks_share_the_labelling_of_a_round(two, one):
    """The first training's masks are every image's, whoever made them; the rest follows from them."""
    (first, second), folder = two
    masks = sorted(path.name for path in (folder / "rounds" / "result" / "rounds" / "1" / "masks").iterdir())
    assert masks == [f"img{number}.png" for number in range(4)]
    assert not (folder / "rounds" / "result" / "rounds" / "0" / "segmenter.safetensors").exists()
    assert first["rounds"]["history"] == second["rounds"]["history"]
    start = [found["rounds"]["history"][0]["loss"] for found in (first, one)]
    assert start[0] == pytest.approx(start[1], rel=0.05)


@pytest.mark.slow
def test_ranks_draw_random_numbers_of_their_own(two, one):
    (first, _), _ = two
    alone, together = one["draws"]["history"][0]["draw"], first["draws"]["history"][0]["draw"]
    assert abs(alone - together) > 1e-3  # a mean of two draws, of which one is the single process's


# -- who is who -------------------------------------------------------------------------------------------------------


def test_without_torchrun_there_is_one_rank_whatever_other_launchers_say(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "8")
    monkeypatch.setenv("RANK", "3")
    assert (num_ranks(), this_rank(), is_main()) == (1, 0, True)
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "x")
    assert (num_ranks(), this_rank(), is_main()) == (8, 3, False)


@pytest.mark.parametrize(("size", "ranks"), [(10, 2), (10, 3), (5, 4), (4, 4), (17, 8)])
def test_slices_are_the_batch_in_order_and_none_is_empty(monkeypatch, size, ranks):
    slices = []
    for rank in range(ranks):
        monkeypatch.setattr(distributed, "num_ranks", lambda: ranks)
        monkeypatch.setattr(distributed, "this_rank", lambda rank=rank: rank)
        slices.append(own_slice(list(range(size))))
    assert [item for part in slices for item in part] == list(range(size))
    assert {len(part) for part in slices} <= {size // ranks, size // ranks + 1}


# -- how many ---------------------------------------------------------------------------------------------------------


def cuda_devices(monkeypatch, count):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: count > 0)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: count)


@pytest.mark.parametrize(
    ("found", "values", "batch_size", "expected"),
    [
        (4, {"devices": "auto"}, 10, 4),
        (4, {"devices": "auto"}, 3, 3),
        (4, {"devices": "auto", "device": "cuda:1"}, 10, 1),
        (4, {"devices": "auto", "device": "cpu"}, 10, 1),
        (0, {"devices": "auto"}, 10, 1),
        (4, {"devices": 2}, 10, 2),
        (4, {}, 10, 1),
        (0, {"devices": 3, "device": "cpu"}, 10, 3),
    ],
)
def test_devices_are_resolved(monkeypatch, found, values, batch_size, expected):
    cuda_devices(monkeypatch, found)
    assert resolve_devices(Runtime(**values), batch_size) == expected


def test_too_many_devices_are_refused(monkeypatch):
    cuda_devices(monkeypatch, 2)
    with pytest.raises(EnvironmentFailure, match=r"runtime.devices is 3, but torch finds 2 CUDA devices; lower it"):
        resolve_devices(Runtime(devices=3), 10)
    with pytest.raises(ConfigError, match=r"devices is 2, but one step has training.batch_size 1 .*at most 1"):
        resolve_devices(Runtime(devices=2), 1)
    cuda_devices(monkeypatch, 0)
    with pytest.raises(EnvironmentFailure, match=r"torch finds 0 CUDA devices; .*device=cpu for 2 processes"):
        resolve_devices(Runtime(devices=2), 10)


@pytest.mark.parametrize("device", ["cuda:1", "mps"])
def test_several_devices_need_a_device_that_can_be_several(device):
    (problem,) = device_problems(Runtime(device=device, devices=2), 10)
    assert problem.startswith(f"runtime.device '{device}' is one device, runtime.devices asks for 2")


def test_fewer_images_than_ranks_are_refused_before_the_training(monkeypatch, tmp_path):
    from stages.training import loop as training

    monkeypatch.setattr(training, "num_ranks", lambda: 12)
    with pytest.raises(InputError, match=r"a step has 11 images .*, fewer than runtime.devices 12"):
        fit(torch.nn.Conv2d(3, 1, 1), None, tmp_path, config=CONFIG.model_copy(update={"batch_size": 20}))
    assert list(tmp_path.iterdir()) == []
