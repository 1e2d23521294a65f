import math

import numpy as np
import pytest
import torch

from stages.contracts import (
    Part,
    Runtime,
    SilentProgress,
    StageResult,
    attention_shards,
    iter_attention,
    read_json,
    write_json,
)
from stages.errors import DataError, InputError
from stages.make_attention import MakeAttentionConfig, make_attention
from tests.stages.methods.tiny_data import LABELS, SIZES, write_tiny_classifier, write_tiny_data

CONFIG = MakeAttentionConfig(scales=(0.5, 1.0), shard_images=2)
RUNTIME = Runtime(device="cpu", workers=1, threads=1)


class Recorder(SilentProgress):
    """Keeps what was said; raises KeyboardInterrupt once ``stop_after`` images are counted."""

    def __init__(self, stop_after=None):
        super().__init__()
        self.stop_after, self.begun, self.counted, self.lines = stop_after, None, 0, []

    def step(self, task, done, total, *, unit="images", **values):
        self.begun = self.begun or (task, total, done, unit)
        self.counted = done - self.begun[2]
        if self.stop_after is not None and self.counted >= self.stop_after:
            raise KeyboardInterrupt

    def info(self, text):
        self.lines.append(text)


@pytest.fixture
def data(tmp_path):
    return write_tiny_data(tmp_path)


@pytest.fixture
def trained(tmp_path):
    return write_tiny_classifier(tmp_path / "classifier")


def _run(data, trained, out, *, config=CONFIG, progress=None, runtime=RUNTIME, part=None):
    return make_attention(
        config,
        images=data,
        classifier=trained,
        data_root=None,
        out=out,
        progress=progress or SilentProgress(),
        runtime=runtime,
        part=part,
    )


def _bytes(out):
    return {path.name: path.read_bytes() for path in attention_shards(out)}


def test_writes_the_labels_of_every_training_image_in_order(data, trained, tmp_path):
    progress = Recorder()
    result = _run(data, trained, tmp_path / "out", progress=progress)
    records = list(iter_attention(tmp_path / "out"))
    assert [record.id for record in records] == [f"image{number}" for number in range(6)]
    assert [record.size for record in records] == SIZES
    assert [record.labels for record in records] == LABELS
    for record in records:
        assert record.maps.shape == (len(record.labels), math.ceil(record.size[0] / 4), math.ceil(record.size[1] / 4))
        assert [m.max() for m in record.maps] == [255 if peak > 0 else 0 for peak in record.peaks]
    assert max(record.maps.max() for record in records) == 255
    total = sum(len(content) for content in _bytes(tmp_path / "out").values())
    assert result.metrics == {"attention.bytes_per_image": total / 6}
    assert progress.begun == ("attention maps", 6, 0, "images")
    assert progress.counted == 6
    assert progress.lines == [f"attention: {total / 6:,.0f} bytes per image, 0.0 MB for 6 images"]


def test_a_rerun_and_other_workers_give_the_same_bytes(data, trained, tmp_path):
    _run(data, trained, tmp_path / "a")
    _run(data, trained, tmp_path / "b", runtime=Runtime(device="cpu", workers=0, threads=1))
    assert len(_bytes(tmp_path / "a")) == 3
    assert _bytes(tmp_path / "a") == _bytes(tmp_path / "b")


def test_an_interrupted_run_continues_at_the_first_missing_shard(data, trained, tmp_path):
    _run(data, trained, tmp_path / "whole")
    with pytest.raises(KeyboardInterrupt):
        _run(data, trained, tmp_path / "cut", progress=Recorder(stop_after=3))
    assert list(_bytes(tmp_path / "cut")) == ["attention-00000.npz"]
    progress = Recorder()
    result = _run(data, trained, tmp_path / "cut", progress=progress)
    assert progress.begun == ("attention maps", 6, 2, "images")
    assert progress.counted == 4
    assert _bytes(tmp_path / "cut") == _bytes(tmp_path / "whole")
    assert result.metrics["attention.bytes_per_image"] > 0


@pytest.mark.parametrize(
    "damage", [lambda b: b[:100], lambda b: b"", lambda b: b[:80] + bytes(40) + b[120:]], ids=["cut", "empty", "zeroed"]
)
def test_a_damaged_shard_is_named_and_made_again(damage, data, trained, tmp_path):
    _run(data, trained, tmp_path)
    whole = _bytes(tmp_path)
    path = attention_shards(tmp_path)[1]
    path.write_bytes(damage(path.read_bytes()))
    progress = Recorder()
    _run(data, trained, tmp_path, progress=progress)
    assert progress.begun == ("attention maps", 6, 4, "images")
    assert len(progress.warnings) == 1
    assert "attention-00001.npz" in progress.warnings[0]
    assert _bytes(tmp_path) == whole


def test_a_finished_run_needs_no_classifier(data, trained, tmp_path):
    _run(data, trained, tmp_path / "out")
    again = _run(data, tmp_path / "nowhere", tmp_path / "out")
    assert again.metrics["attention.bytes_per_image"] > 0


@pytest.mark.parametrize("count", [2, 3, 5])
def test_parts_are_whole_files_of_the_whole(count, data, trained, tmp_path):
    """Three files: five parts leave two without any."""
    whole = _run(data, trained, tmp_path / "whole")
    files, totals = {}, []
    for index in range(count):
        out, progress = tmp_path / f"part{index}", Recorder()
        assert _run(data, trained, out, progress=progress, part=Part(index, count)) == StageResult()
        assert not files.keys() & _bytes(out).keys()
        assert progress.begun == ("attention maps", 2 * len(_bytes(out)), 0, "images")
        assert progress.lines == []
        assert out.exists() == bool(_bytes(out)), "an empty part writes nothing"
        files |= _bytes(out)
        totals.append(progress.begun[1])
    assert files == _bytes(tmp_path / "whole")
    assert sum(totals) == 6
    (tmp_path / "merged" / "shards").mkdir(parents=True)
    for name, content in files.items():
        (tmp_path / "merged" / "shards" / name).write_bytes(content)
    progress = Recorder()
    assert _run(data, tmp_path / "no-classifier", tmp_path / "merged", progress=progress) == whole
    assert progress.counted == 0, "all is there"


