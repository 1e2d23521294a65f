"""Pseudo-masks: by hand without refinement, fitted to edges with it; pool, continuing, warnings and errors."""

import importlib.util
import itertools
import multiprocessing
import os
import signal
import subprocess
import sys
import time
from collections.abc import Collection
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from pydantic import ValidationError
from scipy import ndimage

from stages.contracts import (
    AttentionRecord,
    ClassList,
    Part,
    Runtime,
    SilentProgress,
    StageResult,
    attention_shards,
    open_image_set,
    read_attention_shard,
    read_index_mask,
    read_json,
    write_attention_shard,
)
from stages.data.subsets import SweepConfig
from stages.errors import ConfigError, DamagedFileError, DataError, EnvironmentFailure, InputError
from stages.make_masks import MakeMasksConfig, make_masks, refine_mask
from stages.masks.label_rules import ConfidentThresholds, map_probabilities, upsample_maps
from stages.masks.refinements.chain import refine_masks
from stages.masks.refinements.random_walk import MapWalker
from stages.ops.cells import CellAxis, CellGrid, resample_maps
from stages.ops.crf.dense_crf import CrfConfig, dense_crf
from stages.ops.par import ParBatch, ParConfig
from stages.ops.pool import map_ordered, num_processes
from stages.ops.random_walk import RandomWalkConfig, walk_maps
from stages.ops.rate import ImageRate
from tests.stages.tiny_masks import CLASSES, COLOURS, TRAIN, attention_of, size_of, truth_of, write_world

ONE = Runtime(processes=1, device="cpu")
SMALL_CRF = CrfConfig(bilateral_sxy_px=20, bilateral_srgb=10, gaussian_sxy_px=1, gaussian_weight=1, iterations=5)
needs_native = pytest.mark.skipif(importlib.util.find_spec("pydensecrf") is None, reason="pydensecrf2 is not installed")


def _make(config: MakeMasksConfig, world: tuple[Path, Path, Path], out: Path, runtime: Runtime = ONE):
    prepared, data, attention = world
    progress = SilentProgress()
    result = make_masks(
        config, images=prepared, attention=attention, data_root=data, out=out, progress=progress, runtime=runtime
    )
    return result, progress


def _masks(out: Path) -> dict[str, np.ndarray]:
    return {path.stem: read_index_mask(path) for path in sorted((out / "masks").iterdir())}


def test_thresholded_masks_and_numbers_by_hand(tmp_path: Path) -> None:
    """At 0.3 (byte 76) the weak columns of 100 are foreground too, so the masks are the truth."""
    result, progress = _make(MakeMasksConfig(threshold=0.3, refine="none"), write_world(tmp_path), tmp_path / "out")
    masks = _masks(tmp_path / "out")
    assert set(masks) == set(TRAIN)
    for image_id, labels in TRAIN.items():
        np.testing.assert_array_equal(masks[image_id], truth_of(labels, size_of(image_id)))
    foreground = sum(int((mask > 0).sum()) for mask in masks.values())
    assert result.metrics == {
        "masks.coverage": 1.0,
        "masks.foreground_ratio": foreground / (5 * 24 * 32),
        "masks.foreground_ratio_before_crf": foreground / (5 * 24 * 32),
    }
    assert result.mask_supervision == ()
    assert progress.warnings == []
    stats = read_json(tmp_path / "out" / "stats.json")["images"]
    assert stats["t0"] == {
        "pixels": 768, "foreground_before": 8 * 16, "foreground_after": 8 * 16, "unsure": 0, "vanished": []
    }  # fmt: skip


def test_masks_are_palette_png(tmp_path: Path) -> None:
    _make(MakeMasksConfig(refine="none"), write_world(tmp_path), tmp_path / "out")
    with Image.open(tmp_path / "out" / "masks" / "t0.png") as image:
        assert image.mode == "P"
        assert image.getpalette()[3:6] == [128, 0, 0]


