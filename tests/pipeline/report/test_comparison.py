"""What a comparison says of runs whose counts are known, and what it refuses to compare."""

import re
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from pipeline.report.comparison import (
    ScoredRun,
    ScoreRow,
    compare_runs,
    difference_text,
    odds_text,
    value_text,
    write_page,
)
from stages.contracts import ClassList, ImageIndex, ImageRecord, ImageSet, write_index_mask
from stages.errors import InputError
from stages.ops.metrics.bootstrap import Interval, interval, mean_over_classes, resample_iou
from stages.ops.metrics.confusion import SparseConfusions, confusion_matrix, iou, mean_iou
from tests.pipeline.report.scored_worlds import IDS, counts, scored_run


def find(rows: tuple[ScoreRow, ...], metric: str, class_name: str | None = None) -> ScoreRow:
    [row] = [row for row in rows if (row.metric, row.class_name) == (metric, class_name)]
    return row


def test_differences_are_paired() -> None:
    """The second run is better by a little on every image: sure in pairs, though the scores' own intervals overlap."""
    low = counts(0.6)
    rows = []
    for position, image_id in enumerate(low.ids):
        matrix = low.matrix(position)
        moved = np.minimum(np.diag(matrix[:, [1, 2, 0]]), 10)
        matrix[np.arange(3), np.arange(3)] += moved
        matrix[np.arange(3), [1, 2, 0]] -= moved
        rows.append((image_id, matrix))
    high = SparseConfusions.from_matrices(3, rows)
    found = compare_runs([scored_run("a", {"segmenter": low}), scored_run("b", {"segmenter": high})])
    row = find(found.rows, "segmenter.miou")
    assert row.num_images == len(IDS)
    assert row.values == pytest.approx((mean_iou(low.total()), mean_iou(high.total())))
    first, second = row.intervals
    assert first is not None
    assert second is not None
    assert second.low < first.high
    assert row.differences[0] is None
    difference = row.differences[1]
    assert difference is not None
    assert difference.value == pytest.approx(mean_iou(high.total()) - mean_iou(low.total()))
    assert difference.better_ratio == 1
    resampled = mean_over_classes(resample_iou([low, high]))
    assert difference.interval == interval(resampled[1] - resampled[0])
    assert difference.interval is not None
    assert 0 < difference.interval.low < difference.value < difference.interval.high
    dog = find(found.class_rows, "segmenter.miou", "dog")
    assert dog.values == pytest.approx((iou(low.total())[2], iou(high.total())[2]))
    assert dog.differences[1] is not None
    assert dog.differences[1].interval is not None


def test_a_run_is_no_better_than_itself() -> None:
    same = {"segmenter": counts(0.6)}
    difference = find(compare_runs([scored_run("a", same), scored_run("b", same)]).rows, "segmenter.miou").differences
    assert difference[1] is not None
    assert (difference[1].value, difference[1].interval, difference[1].better_ratio) == (0, Interval(0, 0), 0)


def test_three_runs_are_each_compared_with_the_first() -> None:
    runs = [scored_run(str(right), {"segmenter": counts(right, seed=3)}) for right in (0.5, 0.8, 0.3)]
    row = find(compare_runs(runs).rows, "segmenter.miou")
    better, worse = row.differences[1:]
    assert better is not None
    assert worse is not None
    assert (better.better_ratio, worse.better_ratio) == (1, 0)
    assert better.value == pytest.approx(row.values[1] - row.values[0])


def test_what_a_run_does_not_have_is_left_open() -> None:
    one = scored_run("a", {"segmenter": counts(0.5)}, pixel_accuracy=0.5)
    two = scored_run("b", {"segmenter": counts(0.6), "segmenter_ms": counts(0.7)}, miou_low=0.1, threshold=float("nan"))
    found = compare_runs([one, two])
    scales = find(found.rows, "segmenter.miou_ms")
    assert scales.values == (None, pytest.approx(mean_iou(two.counts["segmenter_ms"].total())))
    assert scales.differences == (None, None)
    accuracy = find(found.rows, "segmenter.pixel_accuracy")
    assert accuracy.values == (0.5, None)
    assert {row.metric for row in found.rows} == {"segmenter.miou", "segmenter.miou_ms", "segmenter.pixel_accuracy"}
    assert (value_text(scales, 0), difference_text(accuracy, 1)) == ("–", "")


