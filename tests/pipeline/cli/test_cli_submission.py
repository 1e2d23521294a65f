"""``wsss submission``: the archive of a run, what is said where there is none, and the check of anybody's."""

import hashlib
import io
import json
import tarfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from pipeline.cli import main as cli
from pipeline.config.run_config import find_config, load_config
from pipeline.delivery.submission import archive_command
from pipeline.engine.plan import plan_run
from pipeline.store.artifacts import Store
from stages.contracts import SilentProgress, voc_palette, write_index_mask
from stages.prepare_data import prepare_data
from tests.pipeline.whole_runs.here import stages_here

FOLDER = "results/VOC2012/Segmentation/comp6_test_cls"
CLASSES = {"cat": 8, "bird": 3}
"""Name to VOC's value; in the run cat is 1 and bird is 2."""

CONFIG = """
name: tiny
data: {format: voc, root: voc, classes: [cat, bird], train_list: train, score_list: null, test_list: test}
train_classifier:
  backbone: {name: small}
  method: {name: cam}
  augment: {crop_px: 64}
  training: {steps: 1, batch_size: 2, learning_rate: 0.05}
make_masks: {threshold: 0.3}
train_segmenter:
  supervision: full
  net: {name: largefov, backbone: {name: small}}
  init: random
  augment: {crop_px: 64}
  training: {steps: 30, batch_size: 4, learning_rate: 0.1}
evaluate: {splits: [val, test], multi_scale: false}
runtime: {device: cpu, workers: 0, processes: 1, threads: 1}
"""

TEST = {"2008_000006": (64, 80), "2008_000008": (72, 64), "2008_000011": (64, 64)}
"""Test images with (height, width)."""


def write_voc(root: Path) -> None:
    """VOC's layout: six images for training, two for val, three for test, of which one has a mask."""
    for folder in ("JPEGImages", "SegmentationClass", "Annotations", "ImageSets/Segmentation"):
        (root / folder).mkdir(parents=True)
    train = {f"2007_{number:06d}": (64, 64) for number in range(6)}
    val = {f"2007_{number:06d}": (64, 64) for number in range(10, 12)}
    for split, images in {"train": train, "val": val, "test": TEST}.items():
        (root / f"ImageSets/Segmentation/{split}.txt").write_text("".join(f"{i}\n" for i in images))
        for number, (image_id, size) in enumerate(images.items()):
            name = list(CLASSES)[number % 2]
            write_image(root, image_id, size, name, has_mask=split != "test" or number == 0)


def write_image(root: Path, image_id: str, size: tuple[int, int], name: str, *, has_mask: bool) -> None:
    mask = np.zeros(size, np.uint8)
    mask[16:48, 16:48] = CLASSES[name]
    pixels = np.where(mask[..., None] > 0, voc_palette()[CLASSES[name]] + 60, 30).astype(np.uint8)
    Image.fromarray(pixels).save(root / f"JPEGImages/{image_id}.jpg")
    xml = f"<annotation><object><name>{name}</name></object></annotation>"
    (root / f"Annotations/{image_id}.xml").write_text(xml)
    if has_mask:
        write_index_mask(root / f"SegmentationClass/{image_id}.png", mask)


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    write_voc(tmp_path / "voc")
    (tmp_path / "tiny.yaml").write_text(CONFIG)
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("PREFECT_API_URL", raising=False)
    return tmp_path


@pytest.fixture
def wsss(folder: Path, capsys: pytest.CaptureFixture[str]) -> Callable[..., tuple[str, str]]:
    def call(*words: str, code: int = 0) -> tuple[str, str]:
        found = cli.main(words)
        captured = capsys.readouterr()
        assert found == code, captured.err + captured.out
        return captured.out, captured.err

    return call


@pytest.fixture
def wsss_json(wsss: Callable[..., tuple[str, str]]) -> Callable[..., dict]:
    return lambda *words, code=0: json.loads(wsss(*words, "--json", code=code)[0])


def pack(path: Path, ids: list[str], size: tuple[int, int] | None = None) -> None:
    with tarfile.open(path, "w:gz") as archive:
        for image_id in ids:
            image = Image.fromarray(np.zeros(size or TEST[image_id], np.uint8))
            image.putpalette(voc_palette().tobytes())
            buffer = io.BytesIO()
            image.save(buffer, format="PNG")
            info = tarfile.TarInfo(f"{FOLDER}/{image_id}.png")
            info.size = len(buffer.getvalue())
            archive.addfile(info, io.BytesIO(buffer.getvalue()))