@pytest.mark.parametrize("unary", ["labels", "maps"])
@pytest.mark.parametrize("backend", ["torch", "numba", pytest.param("pydensecrf", marks=needs_native)])
def test_the_crf_finds_the_whole_object(unary: str, backend: str) -> None:
    """At 0.5 the weak columns are missing before; they have the object's colour, so the CRF adds them."""
    record = attention_of("t2", (0, 2), shrink=2)
    truth = truth_of((0, 2), size_of("t2"))
    config = MakeMasksConfig(threshold=0.5, unary=unary, crf=SMALL_CRF.model_copy(update={"backend": backend}))
    before = refine_mask(COLOURS[truth], record, config.model_copy(update={"refine": "none"}))
    assert (before != truth).sum() == 2 * 2 * 16
    np.testing.assert_array_equal(refine_mask(COLOURS[truth], record, config), truth)


def test_confident_masks_leave_the_doubtful_unsure() -> None:
    """In a flat image the CRF has no edge to follow, so the weak columns stay between the two thresholds."""
    record = attention_of("t0", (0,), shrink=4)
    truth = truth_of((0,), size_of("t0"))
    config = MakeMasksConfig(
        confident=ConfidentThresholds(foreground_threshold=0.5, background_threshold=0.2),
        crf=CrfConfig(bilateral_weight=0, gaussian_weight=0.1, gaussian_sxy_px=1),
    )
    mask = refine_mask(np.full((*truth.shape, 3), 90, np.uint8), record, config)
    expected = np.where(record.maps[0] == 255, 1, np.where(record.maps[0] == 100, 255, 0))
    np.testing.assert_array_equal(mask, expected)
    without = refine_mask(COLOURS[truth], record, config.model_copy(update={"refine": "none"}))
    np.testing.assert_array_equal(without, expected)


def test_processes_change_nothing(tmp_path: Path) -> None:
    world = write_world(tmp_path)
    config = MakeMasksConfig(crf=SMALL_CRF)
    one, _ = _make(config, world, tmp_path / "one")
    two, _ = _make(config, world, tmp_path / "two", Runtime(processes=2, device="cpu"))
    assert one == two
    for name in (*(f"masks/{image_id}.png" for image_id in TRAIN), "stats.json"):
        assert (tmp_path / "one" / name).read_bytes() == (tmp_path / "two" / name).read_bytes()


def test_a_stopped_run_continues_and_ends_with_the_same_bytes(tmp_path: Path) -> None:
    world = write_world(tmp_path)
    config = MakeMasksConfig(crf=SMALL_CRF)
    whole, _ = _make(config, world, tmp_path / "out")
    files = {path: path.read_bytes() for path in (tmp_path / "out").rglob("*.*")}
    kept = tmp_path / "out" / "masks" / "t0.png"
    stamp = kept.stat().st_mtime_ns
    (tmp_path / "out" / "masks" / "t1.png").unlink()
    (tmp_path / "out" / "masks" / "t2.png").write_bytes(b"half a png")
    (tmp_path / "out" / "stats.json").unlink()
    again, _ = _make(config, world, tmp_path / "out")
    assert again == whole
    assert {path: path.read_bytes() for path in (tmp_path / "out").rglob("*.*")} == files
    assert kept.stat().st_mtime_ns == stamp, "a finished mask must not be made again"


class _Counter(SilentProgress):
    """Keeps the size of the task and how much of it is done."""

    total = counted = 0

    def step(self, task: str, done: int, total: int, *, unit: str = "images", **values: float) -> None:
        self.total, self.counted = total, done


