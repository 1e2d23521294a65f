"""Masks straight from the classifier: byte for byte those of stored maps, however the work is cut or stopped."""

import errno
import importlib.util
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from stages.contracts import (
    AttentionRecord,
    ImageSet,
    Part,
    Runtime,
    SilentProgress,
    StageResult,
    attention_shards,
    iter_attention,
    open_image_set,
    read_index_mask,
    read_json,
    write_json,
)
from stages.errors import ConfigError, DamagedFileError, EnvironmentFailure, InputError
from stages.evaluate import EvaluateConfig
from stages.make_attention import MakeAttentionConfig, make_attention
from stages.make_masks import MakeMasksConfig, make_masks
from stages.masks.attention_maps import MapCensus
from stages.masks.attention_windows import read_views
from stages.masks.measuring import Measured
from stages.masks.writing import BackgroundWriter
from stages.ops.crf.dense_crf import CrfConfig
from stages.ops.par import ParConfig
from stages.ops.random_walk import RandomWalkConfig
from stages.scoring.mask_scores import ScoringContext, collect_training, score_training
from tests.stages.methods.tiny_data import LABELS, SIZES, write_tiny_classifier, write_tiny_data

NUM_IMAGES = 12
IDS = [f"image{number}" for number in range(NUM_IMAGES)]
VIEWS = MakeAttentionConfig(scales=(0.5, 1.0), shard_images=5)
PROMISED = VIEWS.model_copy(update={"keep_maps": False})
ONE = Runtime(device="cpu", workers=1, threads=1, processes=1)
TWO = ONE.model_copy(update={"processes": 2})
SMALL_CRF = CrfConfig(bilateral_sxy_px=20, bilateral_srgb=10, gaussian_sxy_px=1, iterations=3)
SMALL_PAR = ParConfig(dilations=(1, 2), shrink=1)
MASKS = MakeMasksConfig(threshold=0.2, refine="par", par=SMALL_PAR)
CONFIGS = {
    "none": MASKS.model_copy(update={"refine": "none"}),
    "par": MASKS,
    "torch": MakeMasksConfig(threshold=0.2, crf=SMALL_CRF.model_copy(update={"backend": "torch"})),
    "pydensecrf": MakeMasksConfig(threshold=0.2, crf=SMALL_CRF.model_copy(update={"backend": "pydensecrf"})),
    "walk": MakeMasksConfig(
        threshold=0.2,
        refine=("random_walk", "par"),
        random_walk=RandomWalkConfig(radius_cells=3, steps=2),
        par=SMALL_PAR,
    ),
    "soft": MASKS.model_copy(update={"soft": True, "conflict": "unsure"}),
}
needs_native = pytest.mark.skipif(importlib.util.find_spec("pydensecrf") is None, reason="pydensecrf2 is not installed")


class World:
    """A data set with a classifier, and its attention stored and promised."""

    def __init__(self, root: Path, *, change=None, labels=None) -> None:
        self.root = root
        labels = labels or [*LABELS, *LABELS[:5], ()]
        self.data = write_tiny_data(root, sizes=[*SIZES, *SIZES], labels=labels)
        self.classifier = write_tiny_classifier(root / "classifier", change=change)
        self.stored, self.promised = root / "stored", root / "promised"
        for config, out in ((VIEWS, self.stored), (PROMISED, self.promised)):
            self.attend(config, out)

    def attend(self, config: MakeAttentionConfig, out: Path) -> SilentProgress:
        progress = SilentProgress()
        make_attention(
            config,
            images=self.data,
            classifier=self.classifier,
            data_root=None,
            out=out,
            progress=progress,
            runtime=ONE,
        )
        return progress

    def make(
        self,
        name: str,
        config: MakeMasksConfig = MASKS,
        *,
        is_stored: bool = False,
        runtime: Runtime = ONE,
        part: Part | None = None,
        progress: SilentProgress | None = None,
    ) -> StageResult:
        return make_masks(
            config,
            images=self.data,
            attention=self.stored if is_stored else self.promised,
            classifier=self.classifier,
            data_root=None,
            out=self.root / name,
            progress=progress or SilentProgress(),
            runtime=runtime,
            part=part,
        )

    def files(self, name: str) -> dict[str, bytes]:
        folder = self.root / name
        found = {str(path.relative_to(folder)): path for path in folder.rglob("*") if path.is_file()}
        return {name: path.read_bytes() for name, path in found.items()}

    def files_but_windows(self, name: str) -> dict[str, bytes]:
        return {path: content for path, content in self.files(name).items() if not path.startswith("stats/")}