# -- a run's archive --------------------------------------------------------------------------------------------------


def test_a_run_becomes_an_archive(folder: Path, wsss, wsss_json):
    document = wsss_json("submission", "tiny.yaml", "--out", "a.tar.gz", code=3)
    assert "predict them with: wsss run tiny.yaml" in document["error"]["message"]
    assert document["archive"] is None

    with stages_here():
        out, _ = wsss("run", "tiny.yaml", "--engine", "local")
    assert out.rstrip().endswith("archive: wsss submission tiny.yaml --out tiny.tar.gz")
    assert "test: 2 of 3 images are predicted without a score" in out

    assert wsss_json("submission", "tiny.yaml", "--out", "a.tar.gz")["num_masks"] == 3
    assert {8, 3} & check_masks(folder, Path("a.tar.gz")), "nothing but background would pass with any values"
    assert "fine: 3 masks for comp6" in wsss("submission", "tiny.yaml", "--check", "a.tar.gz")[0]

    metrics = wsss_json("run", "tiny.yaml", "--engine", "local")["metrics"]
    assert 0 < metrics["segmenter_test.miou"] <= 1
    assert set(metrics["segmenter_test.iou"]) <= {"background", "cat", "bird"}
    report = Path(wsss_json("report", "tiny.yaml")["report"]).read_text()
    assert "wsss submission tiny.yaml --out tiny.tar.gz" in report
    assert "Segmenter on test" in report


def publish_predictions(
    folder: Path, sizes: dict[str, tuple[int, int]] = TEST, overrides: tuple[str, ...] = ()
) -> Path:
    """Put a run's images and its test predictions into the store; returns the folder of these."""
    run, store = load_config(folder / "tiny.yaml", overrides), Store(folder / "artifacts")
    keys = plan_run(run, store.digest_cache).keys
    prepared, _ = store.work_dir("prepare_data", keys["prepare_data"])
    prepare_data(run.prepare_data, data=run.data, out=prepared, progress=SilentProgress(), runtime=run.runtime)
    evaluated, _ = store.work_dir("evaluate", keys["evaluate"])
    for number, (image_id, size) in enumerate(sizes.items()):
        write_index_mask(evaluated / f"predictions/{image_id}.png", np.full(size, number, np.uint8))
    for stage in ("prepare_data", "evaluate"):
        store.publish(stage, keys[stage], content={"mask_supervision": []}, run={})
    return store.path("evaluate", keys["evaluate"]) / "predictions"


def test_the_archive_has_vocs_values_and_the_same_bytes_each_time(folder: Path, wsss, wsss_json):
    publish_predictions(folder)
    made = wsss_json("submission", "tiny.yaml", "--out", "deep/a.tar.gz")
    data = Path("deep/a.tar.gz").read_bytes()
    assert (made["archive"], made["competition"], made["num_masks"]) == ("deep/a.tar.gz", "comp6", 3)
    assert (made["size_bytes"], made["sha256"]) == (len(data), hashlib.sha256(data).hexdigest())
    assert any("the list has 3 images" in text for text in made["warnings"])
    assert "the run knows 2 of VOC's 20 classes: the others score 0" in made["warnings"]
    assert check_masks(folder, Path("deep/a.tar.gz")) == {0, 8, 3}
    wsss("submission", "tiny.yaml", "--out", "again.tgz")
    assert Path("again.tgz").read_bytes() == data

    out, _ = wsss("submission", "tiny.yaml", "--out", "b.tgz", "--competition", "comp5")
    assert out.startswith("b.tgz: 3 masks for comp5, checked\n  masks: one scale, no CRF (scored as segmenter.miou)\n")
    assert "warning: comp5 is for methods trained on VOC's own trainval images alone" in out

    assert "fine: 3 masks for comp6" in wsss("submission", "tiny.yaml", "--check", "again.tgz")[0]
    pack(Path("other.tgz"), list(TEST)[1:], size=(64, 64))
    document = wsss_json("submission", "tiny.yaml", "--check", "other.tgz", code=2)
    assert document["counts"] == {"missing image": 1, "wrong size": 1}