def test_masks_that_were_there_do_not_count_for_the_pace(tmp_path: Path) -> None:
    """They are told with the first new one: the time left begins after it."""

    class Told(SilentProgress):
        def __init__(self) -> None:
            super().__init__()
            self.counts: list[int] = []

        def step(self, task: str, done: int, total: int, *, unit: str = "images", **values: float) -> None:
            self.counts.append(done)

    world, config, progress = write_world(tmp_path), MakeMasksConfig(refine="none"), Told()
    prepared, data, attention = world
    inputs = {"images": prepared, "attention": attention, "data_root": data, "out": tmp_path / "out", "runtime": ONE}
    make_masks(config, **inputs, progress=progress)
    assert progress.counts == [0, 1, 2, 3, 4, 5]
    for name in ("t3", "t4"):
        (tmp_path / "out" / "masks" / f"{name}.png").unlink()
    progress.counts.clear()
    make_masks(config, **inputs, progress=progress)
    assert progress.counts == [0, 4, 5]
    progress.counts.clear()
    make_masks(config, **inputs, progress=progress)
    assert progress.counts == [0, 5], "all were there"


@pytest.mark.parametrize("count", [2, 7])
def test_parts_are_the_files_of_the_whole_and_nothing_else(tmp_path: Path, count: int) -> None:
    """Five images: seven parts leave two without any; one image of the whole has no label."""
    prepared, data, attention = world = write_world(tmp_path)
    config = MakeMasksConfig(crf=SMALL_CRF)
    whole, _ = _make(config, world, tmp_path / "whole")
    merged = tmp_path / "merged"
    inputs = {"images": prepared, "attention": attention, "data_root": data, "runtime": ONE}
    for index in range(count):
        out, progress = tmp_path / f"part{index}", _Counter()
        assert make_masks(config, **inputs, out=out, progress=progress, part=Part(index, count)) == StageResult()
        files = [path for path in out.rglob("*") if path.is_file()]
        assert {path.parent for path in files} <= {out / "masks", out / "steps" / "0-threshold"}, "no stats.json"
        assert (progress.total, progress.counted) == (len(files) / 2, len(files) / 2), "a mask and its step each"
        for path in files:
            target = merged / path.relative_to(out)
            assert not target.exists()
            target.parent.mkdir(parents=True, exist_ok=True)
            target.write_bytes(path.read_bytes())
    stamps = {path: path.stat().st_mtime_ns for path in merged.rglob("*.png")}
    again, _ = _make(config, world, merged)
    assert again == whole
    assert {path: path.stat().st_mtime_ns for path in merged.rglob("*.png")} == stamps, "found, not made again"
    for path in (tmp_path / "whole").rglob("*.*"):
        assert path.read_bytes() == (merged / path.relative_to(tmp_path / "whole")).read_bytes()


def test_missing_attention_of_a_part_is_named(tmp_path: Path) -> None:
    prepared, data, attention = write_world(tmp_path, shards=5)
    (attention / "shards" / "attention-00002.npz").unlink()
    inputs = {"images": prepared, "attention": attention, "data_root": data, "progress": SilentProgress()}
    config = MakeMasksConfig(refine="none")
    make_masks(config, **inputs, out=tmp_path / "a", runtime=ONE, part=Part(0, 5))
    with pytest.raises(DamagedFileError, match="no attention for 1 training images \\(t2"):
        make_masks(config, **inputs, out=tmp_path / "c", runtime=ONE, part=Part(2, 5))


def test_no_true_mask_is_read(tmp_path: Path) -> None:
    with_masks, _ = _make(MakeMasksConfig(crf=SMALL_CRF), write_world(tmp_path / "a"), tmp_path / "a" / "out")
    without, _ = _make(MakeMasksConfig(crf=SMALL_CRF), write_world(tmp_path / "b", masks=False), tmp_path / "b" / "out")
    assert with_masks == without


def test_a_crf_that_eats_objects_is_reported(tmp_path: Path) -> None:
    """A kernel that sees neither place nor colour lets the larger background win everywhere."""
    greedy = CrfConfig(bilateral_sxy_px=10_000, bilateral_srgb=1000, bilateral_weight=100)
    result, progress = _make(MakeMasksConfig(crf=greedy), write_world(tmp_path), tmp_path / "out")
    assert result.metrics["masks.foreground_ratio"] == 0
    assert "the CRF shrank the foreground to 0% of its area" in progress.warnings[0]
    assert "the CRF nearly removed an object in 4 of 5 images" in progress.warnings[1]


