"""Anybody's images: masks, overlays and areas, what is skipped, what is refused, and what is done without memory."""

import csv
import os
from collections.abc import Iterable
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from stages.contracts import Runtime, SilentProgress, read_index_mask
from stages.data.pictures import find_pictures
from stages.errors import EnvironmentFailure, InputError
from stages.ops import multi_scale as inference
from stages.ops.crf.dense_crf import CrfConfig
from stages.scoring.exported_model import trained_source
from stages.scoring.image_prediction import PredictionSummary, overlay_mask, predict_pictures
from stages.scoring.prediction import PredictionConfig
from stages.scoring.window_prediction import PredictOptions
from tests.stages.trained_nets import CLASSES, save_lively_segmenter, save_noise

RUNTIME = Runtime(device="cpu", processes=1, threads=1)
PLAIN = PredictOptions()


@pytest.fixture(scope="module")
def segmenter(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_lively_segmenter(tmp_path_factory.mktemp("segmenter"))


@pytest.fixture
def shots(tmp_path: Path) -> Path:
    for number, size in enumerate([(64, 96), (64, 96), (80, 70), (64, 96)]):
        save_noise(tmp_path / "shots" / f"{number}.png", size, seed=number)
    return tmp_path / "shots"


def predict(
    segmenter: Path,
    words: Iterable[Path],
    out: Path,
    options: PredictOptions = PLAIN,
    *,
    force: bool = False,
    progress: SilentProgress | None = None,
) -> PredictionSummary:
    return predict_pictures(
        trained_source(segmenter),
        find_pictures([str(word) for word in words], out).pictures,
        options,
        out=out,
        progress=progress or SilentProgress(),
        runtime=RUNTIME,
        force=force,
    )


def read_areas(out: Path) -> dict[str, dict[str, tuple[int, float]]]:
    found: dict[str, dict[str, tuple[int, float]]] = {}
    with (out / "areas.csv").open(newline="") as file:
        for row in csv.DictReader(file):
            found.setdefault(row["image"], {})[row["class"]] = (int(row["pixels"]), float(row["ratio"]))
    return found


def masks(out: Path) -> dict[str, bytes]:
    return {path.relative_to(out).as_posix(): path.read_bytes() for path in sorted(out.rglob("*.png"))}


# -- results ----------------------------------------------------------------------------------------------------------


def test_names_that_are_not_utf8_keep_their_bytes(segmenter: Path, tmp_path: Path):
    (tmp_path / "shots").mkdir()
    name = os.fsdecode(b"caf\xe9 1")
    save_noise(tmp_path / "shots" / "x.png", (64, 96), seed=0)
    (tmp_path / "shots" / "x.png").rename(tmp_path / "shots" / f"{name}.png")
    out = tmp_path / "out"
    assert predict(segmenter, [tmp_path / "shots"], out).problems == []
    assert [os.fsencode(path.name) for path in (out / "overlays").iterdir()] == [b"caf\xe9 1.jpg"]
    assert (out / f"{name}.png").is_file()
    assert {line.partition(b",")[0] for line in (out / "areas.csv").read_bytes().splitlines()[1:]} == {b"caf\xe9 1"}


def test_masks_are_the_networks_and_areas_sum_to_the_image(segmenter: Path, shots: Path, tmp_path: Path):
    out = tmp_path / "out"
    summary = predict(segmenter, [shots], out, PredictOptions(scales=(0.75, 1.0), flip=True))
    assert (summary.predicted, summary.skipped, summary.problems) == (4, 0, [])
    areas = read_areas(out)
    net = trained_source(segmenter).load("cpu")
    seen = set()
    for number in range(4):
        mask = read_index_mask(out / f"{number}.png")
        pixels = np.asarray(Image.open(shots / f"{number}.png"))
        expected = expected_mask(net, pixels, scales=(0.75, 1.0), flip=True)
        assert (mask == expected).mean() > 0.999  # other images in the batch may move a last bit
        counted = {name: pixels for name, (pixels, _) in areas[str(number)].items()}
        names = ("background", *CLASSES)
        assert counted == {names[value]: int((mask == value).sum()) for value in np.unique(mask)}
        assert sum(counted.values()) == mask.size
        assert sum(ratio for _, ratio in areas[str(number)].values()) == pytest.approx(1, abs=2e-6)
        with Image.open(out / "overlays" / f"{number}.jpg") as overlay:
            assert overlay.size == (mask.shape[1], mask.shape[0])
        seen |= set(np.unique(mask).tolist())
    assert seen == {0, 1, 2}  # else the comparison says little


def expected_mask(net: torch.nn.Module, pixels: np.ndarray, *, scales: tuple[float, ...], flip: bool) -> np.ndarray:
    from stages.data.transforms import to_network_input

    images = to_network_input(torch.from_numpy(pixels[None].copy()), torch.device("cpu"))
    with torch.inference_mode():
        return inference.multi_scale_probabilities(net, images, scales=scales, flip=flip)[0].argmax(0).numpy()


def test_an_overlay_colours_objects_alone():
    image = np.full((2, 2, 3), 100, np.uint8)
    mask = np.array([[0, 1], [0, 0]], np.uint8)
    mixed = overlay_mask(image, mask)
    assert mixed[0, 1].tolist() == [(100 * 2 + 128 * 3) // 5, 40, 40]  # VOC's colour of class 1 is (128, 0, 0)
    mixed[0, 1] = 100
    assert (mixed == 100).all()


def test_the_config_section_is_what_is_done_by_default():
    config = PredictionConfig(short_side_px=64, scales=(0.5, 1.0), crf=True)
    assert PredictOptions.of(config) == PredictOptions(
        short_side_px=64, scales=(0.5, 1.0), flip=True, crf=config.crf_config
    )
    single = PredictOptions.of(PredictionConfig(multi_scale=False))
    assert (single.scales, single.flip, single.crf) == ((1.0,), False, None)


def test_the_crf_changes_masks_and_leaves_areas_consistent(segmenter: Path, shots: Path, tmp_path: Path):
    predict(segmenter, [shots], tmp_path / "plain")
    predict(segmenter, [shots], tmp_path / "crf", PredictOptions(crf=CrfConfig(preset="irn", iterations=3)))
    assert masks(tmp_path / "plain") != masks(tmp_path / "crf")
    for name, classes in read_areas(tmp_path / "crf").items():
        mask = read_index_mask(tmp_path / "crf" / f"{name}.png")
        assert sum(pixels for pixels, _ in classes.values()) == mask.size


# -- windows ----------------------------------------------------------------------------------------------------------


def test_large_images_are_seen_in_windows_and_agree_inside(segmenter: Path, tmp_path: Path):
    path = save_noise(tmp_path / "large.png", (300, 420))
    whole = predict(segmenter, [path], tmp_path / "whole", PredictOptions(window_px=0))
    windowed = predict(segmenter, [path], tmp_path / "windows", PredictOptions(window_px=256))
    assert (whole.windowed, windowed.windowed) == (0, 1)
    one, other = (read_index_mask(tmp_path / name / "large.png") for name in ("whole", "windows"))
    agreement = one == other
    assert one.shape == (300, 420)
    assert len(np.unique(one)) > 1
    assert agreement[32:-32, 32:-32].mean() > 0.95  # random weights have many near ties


def test_a_large_image_that_the_network_sees_small_keeps_its_size(segmenter: Path, tmp_path: Path):
    path = save_noise(tmp_path / "large.png", (280, 420))
    small = {"short_side_px": 96}
    predict(segmenter, [path], tmp_path / "whole", PredictOptions(**small, window_px=0))
    summary = predict(segmenter, [path], tmp_path / "windows", PredictOptions(**small, window_px=256))
    assert summary.windowed == 1
    one, other = (read_index_mask(tmp_path / name / "large.png") for name in ("whole", "windows"))
    assert other.shape == (280, 420)
    assert (one == other).mean() > 0.98


def test_the_crf_works_in_windows(segmenter: Path, tmp_path: Path):
    path = save_noise(tmp_path / "large.png", (140, 200))
    options = PredictOptions(window_px=128, crf=CrfConfig(preset="irn", iterations=2))
    predict(segmenter, [path], tmp_path / "crf", options)
    predict(segmenter, [path], tmp_path / "plain", PredictOptions(window_px=128))
    one, other = (read_index_mask(tmp_path / name / "large.png") for name in ("crf", "plain"))
    assert 0 < (one != other).mean() < 0.5


@pytest.mark.parametrize(
    ("window_px", "size", "expected"),
    [
        (None, (2048, 2048), None),
        (None, (100, 2049), 1024),
        (0, (9000, 9000), None),
        (512, (513, 10), 512),
        (512, (512, 512), None),
    ],
)
def test_which_images_are_seen_in_windows(window_px: int | None, size: tuple[int, int], expected: int | None):
    assert PredictOptions(window_px=window_px).window_for(size) == expected


# -- memory -----------------------------------------------------------------------------------------------------------


def refuse_above(monkeypatch: pytest.MonkeyPatch, limit_px: int) -> list[tuple[int, ...]]:
    """Let the accelerator hold ``limit_px`` pixels at once; the shapes that passed."""
    passed: list[tuple[int, ...]] = []
    honest, honest_logits = inference.multi_scale_probabilities, inference.predict_logits

    def scarce(model, images, **options):
        check(images)
        monkeypatch.setattr(inference, "predict_logits", honest_logits)
        try:
            return honest(model, images, **options)
        finally:
            monkeypatch.setattr(inference, "predict_logits", scarce_logits)

    def scarce_logits(model, images, **options):
        check(images)
        return honest_logits(model, images, **options)

    def check(images: torch.Tensor) -> None:
        if images.shape[0] * images.shape[2] * images.shape[3] > limit_px:
            raise torch.OutOfMemoryError("CUDA out of memory")
        passed.append(tuple(images.shape))

    monkeypatch.setattr(inference, "multi_scale_probabilities", scarce)
    monkeypatch.setattr(inference, "predict_logits", scarce_logits)
    return passed


def test_a_batch_that_does_not_fit_is_halved(segmenter: Path, shots: Path, tmp_path: Path, monkeypatch):
    predict(segmenter, [shots], tmp_path / "whole")
    passed = refuse_above(monkeypatch, 2 * 64 * 96)
    summary = predict(segmenter, [shots], tmp_path / "halves")
    assert summary.windowed == 0
    assert max(shape[0] for shape in passed) <= 2
    assert sum(shape[0] for shape in passed) == 4
    for name in "0123":
        one, other = (read_index_mask(tmp_path / kind / f"{name}.png") for kind in ("whole", "halves"))
        assert (one == other).mean() > 0.999


def test_an_image_that_does_not_fit_is_seen_in_ever_smaller_windows(segmenter: Path, tmp_path: Path, monkeypatch):
    path = save_noise(tmp_path / "large.png", (300, 700))
    passed = refuse_above(monkeypatch, 256 * 256)
    progress = SilentProgress()
    summary = predict(segmenter, [path], tmp_path / "out", progress=progress)
    assert (summary.predicted, summary.windowed) == (1, 1)
    assert {shape[2:] for shape in passed} == {(256, 256)}
    assert read_index_mask(tmp_path / "out" / "large.png").shape == (300, 700)
    assert "at once: it was seen in windows of 256" in progress.warnings[0]


def test_wanted_windows_that_do_not_fit_shrink_too(segmenter: Path, tmp_path: Path, monkeypatch):
    path = save_noise(tmp_path / "large.png", (300, 700))
    passed = refuse_above(monkeypatch, 256 * 256)
    progress = SilentProgress()
    predict(segmenter, [path], tmp_path / "out", PredictOptions(window_px=600), progress=progress)
    assert {shape[2:] for shape in passed} == {(256, 256)}
    assert "in windows of 600: it was seen in windows of 256" in progress.warnings[0]
    refuse_above(monkeypatch, 10)
    with pytest.raises(EnvironmentFailure, match="a window of 200 pixels"):
        predict(segmenter, [path], tmp_path / "none", PredictOptions(window_px=200))


def test_where_nothing_fits_the_user_is_told_what_to_do(segmenter: Path, shots: Path, tmp_path: Path, monkeypatch):
    refuse_above(monkeypatch, 10)
    with pytest.raises(EnvironmentFailure, match="--device cpu"):
        predict(segmenter, [shots], tmp_path / "out")


# -- a second call ----------------------------------------------------------------------------------------------------


def test_what_is_there_is_kept_and_counted(segmenter: Path, shots: Path, tmp_path: Path):
    out = tmp_path / "out"
    predict(segmenter, [shots], out)
    before, areas = {path: path.stat().st_mtime_ns for path in out.rglob("*.*")}, (out / "areas.csv").read_bytes()
    (out / "1.png").unlink()
    (out / "overlays" / "2.jpg").unlink()
    summary = predict(segmenter, [shots], out)
    assert (summary.predicted, summary.skipped) == (2, 2)
    assert (out / "areas.csv").read_bytes() == areas
    for name in ("0.png", "3.png", "overlays/0.jpg"):
        assert (out / name).stat().st_mtime_ns == before[out / name]
    assert (out / "overlays" / "2.jpg").exists()
    assert predict(segmenter, [shots], out, force=True).predicted == 4


class Heard(SilentProgress):
    """Progress as it was reported: each task with how far it came, step by step, of how much."""

    def __init__(self) -> None:
        super().__init__()
        self.tasks: list[list[object]] = []
        self.values: dict[str, float] = {}

    def step(self, task: str, done: int, total: int, *, unit: str = "images", **values: float) -> None:
        if not self.tasks or self.tasks[-1][0] != task:
            self.tasks.append([task, done, total])
        assert self.tasks[-1][2] == total
        assert done - self.tasks[-1][1] in (0, 1), "an image at a time"
        self.tasks[-1][1] = done
        self.values = values


def test_looking_at_what_is_there_is_heard_of(segmenter: Path, shots: Path, tmp_path: Path):
    (shots / "text.jpg").write_text("no image")
    for done in (0, 4, 2):
        heard = Heard()
        if done == 2:
            (tmp_path / "out" / "1.png").unlink()
            (tmp_path / "out" / "overlays" / "2.jpg").unlink()
        predict(segmenter, [shots], tmp_path / "out", progress=heard)
        assert heard.tasks == [["look at what is there", 5, 5], ["predict", 4, 4]], "one of the five is no image"
        assert (heard.values.get("images_per_s", 0) > 0) == (done < 4), "four images were there"


@pytest.mark.parametrize("change", ["options", "model", "image", "foreign", "damaged"])
def test_a_file_of_another_origin_is_neither_taken_nor_replaced(
    segmenter: Path, shots: Path, tmp_path: Path, change: str
):
    out, options = tmp_path / "out", PLAIN
    predict(segmenter, [shots], out)
    if change == "options":
        options = PredictOptions(scales=(0.5,))
    elif change == "model":
        segmenter = save_lively_segmenter(tmp_path / "other", seed=1)
    elif change == "image":
        save_noise(shots / "0.png", (64, 96), seed=99)
    elif change == "foreign":
        save_noise(out / "0.png", (64, 96))
    else:
        os.truncate(out / "0.png", 60)
    before = masks(out)
    with pytest.raises(InputError, match="--force") as error:
        predict(segmenter, [shots], out, options)
    assert str(out / "0.png") in error.value.problems
    assert masks(out) == before
    assert predict(segmenter, [shots], out, options, force=True).predicted == 4
    assert predict(segmenter, [shots], out, options).skipped == 4


def test_an_input_is_never_replaced(segmenter: Path, shots: Path):
    before = masks(shots)
    with pytest.raises(InputError, match="inputs would be replaced"):
        predict(segmenter, sorted(shots.glob("*.png")), shots, force=True)
    assert masks(shots) == before


# -- bad images -------------------------------------------------------------------------------------------------------


def test_unreadable_images_are_named_and_the_others_done(segmenter: Path, shots: Path, tmp_path: Path):
    (shots / "text.jpg").write_text("no image")
    (shots / "zero.png").touch()
    whole = save_noise(shots / "cut.jpg", (64, 96)).read_bytes()
    (shots / "cut.jpg").write_bytes(whole[: len(whole) // 2])  # its head is fine
    summary = predict(segmenter, [shots], tmp_path / "out")
    assert summary.predicted == 4
    assert sorted(Path(problem.split(":")[0]).name for problem in summary.problems) == [
        "cut.jpg",
        "text.jpg",
        "zero.png",
    ]
    assert set(masks(tmp_path / "out")) == {"0.png", "1.png", "2.png", "3.png"}
    assert set(read_areas(tmp_path / "out")) == {"0", "1", "2", "3"}


def test_grey_deep_and_turned_images_are_predicted(segmenter: Path, tmp_path: Path):
    exif = Image.Exif()
    exif[0x0112] = 8
    folder = tmp_path / "in"
    folder.mkdir()
    Image.new("L", (40, 50)).save(folder / "grey.png")
    Image.fromarray(np.full((50, 40), 40_000, np.uint16)).save(folder / "deep.png")
    Image.new("RGBA", (40, 50)).save(folder / "alpha.png")
    Image.new("RGB", (40, 50)).save(folder / "turned.jpg", exif=exif)
    summary = predict(segmenter, [folder], tmp_path / "out")
    assert (summary.predicted, summary.problems) == (4, [])
    sizes = {path.stem: read_index_mask(path).shape for path in (tmp_path / "out").glob("*.png")}
    assert sizes == {"grey": (50, 40), "deep": (50, 40), "alpha": (50, 40), "turned": (40, 50)}