class Counter(SilentProgress):
    """Keeps the task and what was counted; raises KeyboardInterrupt once ``stop_after`` images are counted."""

    def __init__(self, stop_after: int | None = None) -> None:
        super().__init__()
        self.stop_after, self.begun, self.counted = stop_after, None, 0
        self.rates: list[float] = []

    def step(self, task: str, done: int, total: int, *, unit: str = "images", **values: float) -> None:
        self.begun = self.begun or (total, done)
        self.counted = done - self.begun[1]
        self.rates += [rate for name, rate in values.items() if name == "images_per_s"]
        if self.stop_after is not None and self.counted >= self.stop_after:
            raise KeyboardInterrupt


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    return World(tmp_path_factory.mktemp("world"))


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The number of images in every batch that the network sees."""
    from stages.masks.extraction import AttentionExtractor

    seen: list[int] = []
    records = AttentionExtractor.records

    def counted(self, batch, inputs, **options):
        seen.append(len(batch))
        return records(self, batch, inputs, **options)

    monkeypatch.setattr(AttentionExtractor, "records", counted)
    return seen


def test_a_promise_is_a_small_file(world: World, tmp_path: Path) -> None:
    assert [path.name for path in world.promised.rglob("*")] == ["views.json"]
    views = read_views(world.promised)
    assert views is not None
    assert views.model_dump() == VIEWS.model_dump(exclude={"keep_maps"})
    assert read_views(world.stored) is None
    inputs = {"images": world.data, "classifier": world.classifier, "data_root": None, "progress": SilentProgress()}
    assert make_attention(PROMISED, **inputs, out=tmp_path / "part", part=Part(0, 2)) == StageResult()
    assert not (tmp_path / "part").exists()


@pytest.mark.parametrize("runtime", [ONE, TWO], ids=["one", "two"])
@pytest.mark.parametrize(
    "name", ["none", "par", "torch", pytest.param("pydensecrf", marks=needs_native), "walk", "soft"]
)
def test_masks_are_those_of_stored_maps(world: World, tmp_path: Path, name: str, runtime: Runtime) -> None:
    folder = f"{tmp_path.name}"
    stored = world.make(f"{folder}-stored", CONFIGS[name], is_stored=True)
    progress = Counter()
    made = world.make(folder, CONFIGS[name], runtime=runtime, progress=progress)
    assert made == stored
    files = world.files_but_windows(folder)
    assert len([path for path in files if path.startswith("masks/")]) == NUM_IMAGES
    assert files == world.files_but_windows(f"{folder}-stored")
    assert (progress.begun, progress.counted) == ((NUM_IMAGES, 0), NUM_IMAGES)
    assert len(progress.rates) > 0


def test_the_masks_have_something_to_say(world: World) -> None:
    """Else equal bytes would say little: the maps differ from image to image and give foreground."""
    result = world.make("plain", CONFIGS["none"])
    assert 0.05 < result.metrics["masks.foreground_ratio"] < 0.95
    assert len({world.files("plain")[f"masks/{name}.png"] for name in IDS}) > NUM_IMAGES // 2


@pytest.mark.parametrize("count", [2, 3, 7])
def test_parts_are_windows_and_the_whole_costs_nothing_then(world: World, calls: list[int], count: int) -> None:
    """Three windows: seven parts leave four without any."""
    whole = world.make(f"whole{count}")
    totals = []
    for index in range(count):
        progress = Counter()
        part = f"part{count}-{index}"
        assert world.make(part, part=Part(index, count), progress=progress) == StageResult()
        assert progress.counted == progress.begun[0]
        totals.append(progress.begun[0])
        for name, content in world.files(part).items():
            target = world.root / f"merged{count}" / name
            assert not target.exists(), "in two parts"
            target.parent.mkdir(parents=True, exist_ok=True)
            target.write_bytes(content)
    assert sum(totals) == NUM_IMAGES
    calls.clear()
    progress = Counter()
    assert world.make(f"merged{count}", progress=progress) == whole
    assert (progress.begun, progress.counted, calls) == ((NUM_IMAGES, NUM_IMAGES), 0, [])
    assert world.files(f"merged{count}") == world.files(f"whole{count}")


@pytest.mark.parametrize("stop_after", [1, 5, 8])
@pytest.mark.parametrize("runtime", [ONE, TWO], ids=["one", "two"])
def test_a_stopped_run_goes_on_with_the_unfinished_windows(
    world: World, calls: list[int], stop_after: int, runtime: Runtime
) -> None:
    config, name = CONFIGS["none"], f"stopped{stop_after}-{runtime.processes}"
    whole = world.make("reference-none", config)
    with pytest.raises(KeyboardInterrupt):
        world.make(name, config, progress=Counter(stop_after), runtime=runtime)
    kept = {path: path.stat().st_mtime_ns for path in (world.root / name / "masks").glob("*.png")}
    finished = len(list((world.root / name).glob("stats/*.json")))
    assert finished == (stop_after - 1) // 5
    calls.clear()
    progress = Counter()
    assert world.make(name, config, progress=progress, runtime=runtime) == whole
    assert progress.begun == (NUM_IMAGES, 5 * finished)
    assert sum(calls) == NUM_IMAGES - 1 - 5 * finished, "whole windows, but for the image without a label"
    assert world.files(name) == world.files("reference-none")
    assert all(path.stat().st_mtime_ns == stamp for path, stamp in kept.items()), "made again"


def test_what_is_lost_or_damaged_is_made_again(world: World, calls: list[int]) -> None:
    world.make("reference")
    world.make("damaged")
    folder = world.root / "damaged"
    (folder / "masks" / "image6.png").unlink()  # window 1 is not finished then
    (folder / "masks" / "image7.png").write_bytes(b"half a png")
    (folder / "stats" / "00002.json").write_text("{")
    calls.clear()
    progress = Counter()
    world.make("damaged", progress=progress)
    assert progress.begun == (NUM_IMAGES, 5)
    assert sum(calls) == 6
    assert world.files("damaged") == world.files("reference")


def test_windows_of_other_images_are_not_taken_for_finished(world: World) -> None:
    world.make("renamed")
    path = world.root / "renamed" / "stats" / "00000.json"
    content = read_json(path)
    content["images"]["stranger"] = content["images"].pop("image0")
    write_json(path, content)
    progress = Counter()
    world.make("renamed", progress=progress)
    assert progress.begun == (NUM_IMAGES, 7)


def test_a_device_too_small_for_a_batch_halves_it_and_goes_on(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    from stages.methods.cam import Cam

    attention, batches = Cam.attention, []

    def tight(self, classifier, images, labels):
        batches.append(len(images))
        if len(images) > 1:
            raise torch.OutOfMemoryError
        return attention(self, classifier, images, labels)

    world.make("roomy")
    monkeypatch.setattr(Cam, "attention", tight)
    progress = Counter()
    world.make("tight", progress=progress)
    assert max(batches) > 1
    assert any("out of device memory with" in warning for warning in progress.warnings)
    assert world.files("tight") == world.files("roomy")


def test_a_walk_by_windows_of_neighbours_gets_them_in_order(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a GPU: batches come by size, the walker wants four neighbours of the list at a time."""
    from stages.masks.refinements.random_walk import MapWalker

    walk, seen = MapWalker.walk, []

    def noted(self, wanted, window):
        seen.append([record.id for record in wanted])
        return walk(self, wanted, window)

    world.make("by-one", CONFIGS["walk"])
    init = MapWalker.__init__

    def widened(self, *arguments, **options):
        init(self, *arguments, **options)
        self.window_images = 4

    monkeypatch.setattr(MapWalker, "__init__", widened)
    monkeypatch.setattr(MapWalker, "walk", noted)
    world.make("by-four", CONFIGS["walk"])
    assert seen == [IDS[0:4], IDS[4:8], IDS[8:11]], "the last has no label"
    assert world.files("by-four") == world.files("by-one")


