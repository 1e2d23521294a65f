"""``wsss init``: what is found in a folder, the config that is written for it, and how long it is said to take."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import yaml
from PIL import Image

from pipeline.cli import main as cli
from pipeline.config import starting_config
from pipeline.config.run_config import load_config, shipped_configs
from pipeline.config.starting_config import Speeds, choose_recipe, fit_to_limit, forecast, load_yaml, look_at
from stages.contracts import write_index_mask
from stages.errors import DataError


def save_images(folder: Path, count: int, *, size: tuple[int, int] = (240, 320)) -> list[str]:
    folder.mkdir(parents=True, exist_ok=True)
    names = [f"{number:03}.png" for number in range(count)]
    for number, name in enumerate(names):
        Image.fromarray(np.full((*size, 3), number, np.uint8)).save(folder / name)
    return names


@pytest.fixture
def pets(tmp_path: Path) -> Path:
    """One folder per class."""
    for name, count in (("cat", 5), ("fire hydrant", 4), ("background", 1)):
        save_images(tmp_path / "pets" / name, count)
    return tmp_path / "pets"


@pytest.fixture
def tagged(tmp_path: Path) -> Path:
    """Images with a labels.csv, two of them with masks."""
    folder = tmp_path / "tagged"
    names = save_images(folder / "images", 40)
    rows = [f"{name},{'cat dog' if number % 2 else 'dog'}" for number, name in enumerate(names)]
    (folder / "labels.csv").write_text("\n".join(["image,labels", *rows]) + "\n")
    (folder / "masks").mkdir()
    for name in names[:2]:
        write_index_mask(folder / "masks" / name, np.ones((240, 320), np.uint8))
    return folder


@pytest.fixture
def wsss(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Callable[..., tuple[str, str]]:
    """The command, with steps of known length and no GPU."""
    monkeypatch.setattr(starting_config, "measure_speeds", lambda run, num: Speeds(0.1, 0.2, 224))
    monkeypatch.setattr(starting_config, "count_cores", lambda: 2)
    monkeypatch.setattr("pipeline.engine.gpus.find_gpus", lambda: [])

    def call(*words: str, code: int = 0) -> tuple[str, str]:
        found = cli.main(words)
        captured = capsys.readouterr()
        assert found == code, captured.err + captured.out
        return captured.out, captured.err

    return call


# -- what is written ---------------------------------------------------------------------------------------------------


def test_folders_of_classes_get_a_labels_csv_and_a_config_that_passes(wsss, pets: Path) -> None:
    out, _ = wsss("init", str(pets))
    lines = (pets / "labels.csv").read_text().splitlines()
    assert lines[0] == "image,labels"
    assert {"background_000,", "cat_004,cat;", "fire hydrant_003,fire hydrant;"} < set(lines)
    assert len(lines) == 1 + 10
    assert "2 classes (cat 5, fire hydrant 4)" in out
    assert "each image's label is the name of its folder" in out
    checked, _ = wsss("config", "check", str(pets / "wsss.yaml"))
    assert "2 classes; images: 8 train, 2 val" in checked
    text = (pets / "wsss.yaml").read_text()
    assert "# 10 images, half of them 240 × 320 px or larger; 2 classes" in text
    assert f"wsss run {pets / 'wsss.yaml'}" in text
    wsss("init", str(pets), "--force")  # its own labels.csv does not stand in the way
    assert (pets / "labels.csv").read_text().splitlines() == lines


def test_tagged_images_are_told_by_class_and_mask(wsss, tagged: Path) -> None:
    before = (tagged / "labels.csv").read_bytes()
    out, _ = wsss("init", str(tagged), "--out", str(tagged / "mine.yaml"), "--json")
    found = json.loads(out)
    assert (found["images"], found["classes"], found["masks"]) == (40, {"cat": 20, "dog": 40}, 2)
    assert (found["labels_written"], found["device"]) == (False, "2 CPU cores")
    assert (tagged / "labels.csv").read_bytes() == before
    assert not (tagged / "wsss.yaml").exists()
    wsss("config", "check", str(tagged / "mine.yaml"))


def test_images_beside_their_labels_are_found(wsss, tmp_path: Path) -> None:
    names = save_images(tmp_path, 4)
    (tmp_path / "labels.csv").write_text("image,labels\n" + "".join(f"{name},cat\n" for name in names))
    wsss("init", str(tmp_path))
    assert load_config(tmp_path / "wsss.yaml").data.images == "."  # type: ignore[union-attr]
    wsss("config", "check", str(tmp_path / "wsss.yaml"))


def test_many_large_images_get_the_shipped_recipe(pets: Path) -> None:
    """The numbers of custom.yaml and custom_gpu.yaml stand there and here."""
    shipped = {path.stem: path for path in shipped_configs()}
    found = look_at(pets)
    train = tuple(f"cat_{number}" for number in range(2000))
    found.listing.splits["train"] = train
    object.__setattr__(found, "size", (600, 800))
    for has_gpu, name in ((False, "custom"), (True, "custom_gpu")):
        recipe = choose_recipe(found, has_gpu=has_gpu)
        text = starting_config.write_yaml(recipe, found, Path("x.yaml"), device="", time_text="")
        written, wanted = load_yaml(text).model_dump(), load_config(shipped[name]).model_dump()
        for section in ("train_classifier", "make_attention", "make_masks", "train_segmenter"):
            if has_gpu and section == "train_classifier":
                wanted[section]["training"]["head_lr_factor"] = 10.0
            assert written[section] == wanted[section], section


def test_small_images_and_missing_weights_take_other_networks(pets: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    found = look_at(pets)
    assert (choose_recipe(found, has_gpu=False).backbone, choose_recipe(found, has_gpu=True).backbone) == (
        "tf_efficientnet_lite0",
        "resnet50",
    )
    monkeypatch.setattr(starting_config, "weights_problems", lambda name, weights: ["not installed"])
    recipe = choose_recipe(found, has_gpu=False)
    assert (recipe.backbone, recipe.net["name"]) == ("squeezenet1_1", "largefov")
    load_yaml(starting_config.write_yaml(recipe, found, Path("x"), device="", time_text=""))
    for size, crop in (((100, 90), 80), ((128, 400), 128), ((40, 60), 32)):
        object.__setattr__(found, "size", size)
        recipe = choose_recipe(found, has_gpu=False)
        assert (recipe.backbone == "small", recipe.crop_px) == (min(size) < 128, crop)
        load_yaml(starting_config.write_yaml(recipe, found, Path("x"), device="", time_text=""))


@pytest.mark.parametrize("folder", ["last", "pets.yaml"])
def test_a_folder_whose_name_no_run_can_have(pets: Path, folder: str) -> None:
    found = look_at(pets.rename(pets.with_name(folder)))
    recipe = choose_recipe(found, has_gpu=False)
    written = load_yaml(starting_config.write_yaml(recipe, found, Path("x"), device="", time_text=""))
    assert written.name == "photos"


# -- time --------------------------------------------------------------------------------------------------------------


def test_the_forecast_is_steps_times_their_number(tagged: Path) -> None:
    found = look_at(tagged)
    num_train, num_val = (len(found.listing.splits[name]) for name in ("train", "val"))
    recipe = choose_recipe(found, has_gpu=False)
    assert (recipe.crop_px, recipe.short_side_px) == (224, 256)
    seconds = forecast(recipe, found, Speeds(0.1, 0.2, 112), cores=2)  # a crop of 224 px has four times the pixels
    assert seconds["train_classifier"] == pytest.approx(num_train * recipe.epochs[0] * 0.4 + 10)
    assert seconds["train_segmenter"] == pytest.approx(num_train * recipe.epochs[1] * 0.8 + 10)
    # 7.5 images' worth of pixels, mirrored too, of 256 × 341 px against 224², a third of a step each
    whole = 256 * 256 * 320 / 240 / 224**2 / 3
    assert seconds["make_attention"] == pytest.approx(num_train * 0.4 * whole * 15 + 10)
    assert seconds["make_masks"] == pytest.approx(num_train * 2.0 * 0.0768 / 2 + 10)
    assert seconds["evaluate"] == pytest.approx(num_val * 0.8 * whole * (1 + 2 * 3.125) + 10)


def test_a_cpu_gets_fewer_epochs_then_smaller_images(tagged: Path) -> None:
    found = look_at(tagged)
    recipe = choose_recipe(found, has_gpu=False)

    def fitted(step_s: float) -> tuple[starting_config.Recipe, float]:
        speeds = Speeds(step_s, step_s, 224)
        chosen = fit_to_limit(recipe, found, speeds, cores=2)
        return chosen, sum(forecast(chosen, found, speeds, cores=2).values())

    quick, _ = fitted(0.01)
    assert quick == recipe
    shorter, seconds = fitted(0.9)
    assert shorter.crop_px == 224
    assert recipe.epochs[0] / 2 - 1 <= shorter.epochs[0] < recipe.epochs[0]
    assert seconds <= starting_config.LIMIT_S
    smaller, seconds = fitted(2.0)
    assert smaller.crop_px < 224
    assert seconds <= starting_config.LIMIT_S
    hopeless, seconds = fitted(100.0)
    assert (hopeless.crop_px, hopeless.epochs[0]) == (128, recipe.epochs[0] // 4)
    assert seconds > 3600


def test_a_run_of_more_than_an_hour_is_said(wsss, tagged: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(starting_config, "measure_speeds", lambda run, num: Speeds(100.0, 100.0, 224))
    out, _ = wsss("init", str(tagged))
    assert "more than an hour" in out


def test_steps_are_really_measured(pets: Path) -> None:
    found = look_at(pets)
    object.__setattr__(found, "size", (40, 40))
    recipe = choose_recipe(found, has_gpu=False)
    text = starting_config.write_yaml(recipe, found, Path("x"), device="", time_text="")
    speeds = starting_config.measure_speeds(load_yaml(text), 2)
    assert speeds.crop_px == 32
    assert 0 < speeds.classifier_s < 60
    assert 0 < speeds.segmenter_s < 60


# -- refusals ----------------------------------------------------------------------------------------------------------


def test_an_existing_config_is_kept(wsss, tagged: Path) -> None:
    (tagged / "wsss.yaml").write_text("mine")
    _, error = wsss("init", str(tagged), code=2)
    assert (
        error == f"error: {tagged / 'wsss.yaml'} exists; write over it with --force, or name another file with --out\n"
    )
    assert (tagged / "wsss.yaml").read_text() == "mine"
    wsss("init", str(tagged), "--force")
    assert yaml.safe_load((tagged / "wsss.yaml").read_text())["name"] == "tagged"


def test_folders_without_labels_are_refused_and_nothing_is_written(wsss, tmp_path: Path) -> None:
    _, error = wsss("init", str(tmp_path / "nowhere"), code=2)
    assert "is no folder" in error
    (tmp_path / "empty").mkdir()
    _, error = wsss("init", str(tmp_path / "empty"), code=2)
    assert "found no image and no labels.csv" in error
    save_images(tmp_path / "flat" / "images", 3)
    _, error = wsss("init", str(tmp_path / "flat"), code=2)
    assert "one sub-folder of images per class, found 3 images in images and no labels.csv" in error
    save_images(tmp_path / "split" / "train" / "cat", 2)
    _, error = wsss("init", str(tmp_path / "split"), code=2)
    assert "folders with sub-folders of images: train; name one of them" in error
    (tmp_path / "voc" / "JPEGImages").mkdir(parents=True)
    _, error = wsss("init", str(tmp_path / "voc"), code=2)
    assert "wsss run voc12_resnet50_cam" in error
    assert not list(tmp_path.rglob("wsss.yaml")) + list(tmp_path.rglob("labels.csv"))


def test_wrong_labels_and_broken_images_are_named(tagged: Path, pets: Path) -> None:
    (tagged / "labels.csv").write_text("image,labels\nnone.png,cat\n000.png,cat\n001.png,cat\n")
    with pytest.raises(DataError) as caught:
        look_at(tagged)
    assert caught.value.problems == (
        "labels.csv line 2: image 'none' has no file in images; remove the line or add the image",
    )
    (pets / "a;b").mkdir()
    save_images(pets / "a;b", 1)
    with pytest.raises(DataError, match=r"are no class names: \['a;b'\]; rename them"):
        look_at(pets)
    for path in [path for path in pets.rglob("*.png")]:
        path.write_bytes(b"no image")
    (pets / "a;b" / "000.png").unlink()
    with pytest.raises(DataError, match="none of the images can be opened"):
        look_at(pets)


@pytest.mark.slow
def test_the_config_that_is_written_runs(wsss, pets: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(pets.parent)
    wsss("init", "pets")
    small = {
        "train_classifier.backbone": "{name: small}",
        "train_classifier.augment": "{crop_px: 64, short_side_px: 64}",
        "train_classifier.training.epochs": "1",
        "make_attention": "{short_side_px: 64, scales: [1.0]}",
        "make_masks.refine": "none",
        "train_segmenter.init": "classifier",
        "train_segmenter.net": "{name: largefov, backbone: {name: small}}",
        "train_segmenter.augment": "{crop_px: 64, short_side_px: 64}",
        "train_segmenter.training.epochs": "1",
        "evaluate": "{short_side_px: 64, multi_scale: false}",
        "runtime": "{device: cpu, workers: 0, threads: 1}",
    }
    words = [word for name, value in small.items() for word in ("--set", f"{name}={value}")]
    out, _ = wsss("run", "pets/wsss.yaml", *words)
    assert "report: " in out