def test_masks_without_foreground_are_reported(tmp_path: Path) -> None:
    world = write_world(tmp_path)
    for path in (tmp_path / "attention" / "shards").iterdir():
        path.unlink()
    empty = [
        AttentionRecord(
            i, size_of(i), labels, np.zeros((len(labels), 4, 4), np.uint8), np.zeros(len(labels), np.float32)
        )
        for i, labels in TRAIN.items()
    ]
    write_attention_shard(tmp_path / "attention" / "shards" / "attention-00000.npz", empty)
    _, progress = _make(MakeMasksConfig(crf=SMALL_CRF), world, tmp_path / "out")
    assert progress.warnings[0].startswith("the pseudo-masks have no foreground at all")


@pytest.mark.parametrize("processes", [1, 2])
def test_a_damaged_image_is_named(tmp_path: Path, processes: int) -> None:
    world = write_world(tmp_path)
    (world[1] / "images" / "t2.png").write_bytes(b"not a png")
    with pytest.raises(DataError, match=r"t2\.png: not a readable image"):
        _make(MakeMasksConfig(crf=SMALL_CRF), world, tmp_path / "out", Runtime(processes=processes, device="cpu"))


def test_a_changed_image_is_named(tmp_path: Path) -> None:
    world = write_world(tmp_path)
    Image.new("RGB", (9, 8)).save(world[1] / "images" / "t1.png")
    with pytest.raises(DataError, match=r"t1\.png: expected \(32, 24\) pixels .* found \(8, 9\)"):
        _make(MakeMasksConfig(crf=SMALL_CRF), world, tmp_path / "out")


@pytest.mark.parametrize("sweep", [None, SweepConfig(num_images=2)])
def test_maps_of_another_class_list_are_refused(tmp_path: Path, sweep: SweepConfig | None) -> None:
    """Labels are indices: of the classes in another order, cats would be painted as dogs."""
    world = write_world(tmp_path)
    for path in attention_shards(world[2]):
        shifted = [replace(r, labels=tuple((label + 1) % 3 for label in r.labels)) for r in read_attention_shard(path)]
        write_attention_shard(path, shifted)
    with pytest.raises(InputError, match=r"image 't\d': .* label indices \[.*\], the data has \[.*make attention anew"):
        _make(MakeMasksConfig(refine="none", sweep=sweep), world, tmp_path / "out")


def test_missing_attention_is_named(tmp_path: Path) -> None:
    world = write_world(tmp_path, shards=5)
    (world[2] / "shards" / "attention-00002.npz").unlink()
    with pytest.raises(DamagedFileError, match="no attention for 1 training images \\(t2"):
        _make(MakeMasksConfig(refine="none"), world, tmp_path / "out")


@pytest.mark.parametrize(
    "wrong", [{"label_confidence": 0.5}, {"threshold": 1.0}, {"unary": "map"}, {"crf": {"preset": "x"}}, {"sxy": 1}]
)
def test_wrong_config_is_refused(wrong: dict[str, object]) -> None:
    with pytest.raises(ValidationError):
        MakeMasksConfig.model_validate(wrong)


def test_no_torch_is_imported() -> None:
    code = "import sys, stages.make_masks as m; m.MakeMasksConfig(); assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)


# ---------------------------------------------------------------------------------------------------------------------
# The pool
# ---------------------------------------------------------------------------------------------------------------------


def _scale(context: int, job: int) -> int:
    time.sleep(0.01 * (job % 3))
    return context * job


def _fail(context: str, job: int) -> int:
    if job == 3:
        raise DataError(context, ["image 3"])
    return job