def test_the_masks_of_several_scales_are_packed_where_the_config_asks_for_them(folder: Path, wsss_json):
    wanted = ("evaluate.multi_scale=true", "evaluate.predictions=multi_scale")
    words = ("submission", "tiny.yaml", "--out", "a.tgz", *(word for text in wanted for word in ("--set", text)))
    publish_predictions(folder)
    message = wsss_json(*words, code=3)["error"]["message"]
    assert message.endswith(f"wsss run tiny.yaml --set {wanted[0]} --set {wanted[1]}"), "those of one scale are others"
    publish_predictions(folder, overrides=wanted)
    expected = "mean of scales 0.5, 0.75, 1, 1.25, 1.5, each with its mirror image; no CRF (scored as "
    assert wsss_json(*words)["masks"] == expected + "segmenter.miou_ms)"


def test_what_the_server_would_refuse_is_not_written(folder: Path, wsss_json):
    (folder / "a.tgz").write_bytes(b"an earlier one")
    predicted = publish_predictions(folder, TEST | {"2008_000011": (60, 64)})
    document = wsss_json("submission", "tiny.yaml", "--out", "a.tgz", code=4)
    assert "a.tgz: 1 problem in the archive; it was not written" in document["error"]["message"]
    assert document["error"]["message"].endswith("make them anew with: wsss run tiny.yaml --force evaluate")
    assert "wrong size (1): 2008_000011.png is 64 × 60" in document["error"]["problems"][0]
    assert (folder / "a.tgz").read_bytes() == b"an earlier one"
    damaged = predicted / "2008_000011.png"
    damaged.write_bytes(bytes(damaged.stat().st_size))
    document = wsss_json("submission", "tiny.yaml", "--out", "a.tgz", code=4)
    assert "is damaged; set aside" in document["error"]["message"]
    assert "2008_000011.png: the content differs" in document["error"]["problems"][0]


def test_other_predictions_of_the_run_are_packed(folder: Path, wsss_json):
    masks = folder / "masks"
    for image_id, size in TEST.items():
        write_index_mask(masks / f"{image_id}.png", np.full(size, 2, np.uint8))
    (masks / "areas.csv").write_text("image,class,pixels\n")
    reference = ("--image-list", "voc/ImageSets/Segmentation/test.txt", "--images", "voc/JPEGImages")
    words = ("submission", "tiny.yaml", "--out", "a.tgz", "--predictions", "masks")
    made = wsss_json(*words, *reference)
    assert (made["num_masks"], made["masks"]) == (3, "those of masks"), "the store is empty"
    with tarfile.open("a.tgz") as tar, Image.open(tar.extractfile(f"{FOLDER}/2008_000006.png")) as image:
        assert set(np.unique(np.asarray(image)).tolist()) == {3}
    assert "index them with: wsss run tiny.yaml" in wsss_json(*words, code=3)["error"]["message"]

    write_index_mask(masks / "2008_000008.png", np.full((9, 9), 3, np.uint8))
    text = wsss_json(*words, *reference, code=2)["error"]["message"]
    assert "2008_000008.png: expected class indices 0 … 2 of the run, found 3" in text
    (masks / "2008_000006.png").unlink()
    text = wsss_json(*words, *reference, code=2)["error"]["message"]
    assert "masks has no prediction of 1 of 3 images: '2008_000006'" in text


def check_masks(folder: Path, archive: Path) -> set[int]:
    """Every mask is the cached prediction in VOC's values; returns those that occur."""
    (predictions,) = (folder / "artifacts/evaluate").glob("*/predictions")
    values, seen = np.array([0, 8, 3], np.uint8), set()
    with tarfile.open(archive) as tar:
        for image_id, size in TEST.items():
            with Image.open(tar.extractfile(f"{FOLDER}/{image_id}.png")) as image:
                found = np.asarray(image)
            with Image.open(predictions / f"{image_id}.png") as image:
                np.testing.assert_array_equal(found, values[np.asarray(image)])
            assert found.shape == size
            seen |= set(np.unique(found).tolist())
    return seen