def test_numbers_without_counts_have_a_difference_and_no_interval() -> None:
    runs = [scored_run(w, {"segmenter": counts(0.5)}, pixel_accuracy=a) for w, a in (("a", 0.5), ("b", 0.75))]
    row = find(compare_runs(runs).rows, "segmenter.pixel_accuracy")
    assert row.intervals == (None, None)
    assert row.differences[1] is not None
    assert (row.differences[1].value, row.differences[1].interval) == (0.25, None)
    assert value_text(row, 1) == "75.0 %"
    assert difference_text(row, 1) == "+25.0"


def test_training_scores_stand_on_the_common_images() -> None:
    """GAIN_ext leaves out the images whose masks it was trained on; what is known of other images only is left out."""
    all_images, some = counts(0.6), counts(0.6).select(IDS[5:])
    one, two = scored_run("a", {"masks": all_images}), scored_run("b", {"masks": some})
    one.metrics["masks.coverage"] = two.metrics["masks.coverage"] = 0.9
    found = compare_runs([one, two])
    row = find(found.rows, "masks.miou")
    assert row.num_images == len(IDS) - 5
    assert row.values == pytest.approx((mean_iou(some.total()),) * 2)
    assert [row.metric for row in found.rows] == ["masks.miou"]
    assert "only the 25 images count" in found.notes[0]
    assert "masks.coverage is left out" in found.notes[1]


def test_other_val_images_are_refused_by_name() -> None:
    one = scored_run("a.yaml", {"segmenter": counts(0.6)})
    two = scored_run("b.yaml", {"segmenter": counts(0.6, ids=[*IDS[1:], "new"])})
    with pytest.raises(InputError, match=r"a\.yaml and b\.yaml were scored on other images") as error:
        compare_runs([one, two])
    assert error.value.problems == ("only a.yaml: v00 (1 images)", "only b.yaml: new (1 images)")


def localized(word: str, *boxes: tuple[str, tuple[int, int, int, int]], is_known: bool = True) -> ScoredRun:
    """An evaluation of localisation alone, on images with one box each."""
    run = scored_run(word, {})
    val = tuple(
        ImageRecord.model_validate({"id": name, "image": name, "size": (9, 9), "labels": (0,), "boxes": [(0, box)]})
        for name, box in boxes
    )
    return replace(run, metrics={"localization.top1_loc": 0.5}, val=val if is_known else None)


A, B = ("a", (0, 0, 3, 3)), ("b", (1, 1, 4, 4))


def test_localization_on_other_images_is_refused_by_name() -> None:
    with pytest.raises(InputError, match=r"scored on other images \(localization: 2 and 1\)") as error:
        compare_runs([localized("one", A, B), localized("two", A)])
    assert error.value.problems == ("only one: b (1 images)", "only two: none (0 images)")
    moved = ("b", (1, 1, 4, 5))
    with pytest.raises(InputError, match=r"other labels or boxes \(localization: 1 images, b\)"):
        compare_runs([localized("one", A, B), localized("two", A, moved)])
    plain = replace(localized("plain", A), metrics={})
    assert compare_runs([localized("one", A, B), plain]).notes == (), "it has no localisation to compare"


def test_localization_on_the_same_images_is_compared_and_on_unknown_ones_with_a_note() -> None:
    one = localized("one", A, B)
    found = compare_runs([one, localized("two", B, A)])
    assert find(found.rows, "localization.top1_loc").values == (0.5, 0.5)
    assert found.notes == ()
    found = compare_runs([one, localized("old", is_known=False)])
    [note] = found.notes
    assert "on which images old was scored is not in the store any more" in note


def test_the_order_of_the_images_does_not_matter() -> None:
    one = counts(0.6)
    found = compare_runs([scored_run("a", {"segmenter": one}), scored_run("b", {"segmenter": one.select(IDS[::-1])})])
    difference = find(found.rows, "segmenter.miou").differences[1]
    assert difference is not None
    assert difference.interval == Interval(0, 0)


def test_other_true_masks_are_refused() -> None:
    one, two = counts(0.6), counts(0.6, size=900).select(IDS[:1])
    changed = SparseConfusions.merge([two, one.select(IDS[1:])])
    with pytest.raises(InputError, match=r"other true masks \(segmenter: 1 images, v00\)"):
        compare_runs([scored_run("a", {"segmenter": one}), scored_run("b", {"segmenter": changed})])


def test_other_classes_are_refused_by_name() -> None:
    one, two = scored_run("a", {"segmenter": counts(0.6)}), scored_run("b", {"segmenter": counts(0.6)})
    object.__setattr__(two, "classes", ("background", "cat", "owl"))
    with pytest.raises(InputError, match="other classes") as error:
        compare_runs([one, two])
    assert error.value.problems == ("only b: owl", "only a: dog")