def _vanish(_: None, job: int) -> int:
    os.kill(os.getpid(), signal.SIGKILL)
    return job


def test_results_come_in_order_and_jobs_are_taken_lazily() -> None:
    taken: list[int] = []

    def jobs():
        for job in range(40):
            taken.append(job)
            yield job

    results = map_ordered(_scale, jobs(), context=10, processes=2, in_flight=3)
    assert next(results) == 0
    assert len(taken) == 6
    assert list(results) == [10 * job for job in range(1, 40)]


def test_an_error_of_a_worker_keeps_its_message_and_problems() -> None:
    with pytest.raises(DataError, match="broken") as caught:
        list(map_ordered(_fail, range(9), context="broken", processes=2))
    assert caught.value.problems == ("image 3",)
    assert not multiprocessing.active_children()


def test_a_killed_worker_is_an_environment_failure() -> None:
    with pytest.raises(EnvironmentFailure, match=r"worker process of _vanish was killed.*runtime\.processes \(now 2\)"):
        list(map_ordered(_vanish, range(3), context=None, processes=2))


def test_images_per_second_begin_with_the_first_finished_batch(monkeypatch: pytest.MonkeyPatch) -> None:
    """What the processes and a compiler take before the first image is in no rate; nor are batches long ago."""
    ends = iter([100.0, 100.0, 102.0, *range(200, 400)])
    monkeypatch.setattr("stages.ops.rate.monotonic", lambda: next(ends))
    rate = ImageRate()
    assert rate.add(1) == {}
    assert rate.add(1) == {}
    assert rate.add(3) == {"images_per_s": 2.0}
    assert [rate.add(5) for _ in range(200)][-1] == {"images_per_s": 5.0}


def test_zero_processes_are_one_per_core() -> None:
    assert num_processes(0) == len(os.sched_getaffinity(0))
    assert num_processes(3) == 3


WORLD_THAT_DIES = """
import os, sys, time
import stages.ops.pool as pool

def work(_, job):
    os.write(1, b"%d\\n" % os.getpid())  # one write, so that two workers cannot mix their lines
    time.sleep(60)

if {threads}:
    import threading
    threading.Thread(target=time.sleep, args=(60,), daemon=True).start()
if __name__ == "__main__":
    list(pool.map_ordered(work, range(2), context=None, processes=2))
"""


@pytest.mark.parametrize("threads", [False, True])
def test_workers_end_with_their_parent(tmp_path: Path, threads: bool) -> None:
    """With another thread alive a clean process serves the workers, else they are forked; both must end."""
    script = tmp_path / "dies.py"
    script.write_text(WORLD_THAT_DIES.format(threads=threads))
    environment = {**os.environ, "PYTHONPATH": str(Path.cwd())}
    parent = subprocess.Popen([sys.executable, str(script)], stdout=subprocess.PIPE, text=True, env=environment)
    assert parent.stdout is not None
    with parent:
        workers = [int(parent.stdout.readline()) for _ in range(2)]
        parent.kill()
    deadline = time.monotonic() + 10
    while any(_is_alive(pid) for pid in workers):
        assert time.monotonic() < deadline, "a worker outlived its parent"
        time.sleep(0.05)


def _is_alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except OSError:
        return False


# ---------------------------------------------------------------------------------------------------------------------
# Refinements by name, and chains of them
# ---------------------------------------------------------------------------------------------------------------------

SMALL_PAR = ParConfig(dilations=(1, 2, 4), shrink=1)
SMALL_WALK = RandomWalkConfig(beta=4, radius_cells=3, steps=3)


def _noisy(truth: np.ndarray) -> np.ndarray:
    noise = np.random.default_rng(3).integers(-4, 5, (*truth.shape, 3))
    return np.clip(COLOURS[truth] + noise, 0, 255).astype(np.uint8)