def test_what_cannot_go_together_is_refused_before_work(world: World, tmp_path: Path) -> None:
    inputs = {"images": world.data, "data_root": None, "out": tmp_path / "out", "progress": SilentProgress()}
    with pytest.raises(ConfigError, match=r"kept no maps.*give classifier=the output folder of train_classifier"):
        make_masks(MASKS, **inputs, attention=world.promised)
    with pytest.raises(ConfigError, match=r"make_masks\.sweep .* stored maps, and make_attention\.keep_maps is false"):
        make_masks(
            MakeMasksConfig.model_validate({"sweep": {}}),
            **inputs,
            attention=world.promised,
            classifier=world.classifier,
        )
    (tmp_path / "damaged").mkdir()
    (tmp_path / "damaged" / "views.json").write_text('{"scales": []}')
    with pytest.raises(DamagedFileError, match=r"views\.json does not say how to look at images"):
        make_masks(MASKS, **inputs, attention=tmp_path / "damaged", classifier=world.classifier)
    assert not (tmp_path / "out").exists()


def test_another_class_list_is_refused(world: World, tmp_path: Path) -> None:
    index = read_json(world.data / "index.json")
    index["classes"]["names"] = ["red", "blue", "green"]
    write_json(tmp_path / "index.json", index)
    with pytest.raises(InputError, match=r"knows the classes \['red', 'green', 'blue'\]"):
        make_masks(
            MASKS,
            images=tmp_path,
            attention=world.promised,
            classifier=world.classifier,
            data_root=world.data / "data",
            out=tmp_path / "out",
            progress=SilentProgress(),
        )