def test_one_run_is_no_comparison() -> None:
    with pytest.raises(InputError, match="at least two runs, found 1"):
        compare_runs([scored_run("a", {})])


def test_cells_in_words() -> None:
    runs = [scored_run(str(right), {"segmenter": counts(right, seed=3)}) for right in (0.5, 0.8)]
    row = find(compare_runs(runs).rows, "segmenter.miou")
    low, value, high = row.intervals[0].low, row.values[0], row.intervals[0].high
    assert value_text(row, 0) == f"{value * 100:.1f} % ({low * 100:.1f} … {high * 100:.1f})"
    assert difference_text(row, 0) == ""
    assert odds_text(row, 1) == "better in 100 % of resamples"
    assert odds_text(row, 0) == ""
    worse = find(compare_runs(runs[::-1]).rows, "segmenter.miou")
    assert odds_text(worse, 1) == "better in 0 % of resamples"
    same = find(compare_runs([runs[0], runs[0]]).rows, "segmenter.miou")
    assert (difference_text(same, 1), odds_text(same, 1)) == ("the same", "")


def test_what_was_set_otherwise_comes_in_the_order_of_the_stages_and_of_numbers() -> None:
    shared = {"train_classifier.seed": "0", "train_classifier.layer10": "a", "train_classifier.layer2": "a"}
    one = replace(scored_run("a", {}), settings=shared | {"make_masks.threshold": "0.1"})
    two = replace(
        scored_run("b", {}), settings=shared | {"train_classifier.layer10": "b", "train_classifier.layer2": "c"}
    )
    found = compare_runs([one, two])
    assert [(row.name, row.values) for row in found.settings] == [
        ("train_classifier.layer2", ("a", "c")),
        ("train_classifier.layer10", ("a", "b")),
        ("make_masks", ("yes", None)),
    ]
    assert compare_runs([one, one]).settings == ()


def test_unknown_metrics_are_sorted_as_people_count() -> None:
    metrics = {f"new.at_{number}": 0.5 for number in (10, 2)}
    runs = [replace(scored_run(word, {}), metrics=metrics) for word in ("a", "b")]
    assert [row.metric for row in compare_runs(runs).rows] == ["new.at_2", "new.at_10"]


def test_a_page_has_the_settings_first_and_then_the_images_that_differ_most(tmp_path: Path) -> None:
    """On v.b the second run finds nothing; on v.a both are right."""
    truth, nothing = np.zeros((20, 30), np.uint8), np.zeros((20, 30), np.uint8)
    truth[5:15, 5:25] = 1
    records = [
        ImageRecord(id=i, image=f"{i}.png", size=(20, 30), labels=None, mask=f"m/{i}.png") for i in ("v.a", "v.b")
    ]
    index = ImageIndex(
        classes=ClassList(names=("cat", "dog")),
        images=tuple(records),
        splits={"train": (), "val": ("v.a", "v.b")},
        mask_values={0: 0, 1: 1},
    )
    for record in records:
        Image.new("RGB", (30, 20), "grey").save(tmp_path / record.image)
        write_index_mask(tmp_path / f"m/{record.id}.png", truth)
    runs = []
    for word, threshold, masks in (("one", "0.1", (truth, truth)), ("two", "0.2", (truth, nothing))):
        pairs = []
        for record, mask in zip(records, masks, strict=True):
            write_index_mask(tmp_path / word / f"predictions/{record.id}.png", mask)
            pairs.append((record.id, confusion_matrix(truth, mask, 3)))
        run = scored_run(word, {"segmenter": SparseConfusions.from_matrices(3, pairs)})
        images, settings = ImageSet(index=index, root=tmp_path), {"make_masks.threshold": threshold}
        runs.append(replace(run, path=tmp_path / word, images=images, settings=settings))
    html = write_page(compare_runs(runs), tmp_path / "c.html").read_text("utf-8")
    assert html.index("make_masks.threshold") < html.index(">Scores<")
    titles = re.findall(r'alt="([^"]+) of v\.b"', html)
    assert titles == ["image", "truth", "run 1: 100.0 %", "run 2: 33.3 %"]  # background 400 of 600, cat none
    assert html.index("of v.b") < html.index("of v.a")
    (tmp_path / "v.b.png").unlink()
    html = write_page(compare_runs(runs), tmp_path / "c.html").read_text("utf-8")
    assert "Left out: the pictures could not be read:" in html