@pytest.mark.parametrize("refine", ["par", ["par", "crf"], ["crf", "par"]])
def test_chains_find_the_whole_object(refine: str | list[str]) -> None:
    record, truth = attention_of("t2", (0, 2), shrink=2), truth_of((0, 2), size_of("t2"))
    config = MakeMasksConfig.model_validate({"threshold": 0.5, "refine": refine, "crf": SMALL_CRF, "par": SMALL_PAR})
    before = refine_mask(_noisy(truth), record, config.model_copy(update={"refine": "none"}))
    assert (before != truth).sum() == 2 * 2 * 16
    after = refine_mask(_noisy(truth), record, config)
    assert (after != truth).sum() <= 8


def test_a_chain_hands_probabilities_on() -> None:
    record, truth = attention_of("t2", (0, 2), shrink=2), truth_of((0, 2), size_of("t2"))
    image, config = _noisy(truth), MakeMasksConfig(refine=("par", "crf"), crf=SMALL_CRF, par=SMALL_PAR)
    start = map_probabilities(upsample_maps(record), config)
    end = dense_crf(image, ParBatch([image], SMALL_PAR).refine([start])[0], SMALL_CRF)
    np.testing.assert_array_equal(refine_mask(image, record, config), np.array([0, 1, 3])[end.argmax(axis=0)])


def test_confident_masks_of_a_chain_leave_the_doubtful_unsure() -> None:
    """One step of PAR in a flat image moves the borders of the weak columns by a pixel at most."""
    record, size = attention_of("t0", (0,), shrink=4), size_of("t0")
    pair = ConfidentThresholds(foreground_threshold=0.5, background_threshold=0.2)
    par = ParConfig(dilations=(1,), iterations=1, shrink=1)
    config = MakeMasksConfig(confident=pair, refine="par", par=par)
    flat = np.full((*size, 3), 90, np.uint8)
    mask = refine_mask(flat, record, config)
    plain = refine_mask(flat, record, config.model_copy(update={"refine": "none"}))
    for value in (0, 1, 255):
        inner = ndimage.binary_erosion(plain == value, np.ones((3, 3)), border_value=1)
        assert inner.any()
        assert (mask[inner] == value).all()


@pytest.mark.parametrize("refine", [("par",), ("crf",), ("par", "crf")])
def test_images_refined_together_are_those_refined_alone(refine: tuple[str, ...]) -> None:
    """Two sizes, one to two labels, and one image without any."""
    records = [attention_of(name, labels, shrink=2) for name, labels in TRAIN.items()]
    images = [_noisy(truth_of(labels, size_of(name))) for name, labels in TRAIN.items()]
    crf = SMALL_CRF.model_copy(update={"backend": "torch"})
    config = MakeMasksConfig(refine=refine, crf=crf, par=SMALL_PAR)
    together = refine_masks(images, records, config)
    for image, record, mask in zip(images, records, together, strict=True):
        np.testing.assert_array_equal(mask, refine_mask(image, record, config))


def test_par_in_processes_changes_nothing(tmp_path: Path) -> None:
    world, config = write_world(tmp_path), MakeMasksConfig(refine="par", par=SMALL_PAR)
    one, _ = _make(config, world, tmp_path / "one")
    two, _ = _make(config, world, tmp_path / "two", Runtime(processes=2, device="cpu"))
    assert one == two
    for name in TRAIN:
        path = f"masks/{name}.png"
        assert (tmp_path / "one" / path).read_bytes() == (tmp_path / "two" / path).read_bytes()


def _write_classifier(folder: Path) -> Path:
    import torch

    from stages.methods.cam import CamConfig
    from stages.methods.classifier_files import ClassifierDescription, build_classifier, save_classifier
    from stages.nets.backbones.config import BackboneConfig

    torch.manual_seed(1)
    classes = ClassList(names=CLASSES)
    description = ClassifierDescription(backbone=BackboneConfig(name="small"), method=CamConfig(), classes=classes)
    save_classifier(folder, description, build_classifier(description, {})[0])
    return folder