@pytest.mark.parametrize(
    ("overrides", "command"),
    [
        (["evaluate.splits=[val]"], "--set 'evaluate.splits=[val,test]'"),
        (
            ["evaluate.splits=[val]", "data.test_list=null"],
            "--set 'evaluate.splits=[val,test]' --set data.test_list=test",
        ),
    ],
)
def test_a_run_without_test_is_exit_3_with_the_command(wsss_json, overrides: list[str], command: str):
    words = [word for text in overrides for word in ("--set", text)]
    document = wsss_json("submission", "tiny.yaml", "--out", "a.tgz", *words, code=3)
    message = document["error"]["message"]
    assert message.endswith(command)
    assert "wsss run tiny.yaml --set 'evaluate.splits=[val]'" in message


@pytest.mark.parametrize(
    ("words", "text"),
    [
        (("demo", "--out", "a.tgz"), "data.format is synthetic: the archive is for PASCAL VOC 2012's test server"),
        (("demo", "--check", "a.tgz"), "data.format is synthetic"),
        (("tiny.yaml", "--out", "a.zip"), "--out a.zip: expected a name that ends in .tar.gz or .tgz"),
        (("tiny.yaml",), "expected CONFIG --out FILE.tar.gz, or --check FILE"),
        (("--out", "a.tgz"), "expected CONFIG --out FILE.tar.gz, or --check FILE"),
        (("tiny.yaml", "--out", "a.tgz", "--check", "b.tgz"), "--check writes nothing"),
        (("tiny.yaml", "--out", "a.tgz", "--images", "voc"), "it belongs to --check or --predictions"),
        (("tiny.yaml", "--check", "a.tgz", "--image-list", "x"), "CONFIG knows its own"),
        (("--check", "a.tgz"), "expected an archive, found no file a.tgz"),
        (("--check", "a.tgz", "--image-list", "none.txt"), "the list none.txt cannot be used"),
        (("--check", "a.tgz", "--images", "none"), "found no folder none"),
    ],
)
def test_wrong_words_are_exit_2_with_the_reason(folder: Path, wsss_json, words: tuple[str, ...], text: str):
    document = wsss_json("submission", *words, code=2)
    assert text in document["error"]["message"]
    assert not list(folder.glob("a.*"))


def test_a_set_without_masks_has_nothing_to_send(wsss_json):
    options = ("--set", "evaluate.segmentation=false", "--set", "evaluate.localization={}")
    document = wsss_json("submission", "tiny.yaml", "--out", "a.tgz", *options, code=2)
    assert "this run predicts no masks" in document["error"]["message"]


# -- anybody's archive ------------------------------------------------------------------------------------------------


def test_anybodys_archive_is_checked_against_a_list_and_images(folder: Path, wsss, wsss_json):
    pack(folder / "a.tar.gz", list(TEST))
    reference = ("--image-list", "voc/ImageSets/Segmentation/test.txt", "--images", "voc/JPEGImages")
    out, _ = wsss("submission", "--check", "a.tar.gz", *reference)
    assert out.startswith("a.tar.gz is fine: 3 masks for comp6\n  warning: the list has 3 images")
    document = wsss_json("submission", "--check", "a.tar.gz", *reference)
    assert (document["problems"], document["num_masks"], document["competition"]) == ([], 3, "comp6")

    document = wsss_json("submission", "--check", "a.tar.gz", code=2)
    assert document["counts"] == {"wrong count": 1}
    assert document["error"]["problems"] == document["problems"]
    document = wsss_json("submission", "--check", "a.tar.gz", "--competition", "comp5", *reference, code=2)
    assert document["counts"]["two competitions"] == 3

    pack(folder / "b.tar.gz", ["2008_000006", "2008_000008"], size=(64, 64))
    _, err = wsss("submission", "--check", "b.tar.gz", *reference, code=2)
    assert err.splitlines() == [
        "error: b.tar.gz: 3 problems in the archive",
        "  - missing image (1): 2008_000011.png. Add its mask",
        "  - wrong size (2): 2008_000006.png is 64 × 64 (width × height), its image 80 × 64 (width × height); "
        "2008_000008.png is 64 × 64 (width × height), its image 64 × 72 (width × height). "
        "A mask has the size of its image: undo padding and scaling",
    ]


def test_the_command_is_offered_to_runs_that_predict_vocs_test_list(folder: Path):
    config = folder / "tiny.yaml"
    assert archive_command(load_config(config, ["name=my.run"])) == "wsss submission CONFIG --out my.run.tar.gz"
    assert archive_command(load_config(config, ["evaluate.splits=[val]"])) is None
    assert archive_command(load_config(find_config("demo"))) is None