def test_no_torch_is_imported() -> None:
    code = "import sys, stages.masks.window_masks, stages.make_masks; assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)


# ---------------------------------------------------------------------------------------------------------------------
# Maps that say nothing
# ---------------------------------------------------------------------------------------------------------------------


def _break_green(classifier) -> None:
    classifier.head.weight[1] = 3e38  # its scores overflow


def test_a_broken_class_is_background_and_counted_on_both_ways(tmp_path: Path) -> None:
    labels = [*LABELS, *LABELS[:5], ()]
    hit = [name for name, present in zip(IDS, labels, strict=True) if 1 in present]
    world = World(tmp_path, change=_break_green)
    for record in iter_attention(world.stored):
        for label, found, peak in zip(record.labels, record.maps, record.peaks, strict=True):
            assert np.isnan(peak) == (label == 1)
            assert label != 1 or not found.any()
    stored, told = world.make("a", is_stored=True), world.attend(VIEWS, world.stored)
    progress = Counter()
    assert world.make("b", progress=progress) == stored
    assert world.files_but_windows("a") == world.files_but_windows("b")
    masks = [read_index_mask(path) for path in (tmp_path / "b" / "masks").iterdir()]
    assert {2} & set(np.unique(masks[0])) == set(), "class index of green"
    assert max(mask.max() for mask in masks) in {1, 3}
    text = f"{len(hit)} of 12 images have an attention map that is NaN or infinite ({', '.join(sorted(hit)[:5])}, …):"
    for warnings in (told.warnings, progress.warnings):
        assert [warning for warning in warnings if "NaN" in warning] == [
            warning for warning in warnings if warning.startswith(text)
        ]
        assert len([warning for warning in warnings if "NaN" in warning]) == 1
    again = Counter()
    world.make("b", progress=again)
    assert again.warnings == progress.warnings, "a run that went on says the same"