def _walk(tmp_path: Path, world: tuple[Path, Path, Path], out: str, part: Part | None = None, **options: object):
    prepared, data, attention = world
    walk = SMALL_WALK.model_copy(update=options)
    return make_masks(
        MakeMasksConfig(refine=("random_walk", "par"), random_walk=walk, par=SMALL_PAR),
        images=prepared,
        attention=attention,
        classifier=tmp_path / "classifier",
        data_root=data,
        out=tmp_path / out,
        progress=SilentProgress(),
        runtime=ONE,
        part=part,
    )


def test_maps_walk_over_the_features_of_the_classifier(tmp_path: Path) -> None:
    """Images of 24 × 32 are seen at 32 × 32, the least, where the small net has 8 × 8 cells: 3 × 4 pixels each."""
    import torch

    from stages.data.transforms import to_network_input
    from stages.methods.classifier_files import load_classifier

    prepared, data, _ = write_world(tmp_path)
    images = open_image_set(prepared, data)
    walker = MapWalker(
        SMALL_WALK,
        classifier=_write_classifier(tmp_path / "classifier"),
        images=images,
        progress=SilentProgress(),
        runtime=ONE,
    )
    record, image = attention_of("t2", (0, 2), shrink=2), images.index.record("t2")
    found = walker.walk([record], [image])["t2"]
    assert found.maps.shape == (2, 8, 8)
    pixels = Image.fromarray(images.read_image(image)).resize((32, 32), Image.Resampling.BICUBIC)
    network, _ = load_classifier(tmp_path / "classifier", torch.device("cpu"))
    with torch.inference_mode():
        features = network.backbone(to_network_input(torch.from_numpy(np.array(pixels))[None], torch.device("cpu")))[0]
    coarse = record.maps.reshape(2, 8, 3, 8, 4).mean(axis=(2, 4)) / 255
    corners = CellGrid(CellAxis(0, 4), CellAxis(0, 4))  # where the small network's cells look
    features = resample_maps(features, size=(8, 8), image_size=(32, 32), cells=corners)
    walked = walk_maps(torch.from_numpy(coarse).float(), features, SMALL_WALK).numpy()
    expected = 255 * walked / walked.max(axis=(1, 2), keepdims=True)
    np.testing.assert_allclose(found.maps, expected, atol=0.6)


def test_a_walk_continues_and_is_made_in_parts_with_the_same_bytes(tmp_path: Path) -> None:
    world = write_world(tmp_path)
    _write_classifier(tmp_path / "classifier")
    whole = _walk(tmp_path, world, "out")
    files = {path.name: path.read_bytes() for path in (tmp_path / "out" / "masks").iterdir()}
    assert set(files) == {f"{name}.png" for name in TRAIN}
    kept = tmp_path / "out" / "masks" / "t0.png"
    stamp = kept.stat().st_mtime_ns
    (tmp_path / "out" / "masks" / "t1.png").unlink()
    (tmp_path / "out" / "masks" / "t2.png").write_bytes(b"half a png")
    assert _walk(tmp_path, world, "out") == whole
    assert kept.stat().st_mtime_ns == stamp, "a finished mask must not be made again"
    for index in range(2):
        assert _walk(tmp_path, world, "parts", Part(index, 2)) == StageResult()
    for folder in ("out", "parts"):
        assert {path.name: path.read_bytes() for path in (tmp_path / folder / "masks").iterdir()} == files
    _walk(tmp_path, world, "other", beta=50.0)
    other = {path.name: path.read_bytes() for path in (tmp_path / "other" / "masks").iterdir()}
    assert other != files, "the walk has no influence"