def test_shards_of_other_images_are_not_taken_over(data, trained, tmp_path):
    _run(data, trained, tmp_path / "out")
    other = write_tiny_data(tmp_path / "other", sizes=SIZES[:4], labels=LABELS[:4])
    index = read_json(other / "index.json")
    index["splits"]["train"].reverse()
    write_json(other / "index.json", index)
    with pytest.raises(InputError, match=r"attention-00000\.npz holds attention of other images"):
        _run(other, trained, tmp_path / "out")


def test_a_class_without_evidence_stays_zero(data, tmp_path):
    trained = write_tiny_classifier(tmp_path / "dead", dead_class=1)
    _run(data, trained, tmp_path)
    for record in iter_attention(tmp_path):
        for label, attention, peak in zip(record.labels, record.maps, record.peaks, strict=True):
            assert (label == 1) == (peak == 0)
            assert (label == 1) == (attention.max() == 0)


def test_batch_and_shard_size_change_no_map_by_more_than_a_step(data, trained, tmp_path):
    _run(data, trained, tmp_path / "pairs")
    _run(data, trained, tmp_path / "all", config=MakeAttentionConfig(scales=(0.5, 1.0), shard_images=64))
    for one, two in zip(iter_attention(tmp_path / "pairs"), iter_attention(tmp_path / "all"), strict=True):
        assert one.id == two.id
        assert np.abs(one.maps.astype(int) - two.maps).max(initial=0) <= 1
        np.testing.assert_allclose(one.peaks, two.peaks, rtol=1e-4)


def test_scales_and_flips_and_stride_change_the_maps(data, trained, tmp_path):
    _run(data, trained, tmp_path / "base")
    base = [record.maps for record in iter_attention(tmp_path / "base")]
    others = {
        "scales": MakeAttentionConfig(scales=(1.0,), shard_images=2),
        "flip": MakeAttentionConfig(scales=(0.5, 1.0), flip=False, shard_images=2),
        "short": MakeAttentionConfig(scales=(0.5, 1.0), short_side_px=48, shard_images=2),
    }
    for name, config in others.items():
        _run(data, trained, tmp_path / name, config=config)
        maps = [record.maps for record in iter_attention(tmp_path / name)]
        assert [m.shape for m in maps] == [m.shape for m in base]
        assert any((one != two).any() for one, two in zip(maps, base, strict=True)), name


def test_an_image_without_any_class_gets_no_maps_and_is_not_read(trained, tmp_path):
    data = write_tiny_data(tmp_path, sizes=[(24, 40), (30, 41)], labels=[(1,), ()])
    (data / "data" / "image1.png").unlink()
    progress = Recorder()
    _run(data, trained, tmp_path, progress=progress)
    empty = list(iter_attention(tmp_path))[1]
    assert (empty.labels, empty.maps.shape, empty.peaks.shape) == ((), (0, 8, 11), (0,))
    assert progress.counted == 2


def test_unlabelled_training_images_are_all_named(trained, tmp_path):
    data = write_tiny_data(tmp_path, labels=[(0,), None, (1,), None, (2,), (0,)])
    with pytest.raises(DataError) as caught:
        _run(data, trained, tmp_path)
    assert [problem.split("'")[1] for problem in caught.value.problems] == ["image1", "image3"]


def test_another_class_list_is_refused(data, trained, tmp_path):
    index = read_json(data / "index.json")
    index["classes"]["names"] = ["red", "blue", "green"]
    write_json(data / "index.json", index)
    with pytest.raises(InputError, match=r"knows the classes \['red', 'green', 'blue'\]"):
        _run(data, trained, tmp_path)


def test_an_image_that_changed_after_prepare_data_is_named(data, trained, tmp_path):
    (data / "data" / "image0.png").write_bytes((data / "data" / "image1.png").read_bytes())
    with pytest.raises(DataError, match=r"image0\.png: the index says \(24, 40\) pixels.*found \(40, 24\)"):
        _run(data, trained, tmp_path)


def test_weights_of_nan_are_refused_and_nothing_is_written(data, tmp_path):
    def break_head(classifier):
        classifier.head.weight.fill_(3e38)  # the scores overflow

    trained = write_tiny_classifier(tmp_path / "nan", change=break_head)
    with pytest.raises(InputError, match="image 'image0': attention maps must be finite"):
        _run(data, trained, tmp_path)
    assert attention_shards(tmp_path) == []


@pytest.mark.parametrize(
    ("wrong", "text"),
    [
        ({"scales": ()}, "at least 1 item"),
        ({"scales": (1.0, 1.0)}, "each scale may stand once"),
        ({"scales": (0.0,)}, "greater than or equal to 0.1"),
        ({"map_stride": 3}, "1, 2, 4 or 8"),
        ({"batch_size": 4}, "Extra inputs"),
    ],
)
def test_wrong_options_are_refused(wrong, text):
    with pytest.raises(ValueError, match=text):
        MakeAttentionConfig.model_validate(wrong)


def test_random_numbers_of_the_caller_are_left_alone(data, trained, tmp_path):
    torch.manual_seed(3)
    before = torch.get_rng_state()
    _run(data, trained, tmp_path)
    assert torch.equal(before, torch.get_rng_state())
