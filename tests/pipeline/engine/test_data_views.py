"""A stage's key changes with what the stage reads of the data, and with nothing else of it.

``pytest -s`` prints the table.  Nothing is decoded for a key, so that any bytes do for an image or a mask.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path

import pytest

from pipeline.config.run_config import RunConfig, find_config
from pipeline.config.yaml_models import load_model
from pipeline.engine.plan import STAGES, Plan, plan_run
from stages.errors import DataError
from tests.stages.data.wsol_sets import write_cub

LETTERS = dict(zip(STAGES, "PCAMSE", strict=True))
"""P prepare_data, C train_classifier, A make_attention, M make_masks, S train_segmenter, E evaluate."""

TRAIN = tuple(f"t{number}" for number in range(8))
SCORED = ("t0", "t1", "t2", "t4")
"""The score list; t4 has no mask yet."""

RUNS: Mapping[str, tuple[str, ...]] = {
    "weak": (),
    "gain_ext": ("train_classifier.method={name: gain_ext, pixel_images: 1}",),  # draws t1
    "sweep": ("make_masks.sweep={num_images: 1, seed: 3}",),  # draws t2
    "full": ("train_segmenter.supervision=full",),
    "test": ("evaluate.splits=[val, test]",),
}

Change = Callable[[Path], str | None]
"""Changes the data set below a folder; may return an override for the config."""


def write_voc(root: Path) -> Path:
    """VOC's layout: of eight training images three have official masks and t5 an additional one."""
    for image_id in (*TRAIN, "v0", "v1", "x0", "x1"):
        put(root / f"JPEGImages/{image_id}.jpg", image_id)
    for image_id in ("t0", "t1", "t2", "v0", "v1"):
        put(root / f"SegmentationClass/{image_id}.png", image_id)
    put(root / "SegmentationClassAug/t5.png", "t5")
    rows = [
        f"{image_id},{'cat' if number % 2 else 'dog'}" for number, image_id in enumerate((*TRAIN, "v0", "v1", "x1"))
    ]
    put(root / "labels.csv", "image,labels\n" + "\n".join(rows))
    lists = {"trainaug": TRAIN, "train": SCORED, "val": ("v0", "v1"), "test": ("x0",)}
    for name, ids in lists.items():
        put(root / f"ImageSets/Segmentation/{name}.txt", "\n".join(ids))
    return root


def put(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text, encoding="utf-8")


def plan(root: Path, *overrides: str) -> Plan:
    data = f"data={{format: voc, root: {root}, classes: [cat, dog], labels: {root}/labels.csv, test_list: test}}"
    run = load_model(RunConfig, find_config("demo"), ["prepare_data.holdout_ratio=0.25", data, *overrides])
    return plan_run(run, root / "digests.json")


def changed(before: Plan, after: Plan) -> str:
    """The letters of the stages whose keys differ."""
    assert before.keys.keys() == after.keys.keys()
    return "".join(LETTERS[name] for name in before.keys if before.keys[name] != after.keys[name])


def writes(name: str) -> Change:
    return lambda root: put(root / name, "other bytes")


def replaces(name: str, old: str, new: str, *overrides: str) -> Change:
    def change(root: Path) -> str | None:
        text = (root / name).read_text(encoding="utf-8")
        assert old in text
        put(root / name, text.replace(old, new))
        return next(iter(overrides), None)

    return change


ALL = {"weak": "PCAMSE", "gain_ext": "PCAMSE", "sweep": "PCAMSE", "full": "PCSE", "test": "PCAMSE"}
SCORES = dict.fromkeys(RUNS, "PE")
INDEX = dict.fromkeys(RUNS, "P")
LISTS = "ImageSets/Segmentation"