def test_nothing_but_nan_is_refused(tmp_path: Path) -> None:
    def break_all(classifier) -> None:
        classifier.head.weight.fill_(3e38)  # the scores overflow

    write_tiny_classifier(tmp_path / "nan", change=break_all)
    world = World(tmp_path / "world")
    world.classifier = tmp_path / "nan"
    with pytest.raises(InputError, match=r"image 'image0': attention maps must be finite.*train it again"):
        world.make("out")


def test_a_broken_class_alone_in_the_data_is_refused_at_the_end(tmp_path: Path) -> None:
    """One class of three may be broken by itself; only at the end it turns out that there is no other."""
    with pytest.raises(InputError, match=r"found NaN or infinity in all 12; the classifier's weights are broken"):
        World(tmp_path, change=_break_green, labels=[(1,)] * NUM_IMAGES)


def test_a_class_without_evidence_is_counted() -> None:
    census, progress = MapCensus(), SilentProgress()
    for number, peaks in enumerate([(1.0, 0.0), (0.5,), ()]):
        maps = np.zeros((len(peaks), 2, 2), np.uint8)
        labels = tuple(range(len(peaks)))
        census.count(AttentionRecord(f"i{number}", (2, 2), labels, maps, np.array(peaks, np.float32)))
    census.conclude(3, progress)
    assert len(progress.warnings) == 1
    assert progress.warnings[0].startswith("1 of 3 images has an attention map without evidence (i0):")


def test_what_is_kept_of_a_window_reads_back() -> None:
    measured = Measured(maps=MapCensus(maps=3, finite=2, broken=["b", "a"], empty=["c"]))
    again = Measured.from_json(measured.to_json())
    assert again.maps == MapCensus(maps=3, finite=2, broken=["a", "b"], empty=["c"])


# ---------------------------------------------------------------------------------------------------------------------
# Scores without maps
# ---------------------------------------------------------------------------------------------------------------------


def _write_truth(world: World) -> ImageSet:
    """Give every image a true mask: its bright rectangles, as the tiny data set draws them."""
    from stages.contracts import write_index_mask

    index = read_json(world.data / "index.json")
    images = open_image_set(world.data, None)
    for entry in index["images"]:
        pixels = images.read_image(images.index.record(entry["id"]))
        truth = np.where(pixels.max(axis=2) > 200, pixels.argmax(axis=2) + 1, 0).astype(np.uint8)
        write_index_mask(world.data / "data" / entry["mask"], truth)
    return open_image_set(world.data, None)


@pytest.mark.parametrize("name", ["none", "par", "walk"])
def test_masks_score_the_same_without_maps(tmp_path: Path, name: str) -> None:
    world = World(tmp_path)
    images, config = _write_truth(world), CONFIGS[name]
    scores = {}
    for is_stored in (True, False):
        out = "stored-masks" if is_stored else "masks"
        world.make(out, config, is_stored=is_stored)
        context = ScoringContext(
            images=images,
            ids=frozenset(IDS[1:]),
            seeds=config,
            attention=world.stored if is_stored else world.promised,
            masks=world.root / out,
            partial=world.root / f"partial-{out}",
            chain=config.chain,
            has_maps=is_stored,
        )
        counts = list(score_training(context, processes=1))
        assert sum(counts) == NUM_IMAGES - 1
        scores[is_stored] = collect_training(context)
    expected = {key: value for key, value in scores[True].metrics().items() if not key.startswith("attention.")}
    assert scores[False].metrics() == expected
    assert 0 < expected["masks.miou"] <= 1
    assert scores[False].curve() is None
    assert EvaluateConfig().segmentation  # the rest of evaluate does not know of maps


