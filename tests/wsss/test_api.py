"""``import wsss`` is quick and light, and its names do what the commands do."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import wsss
from stages.contracts import read_index_mask, write_index_mask
from stages.errors import ConfigError, DamagedFileError, DataError, InputError, MissingArtifactError
from tests.stages.trained_nets import save_lively_segmenter, save_noise

KEY = "0123456789abcdef"


def test_importing_is_light() -> None:
    script = "import time; t = time.perf_counter(); import wsss; s = time.perf_counter() - t; import sys, json;"
    script += "print(json.dumps([s, sorted({'torch', 'prefect', 'numpy', 'pydantic'} & set(sys.modules))]))"
    seconds, heavy = min(
        json.loads(subprocess.run([sys.executable, "-c", script], capture_output=True, check=True).stdout)
        for _ in range(3)
    )
    assert heavy == []
    assert seconds < 0.2


def test_every_name_is_there_and_others_are_not() -> None:
    assert all(callable(getattr(wsss, name)) for name in wsss.__all__)
    assert dir(wsss) == sorted(wsss.__all__)
    with pytest.raises(AttributeError, match=r"no attribute 'refin'; it has .*refine"):
        wsss.refin  # noqa: B018 - the access is the test


def masks(folder: Path, **values: list[list[int]]) -> Path:
    folder.mkdir()
    for name, rows in values.items():
        write_index_mask(folder / f"{name}.png", np.array(rows, np.uint8))
    return folder


def test_scores_of_two_folders_are_those_of_all_pixels_together(tmp_path: Path) -> None:
    truth = masks(tmp_path / "t", a=[[0, 0, 1, 1]], b=[[0, 2, 255, 2]])
    found = masks(tmp_path / "p", a=[[0, 1, 1, 1]], b=[[0, 2, 2, 255]], c=[[0]])
    scores = wsss.score(truth, found)
    # class 0: hit 2 (a, b), union 4 (one to 1, one unsure of 2 that counts as background); 1: 2 of 3; 2: 1 of 2
    assert scores.iou == pytest.approx({"0": 2 / 4, "1": 2 / 3, "2": 1 / 2})
    assert scores.miou == pytest.approx((2 / 4 + 2 / 3 + 1 / 2) / 3)
    assert scores.pixel_accuracy == pytest.approx(5 / 7)
    assert (scores.num_images, scores.not_scored) == (2, ("c.png",))
    assert scores.miou_by_image["a"] == pytest.approx((1 / 2 + 2 / 3) / 2)
    dropped = wsss.score(truth, found, classes=["cat", "dog", "cow"], unsure="drop")
    assert dropped.iou == pytest.approx(
        {"background": 2 / 3, "cat": 2 / 3, "dog": 1.0, "cow": float("nan")}, nan_ok=True
    )


def test_every_mask_that_cannot_be_scored_is_named(tmp_path: Path) -> None:
    truth = masks(tmp_path / "t", a=[[0, 1]], b=[[0, 1]], c=[[0, 1]], d=[[0, 9]], e=[[1, 0]])
    found = masks(tmp_path / "p", a=[[0, 1]], c=[[0], [1]], d=[[0, 1]])
    Image.new("RGB", (2, 1)).save(found / "e.png")
    with pytest.raises(DataError, match="4 of 5 masks") as error:
        wsss.score(truth, found, classes=["cat"])
    missing, size, value, colours = error.value.problems
    assert "b.png: no prediction for it in" in missing
    assert "expected 1 × 2 pixels" in size
    assert "found 2 × 1" in size
    assert "expected class indices up to 1 and 255, found 9" in value
    assert "found mode RGB" in colours
    with pytest.raises(InputError, match="expected masks of class indices"):
        wsss.score(truth, tmp_path)
    with pytest.raises(InputError, match="expected a folder"):
        wsss.score(truth, tmp_path / "nowhere")


def test_a_segmenter_gives_what_wsss_predict_writes(tmp_path: Path) -> None:
    from pipeline.cli.main import main
    from stages.contracts import SilentProgress
    from stages.scoring.export import export_segmenter
    from stages.scoring.prediction import PredictionConfig

    trained = save_lively_segmenter(tmp_path / "trained")
    photo = save_noise(tmp_path / "photos" / "x.png", (64, 80), seed=1)
    options = PredictionConfig(scales=(0.75, 1.0), multi_scale=True, crf=True)
    export_segmenter(
        trained, tmp_path / "model", prediction=options, provenance={}, progress=SilentProgress(), onnx=False
    )
    words = ["predict", "--model", str(tmp_path / "model"), str(tmp_path / "photos"), "--out", str(tmp_path / "out")]
    assert main([*words, "--device", "cpu"]) == 0
    segmenter = wsss.Segmenter.load(tmp_path / "model", device="cpu")
    mask = segmenter.predict(tmp_path / "photos" / "x.png")
    assert np.array_equal(mask, read_index_mask(tmp_path / "out" / "x.png"))
    assert segmenter.classes[0] == "background"
    plain = wsss.Segmenter.load(trained, device="cpu")
    probabilities = plain.probabilities(tmp_path / "photos" / "x.png")
    assert probabilities.shape == (len(plain.classes), 64, 80)
    assert probabilities.sum(axis=0) == pytest.approx(1, abs=1e-5)
    assert np.array_equal(plain.predict(tmp_path / "photos" / "x.png"), probabilities.argmax(0))
    assert not np.array_equal(segmenter.predict(tmp_path / "photos" / "x.png", crf=None, scales=[1.0]), mask)
    with pytest.raises(InputError, match="options") as error:
        plain.predict(tmp_path / "photos" / "x.png", scale=2)
    assert any("scale" in problem for problem in error.value.problems)
    del photo


def test_a_segmenter_of_a_store_whose_classes_were_edited_is_refused(tmp_path: Path) -> None:
    from pipeline.store.artifacts import open_store

    store = open_store(tmp_path / "store")
    work, _ = store.work_dir("train_segmenter", KEY)
    save_lively_segmenter(work)
    content = {"stage": "train_segmenter", "key": KEY, "mask_supervision": [], "metrics": {}}
    path = store.publish("train_segmenter", KEY, content=content, run={}).path
    assert wsss.Segmenter.load(path, device="cpu").classes == ("background", "auk", "bee")
    record = path / "segmenter.json"
    record.write_text(record.read_text().replace('"auk"', '"eel"'))
    with pytest.raises(DamagedFileError, match="is damaged or was edited") as error:
        wsss.Segmenter.load(path, device="cpu")
    assert "segmenter.json" in str(error.value)


def test_a_segmenter_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"config\.json"):
        wsss.Segmenter.load(tmp_path)
    with pytest.raises(ConfigError, match="no config file nothing"):
        wsss.Segmenter.load("nothing")
    with pytest.raises(MissingArtifactError, match="wsss run demo"):
        wsss.Segmenter.load("demo", artifacts=tmp_path / "store")


def test_a_run_from_python(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    small = {"num_train": 6, "num_val": 2}
    options = {"artifacts": tmp_path / "store", "until": "prepare_data", "data": small}
    outcome = wsss.run("demo", **options)
    assert outcome.metrics == {"data.num_train": 6, "data.num_val": 2}
    assert "prepare_data" in capsys.readouterr().out
    again = wsss.run("demo", quiet=True, **options)
    assert [stage.state for stage in again.stages] == ["cached"]
    assert capsys.readouterr() == ("", "")
    with pytest.raises(ConfigError) as error:
        wsss.run("demo", quiet=True, seed="x", data={"num_trains": 3})
    assert len(error.value.problems) == 2


def test_names_meet_in_any_unicode_form_and_nothing_counted_is_no_score(tmp_path: Path) -> None:
    truth = masks(tmp_path / "t", **{"caf\u00e9": [[0, 1]]})
    found = masks(tmp_path / "p", **{"cafe\u0301": [[0, 1]]})
    assert wsss.score(truth, found).miou == 1
    with pytest.raises(InputError, match="different names without background"):
        wsss.score(truth, found, classes=["cat", "cat"])
    with pytest.raises(DataError, match="every pixel is 255"):
        wsss.score(masks(tmp_path / "void", a=[[255, 255]]), masks(tmp_path / "any", a=[[0, 1]]))