CHANGES: Mapping[str, tuple[Change, Mapping[str, str]]] = {
    "train image": (writes("JPEGImages/t7.jpg"), ALL),
    "train image more": (replaces(f"{LISTS}/trainaug.txt", "t7", "t7\nx1"), ALL),
    "train label": (replaces("labels.csv", "t7,cat", "t7,dog"), ALL),
    "class name": (replaces("labels.csv", "dog", "cow", "data.classes=[cat, cow]"), ALL),
    "val image": (writes("JPEGImages/v0.jpg"), SCORES),
    "val label": (replaces("labels.csv", "v0,dog", "v0,cat"), SCORES),
    "val mask": (writes("SegmentationClass/v0.png"), SCORES),
    "val list": (replaces(f"{LISTS}/val.txt", "\nv1", ""), SCORES),
    "test image": (writes("JPEGImages/x0.jpg"), INDEX | {"test": "PE"}),
    "test list": (replaces(f"{LISTS}/test.txt", "x0", "x0\nx1"), INDEX | {"test": "PE"}),
    "train mask more": (writes("SegmentationClass/t4.png"), SCORES | {"full": "PSE"}),
    "train mask": (writes("SegmentationClass/t0.png"), SCORES | {"full": "PSE"}),
    "score list": (replaces(f"{LISTS}/train.txt", "t0\n", ""), SCORES | {"full": "P"}),
    "mask of GAIN_ext": (writes("SegmentationClass/t1.png"), SCORES | {"gain_ext": "PCAMSE", "full": "PSE"}),
    "mask of the sweep": (writes("SegmentationClass/t2.png"), SCORES | {"sweep": "PMSE", "full": "PSE"}),
    "mask of full": (writes("SegmentationClassAug/t5.png"), INDEX | {"full": "PSE"}),
}


def test_the_keys_that_a_change_of_the_data_reaches(tmp_path: Path) -> None:
    columns = [f"{name:>9}" for name in RUNS]
    legend = ", ".join(f"{letter} {name}" for name, letter in LETTERS.items())
    lines = [legend, f"{'what changes':<18}{''.join(columns)}"]
    before = {name: plan(write_voc(tmp_path / "before"), *overrides) for name, overrides in RUNS.items()}
    found = {}
    for number, (title, (change, _)) in enumerate(CHANGES.items()):
        root = write_voc(tmp_path / str(number))
        override = change(root)
        more = () if override is None else (override,)
        found[title] = {name: changed(before[name], plan(root, *own, *more)) for name, own in RUNS.items()}
        lines.append(f"{title:<18}{''.join(f'{letters:>9}' for letters in found[title].values())}")
    print("\n" + "\n".join(lines))  # noqa: T201 - for a person to read
    assert found == {title: expected for title, (_, expected) in CHANGES.items()}


def test_a_moved_data_set_and_other_file_names_train_nothing(tmp_path: Path) -> None:
    before = plan(write_voc(tmp_path / "before"))
    assert changed(before, plan(write_voc(tmp_path / "elsewhere"))) == ""
    root = write_voc(tmp_path / "renamed")
    (root / "SegmentationClass").rename(root / "Masks")
    assert changed(before, plan(root, "data.masks=Masks")) == "P"


def test_an_image_in_the_place_of_another_changes_all(tmp_path: Path) -> None:
    root = write_voc(tmp_path / "swapped")
    put(root / "JPEGImages/t6.jpg", "t7")
    put(root / "JPEGImages/t7.jpg", "t6")
    assert changed(plan(write_voc(tmp_path / "before")), plan(root)) == "PCAMSE"


def test_a_drawn_subset_changes_with_the_draw_and_not_with_those_it_is_drawn_from(tmp_path: Path) -> None:
    """A mask more may be drawn: then, and only then, another image is in the subset."""
    before = plan(write_voc(tmp_path / "before"), *RUNS["gain_ext"])
    root = write_voc(tmp_path / "more")
    put(root / "SegmentationClass/t7.png", "t7")  # drawn after t1
    assert changed(before, plan(root, *RUNS["gain_ext"])) == "P", "t7 is not on the score list"
    put(root / "SegmentationClass/t3.png", "t3")  # drawn before t1
    assert changed(before, plan(root, *RUNS["gain_ext"])) == "PCAMSE"


def test_a_corrected_mask_trains_the_segmenter_alone(tmp_path: Path) -> None:
    """By what is in it, wherever the folder lies; the data set's own masks have no part in it."""
    before, after = ([f"train_segmenter.corrected_masks={tmp_path}/{name}"] for name in ("before", "after"))
    root = write_voc(tmp_path / "data")
    put(tmp_path / "before/t0.png", "by hand")
    put(tmp_path / "after/t0.png", "by hand")
    assert changed(plan(root), plan(root, *before)) == "SE"
    assert changed(plan(root, *before), plan(root, *after)) == ""
    assert changed(plan(root), plan(root, "train_segmenter.corrected_repeat=3")) == "", "of nothing"
    assert changed(plan(root, *before), plan(root, *before, "train_segmenter.corrected_repeat=3")) == "SE"
    put(tmp_path / "after/t0.png", "by another hand")
    assert changed(plan(root, *before), plan(root, *after)) == "SE"
    put(tmp_path / "after/t0.png", "by hand")
    put(tmp_path / "after/t6.png", "by hand")
    assert changed(plan(root, *before), plan(root, *after)) == "SE"
    kept = plan(root, *before)
    put(root / "SegmentationClass/t0.png", "a true mask for scores")
    assert changed(kept, plan(root, *before)) == "PE"