def test_who_is_wanted_does_not_decide_the_batches_of_a_walk(tmp_path: Path) -> None:
    """As on a GPU, where several images of a window share a forward pass."""
    prepared, data, _ = write_world(tmp_path)
    images = open_image_set(prepared, data)
    folder = _write_classifier(tmp_path / "classifier")
    walker = MapWalker(SMALL_WALK, classifier=folder, images=images, progress=SilentProgress(), runtime=ONE)
    walker._budget_px = 1 << 20
    batches: list[int] = []
    forward = walker._forward
    walker._forward = lambda inputs: batches.append(len(inputs)) or forward(inputs)
    records = [attention_of(name, labels) for name, labels in TRAIN.items() if labels]
    together = walker.walk(records, images.index.split("train"))
    alone = walker.walk(records[1:2], images.index.split("train"))
    assert set(together) == {"t0", "t1", "t2", "t4"}
    assert set(alone) == {"t1"}
    np.testing.assert_array_equal(alone["t1"].maps, together["t1"].maps)
    assert batches[:-1] == [4], "all are seen at 32 × 32"
    assert batches[-1] == 4, "its neighbours came along"


def _break_features(monkeypatch: pytest.MonkeyPatch, places: Collection[int]) -> None:
    """Features of the images that come at these places have a cell of NaN."""
    forward, count = MapWalker._forward, itertools.count()

    def broken(self, inputs):
        features = forward(self, inputs).clone()
        if next(count) in places:
            features[:, 0, 3, 3] = np.nan
        return features

    monkeypatch.setattr(MapWalker, "_forward", broken)


def test_features_of_nan_leave_an_image_background_and_are_counted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    prepared, data, attention = write_world(tmp_path)
    inputs = {"images": prepared, "data_root": data, "attention": attention, "runtime": ONE}
    inputs["classifier"] = _write_classifier(tmp_path / "classifier")
    config, progress = MakeMasksConfig(refine="random_walk", random_walk=SMALL_WALK), SilentProgress()
    make_masks(config, **inputs, out=tmp_path / "whole", progress=SilentProgress())
    _break_features(monkeypatch, (0, 2))
    make_masks(config, **inputs, out=tmp_path / "out", progress=progress)
    (warning,) = [text for text in progress.warnings if "NaN" in text]
    assert warning.startswith("2 images have features that are NaN or infinite")
    assert "('t0', 't2')" in warning
    whole, found = _masks(tmp_path / "whole"), _masks(tmp_path / "out")
    for name in ("t0", "t2"):
        assert (whole[name] > 0).any()
        assert not found[name].any()
    for name in ("t1", "t3", "t4"):
        np.testing.assert_array_equal(found[name], whole[name])


def test_features_of_nothing_but_nan_end_the_walk_before_all_images(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("stages.masks.refinements.random_walk._ALL_BROKEN", 3)
    world = write_world(tmp_path)
    _write_classifier(tmp_path / "classifier")
    _break_features(monkeypatch, range(5))
    with pytest.raises(InputError, match=r"found NaN or infinity in the first 3 images that walk; .* train it again"):
        _walk(tmp_path, world, "out")


def test_a_walk_without_a_classifier_or_with_a_wrong_layer_is_refused_before_work(tmp_path: Path) -> None:
    world = write_world(tmp_path)
    with pytest.raises(ConfigError, match="no classifier was given; give classifier=the output folder"):
        _make(MakeMasksConfig(refine="random_walk"), world, tmp_path / "out")
    _write_classifier(tmp_path / "classifier")
    with pytest.raises(ConfigError, match=r"no layer 'feature\.3'; the nearest are: features\.3"):
        _walk(tmp_path, world, "out", layer="feature.3")
    assert not (tmp_path / "out").exists()


def test_a_named_layer_is_compared(tmp_path: Path) -> None:
    world = write_world(tmp_path)
    _write_classifier(tmp_path / "classifier")
    _walk(tmp_path, world, "last")
    _walk(tmp_path, world, "early", layer="features.2")
    same = [(tmp_path / f / "masks" / "t2.png").read_bytes() for f in ("last", "early")]
    assert same[0] != same[1]
