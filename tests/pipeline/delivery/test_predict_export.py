"""``wsss predict`` and ``wsss export`` as a user runs them, on a segmenter that a run has trained.

What needs no segmenter is in ``test_cli_predict.py``.
"""

import json
import os
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from pipeline.cli import main as cli
from stages.contracts import read_index_mask
from tests.pipeline.whole_runs.here import wsss_here
from tests.pipeline.whole_runs.tiny_run import tiny_yaml

CONFIG = tiny_yaml(
    data={"num_train": 8, "num_val": 3, "num_classes": 3},
    train_segmenter={
        "supervision": "full",
        "init": "random",
        "training": {"steps": 25, "batch_size": 8, "learning_rate": 0.05},
    },
    evaluate={"multi_scale": True, "scales": [0.75, 1.0]},
)


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a config, the store of its run up to the segmenter, and three shots."""
    home = tmp_path_factory.mktemp("home")
    (home / "tiny.yaml").write_text(CONFIG)
    wsss_here(home, "run", "tiny.yaml", "--engine", "local", "--until", "train_segmenter")
    (images,) = home.glob("artifacts/prepare_data/*/data/JPEGImages")
    (home / "shots").mkdir()
    for path in sorted(images.glob("val_*"))[:3]:
        (home / "shots" / path.name).write_bytes(path.read_bytes())
    return home


@pytest.fixture
def wsss(home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]):
    """Calls a command in ``home`` with --json; ``{out}`` in a word is a folder of this test."""
    monkeypatch.chdir(home)
    monkeypatch.delenv("PREFECT_API_URL", raising=False)

    def call(*words: str, code: int = 0) -> dict:
        found = cli.main([*(word.format(out=tmp_path) for word in words), "--json"])
        captured = capsys.readouterr()
        assert found == code, captured.err + captured.out
        return json.loads(captured.out)

    return call


def masks(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.glob("*.png")}


def test_a_config_and_its_export_give_the_same_bytes(wsss, home: Path, tmp_path: Path):
    document = wsss("predict", "tiny.yaml", "shots", "--out", "{out}/config")
    assert (document["predicted"], document["skipped"], document["unreadable"]) == (3, 0, [])
    assert document["images_per_s"] > 0
    exported = wsss("export", "tiny.yaml", "--out", "{out}/model")
    assert exported["files"] == ["model.safetensors", "model.onnx", "README.md", "config.json"]
    assert exported["onnx"]["checked_shapes"][-1] == [1, 3, 64, 64]  # an image of the data set
    assert exported["onnx"]["max_abs_difference"] <= 1e-3 * max(1, exported["onnx"]["max_abs_logit"])
    wsss("predict", "--model", "{out}/model", "shots", "--out", "{out}/model_masks")
    one, other = masks(tmp_path / "config"), masks(tmp_path / "model_masks")
    assert one == other
    assert len(one) == 3
    assert (tmp_path / "config" / "areas.csv").read_bytes() == (tmp_path / "model_masks" / "areas.csv").read_bytes()
    assert any(len(np.unique(read_index_mask(tmp_path / "config" / name))) > 1 for name in one)


def test_provenance_names_key_labels_and_start(wsss, home: Path, tmp_path: Path):
    key = wsss("export", "tiny.yaml", "--out", "{out}/model", "--no-onnx")["key"]
    (artifact,) = (home / "artifacts" / "train_segmenter").glob("[0-9a-f]*")
    provenance = json.loads((tmp_path / "model" / "config.json").read_text())["provenance"]
    assert provenance["key"] == key == artifact.name
    manifest = json.loads((artifact / "manifest.json").read_text())
    assert provenance["commit"] == manifest["run"]["revision"]
    assert provenance["mask_supervision"] == manifest["content"]["mask_supervision"]
    assert len(provenance["mask_supervision"]) == 8  # supervision: full
    assert (provenance["init"], provenance["initial_weights"]) == ("random", None)


def test_options_change_the_masks_and_defaults_are_the_configs(wsss, tmp_path: Path):
    wsss("predict", "tiny.yaml", "shots", "--out", "{out}/default")
    again = wsss("predict", "tiny.yaml", "shots", "--out", "{out}/default", "--scales", "0.75,1.0", "--flip")
    assert again["skipped"] == 3  # these are the config's values
    wsss("predict", "tiny.yaml", "shots", "--out", "{out}/crf", "--crf", "irn")
    wsss("predict", "tiny.yaml", "shots", "--out", "{out}/single", "--scales", "1", "--no-flip")
    found = {name: masks(tmp_path / name) for name in ("default", "crf", "single")}
    assert found["default"] != found["crf"]
    assert found["default"] != found["single"]
    refused = wsss("predict", "tiny.yaml", "shots", "--out", "{out}/default", "--scales", "1", code=2)
    assert len(refused["error"]["problems"]) == 3
    assert "--force" in refused["error"]["message"]


def test_windows_are_used_where_they_are_asked_for(wsss, home: Path, tmp_path: Path):
    with Image.open(sorted((home / "shots").iterdir())[0]) as image:
        image.resize((320, 160)).save(tmp_path / "wide.png")
    document = wsss("predict", "tiny.yaml", "{out}/wide.png", "--out", "{out}/masks", "--window", "128")
    assert document["windowed"] == 1
    assert read_index_mask(tmp_path / "masks" / "wide.png").shape == (160, 320)


def test_unreadable_images_end_with_2_and_the_others_are_there(wsss, home: Path, tmp_path: Path):
    (tmp_path / "text.jpg").write_text("no image")
    (tmp_path / "zero.png").touch()
    document = wsss("predict", "tiny.yaml", "shots", "{out}/text.jpg", "{out}/zero.png", "--out", "{out}/m", code=2)
    assert document["predicted"] == 3
    assert len(masks(tmp_path / "m")) == 3
    assert document["error"]["message"] == "2 images could not be read; the others are done"
    assert [Path(text.split(":")[0]).name for text in document["error"]["problems"]] == ["text.jpg", "zero.png"]


@pytest.mark.parametrize(
    ("words", "text"),
    [
        (["predict", "tiny.yaml", "shots", "--out", "x", "--scales", "1,9"], "options"),
        (["predict", "tiny.yaml", "shots", "--out", "x", "--crf", "magic"], "options"),
        (["predict", "tiny.yaml", "shots", "--out", "x", "--window", "7"], "options"),
        (["predict", "tiny.yaml", "shots", "--out", "x", "--device", "abacus"], "--device"),
        (["export", "tiny.yaml", "--out", "shots", "--no-onnx"], "other files"),
    ],
)
def test_wrong_words_end_with_2(wsss, words: list[str], text: str):
    assert text in wsss(*words, code=2)["error"]["message"]
    assert not Path("x").exists()


def test_a_damaged_model_is_named_and_ends_with_4(wsss, tmp_path: Path):
    wsss("export", "tiny.yaml", "--out", "{out}/model", "--no-onnx")
    tensors = tmp_path / "model" / "model.safetensors"
    os.truncate(tensors, tensors.stat().st_size - 4)
    document = wsss("predict", "--model", "{out}/model", "shots", "--out", "{out}/m", code=4)
    assert str(tensors) in document["error"]["message"]
    assert "export the model again" in document["error"]["message"]