def test_files_that_the_config_names_must_not_change_after_the_plan(tmp_path: Path) -> None:
    root = write_voc(tmp_path / "data")
    put(tmp_path / "corrected/t0.png", "by hand")
    planned = plan(root, f"train_segmenter.corrected_masks={tmp_path}/corrected")
    for stage in STAGES:
        planned.check_data(stage, root / "digests.json")
    put(tmp_path / "corrected/t1.png", "by hand")
    planned.check_data("make_masks", root / "digests.json")
    with pytest.raises(DataError, match=r"train_segmenter: a file that the config names \(corrected masks, "):
        planned.check_data("train_segmenter", root / "digests.json")


def test_where_damaged_masks_are_skipped_all_of_them_choose_a_subset(tmp_path: Path) -> None:
    """Whichever mask of training turns out to be damaged is not drawn."""
    skip = "data.on_bad_image=skip"
    before, after = write_voc(tmp_path / "before"), write_voc(tmp_path / "after")
    put(after / "SegmentationClass/t0.png", "other bytes")
    for name, expected in {"weak": "PE", "gain_ext": "PCAMSE", "sweep": "PMSE"}.items():
        assert changed(plan(before, *RUNS[name], skip), plan(after, *RUNS[name], skip)) == expected, name
    weak = plan(before, *RUNS["weak"])
    assert changed(weak, plan(before, *RUNS["weak"], skip)) == "PE", "trainings without masks are the same"


def test_labels_of_val_decide_what_is_held_out(tmp_path: Path) -> None:
    root = write_voc(tmp_path / "unlabelled")
    text = (root / "labels.csv").read_text(encoding="utf-8")
    put(root / "labels.csv", text[: text.index("v0,")])  # v0, v1 and an image of test come last
    unlabelled = plan(root)
    assert changed(plan(write_voc(tmp_path / "before")), unlabelled) == "PCAMSE"
    more = plan(root, "prepare_data.holdout_ratio=0.5")
    assert changed(unlabelled, more) == "PCAMSE"
    labelled = plan(write_voc(tmp_path / "labelled"), "prepare_data.holdout_ratio=0.5")
    assert changed(plan(write_voc(tmp_path / "before")), labelled) == "P", "nothing is held out"


def test_a_box_of_val_reaches_scores_alone(tmp_path: Path) -> None:
    root = write_cub(tmp_path / "cub")

    def look() -> Plan:
        run = load_model(
            RunConfig,
            find_config("demo"),
            [f"data={{format: cub, root: {root}}}", "evaluate.segmentation=false", "evaluate.localization={}"],
        )
        return plan_run(run, tmp_path / "digests.json")

    before = look()
    assert tuple(before.keys) == ("prepare_data", "train_classifier", "evaluate")
    boxes = root / "bounding_boxes.txt"
    lines = boxes.read_text(encoding="utf-8").splitlines()
    put(boxes, "\n".join([*lines[:7], "8 1.0 1.0 20.0 20.0"]))
    assert changed(before, look()) == "PE"


def test_fewer_generated_images_of_val_train_nothing(tmp_path: Path) -> None:
    def look(*overrides: str) -> Plan:
        small = ["data.num_train=6", "data.num_val=3"]
        return plan_run(load_model(RunConfig, find_config("demo"), [*small, *overrides]), tmp_path / "digests.json")

    assert changed(look(), look("data.num_val=2")) == "PE"
    assert changed(look(), look("data.num_train=5")) == "PCAMSE"


@pytest.mark.parametrize("stage", STAGES[1:])
def test_no_key_but_its_own_holds_that_of_prepare_data(tmp_path: Path, stage: str) -> None:
    found = plan(write_voc(tmp_path / "voc"))
    content = found.contents[stage]
    assert "prepare_data" not in content["inputs"]
    assert set(content["data"]) == {"prepare_data", "view"}, "its version, and the digest of what the stage reads"
    assert found.keys["prepare_data"] not in str(content)
    assert "prepare_data" in found.inputs(stage), "the stage still gets its artifact"