# ---------------------------------------------------------------------------------------------------------------------
# Writing
# ---------------------------------------------------------------------------------------------------------------------


def test_a_full_disk_says_what_stays_valid(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    world.make("reference")
    written = _fill_disk(monkeypatch, after=4)
    with pytest.raises(EnvironmentFailure) as caught:
        world.make("full")
    monkeypatch.undo()
    assert "the disk is full (No space left on device); " in caught.value.message
    masks = list((world.root / "full" / "masks").glob("*.png"))
    assert f"; {len(masks)} masks are finished and stay valid: free some space" in caught.value.message
    assert written[0] >= len(masks) > 0
    assert not list((world.root / "full").rglob(".tmp-*")), "half a file"
    world.make("full")
    assert world.files("full") == world.files("reference")


def test_a_full_disk_while_maps_are_stored(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    _fill_disk(monkeypatch, after=2)
    with pytest.raises(EnvironmentFailure, match="2 of 3 files of maps are finished and stay valid"):
        world.attend(VIEWS, world.root / "full-maps")
    monkeypatch.undo()
    world.attend(VIEWS, world.root / "full-maps")
    for one, two in zip(attention_shards(world.root / "full-maps"), attention_shards(world.stored), strict=True):
        assert one.read_bytes() == two.read_bytes()


def test_a_full_disk_behind_writing_threads(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    """Torch's CRF works in this process and threads write for it."""
    _fill_disk(monkeypatch, after=3)
    with pytest.raises(EnvironmentFailure, match="the disk is full"):
        world.make("full-threads", CONFIGS["torch"])
    monkeypatch.undo()
    world.make("full-threads", CONFIGS["torch"])
    world.make("reference-threads", CONFIGS["torch"])
    assert world.files("full-threads") == world.files("reference-threads")


def _fill_disk(monkeypatch: pytest.MonkeyPatch, *, after: int) -> list[int]:
    """Let the disk be full after some files."""
    import os

    fsync, count, lock = os.fsync, [0], threading.Lock()

    def full(descriptor: int) -> None:
        with lock:
            count[0] += 1
            if count[0] > after:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        fsync(descriptor)

    monkeypatch.setattr("stages.contracts.files.os.fsync", full)
    return count


def test_the_writer_holds_back_and_keeps_the_order_of_what_comes_last() -> None:
    done: list[str] = []
    is_open = threading.Event()

    def write(name: str) -> None:
        is_open.wait(10)
        done.append(name)

    with BackgroundWriter(threads=2, most_waiting=4) as writer:
        for number in range(3):
            writer.submit(write, f"m{number}")
        writer.submit_last(done.append, "window")
        blocked = threading.Thread(target=writer.submit, args=(write, "one too many"))
        blocked.start()
        time.sleep(0.05)
        assert blocked.is_alive()
        assert done == []
        is_open.set()
        blocked.join(10)
    assert sorted(done[:3]) == ["m0", "m1", "m2"]
    assert set(done[3:]) == {"window", "one too many"}


@pytest.mark.parametrize("is_late", [False, True])
def test_an_error_of_the_writer_comes_out(is_late: bool) -> None:
    def fail() -> None:
        raise OSError(errno.EIO, "broken")

    def use(then: Callable[[BackgroundWriter], None]) -> None:
        with BackgroundWriter(threads=1) as writer:
            writer.submit(fail)
            writer.submit_last(done.append, "window")
            then(writer)

    done: list[str] = []

    def go_on(writer: BackgroundWriter) -> None:
        for _ in range(100):
            time.sleep(0.01)
            writer.submit(int)

    with pytest.raises(OSError, match="broken"):
        use(go_on if not is_late else lambda writer: None)
    assert done == [], "what comes last must not say that all is written"
