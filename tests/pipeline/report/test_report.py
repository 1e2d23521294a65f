"""The report is one page that fetches nothing, escapes everything, and says what each part of a run did."""

from __future__ import annotations

import base64
import hashlib
import io
import json
import re
from html.parser import HTMLParser
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from PIL import Image

from pipeline.report.charts import line_chart, nice_ticks
from pipeline.report.colours import ERRORS, find_palette, safe_palette
from pipeline.report.page import _history_charts, build_report, ensure_report, report_path
from pipeline.report.pictures import (
    HALO,
    HATCH,
    TINT_ALPHA,
    encode_picture,
    find_attention,
    fit,
    lay_over,
    load_confusions,
    load_scored_examples,
    load_training_examples,
    overlay_heat,
    paint_errors,
    paint_mask,
    picture_uri,
    score_images,
    write_picture_grid,
)
from pipeline.report.tables import (
    STAGE_MEANINGS,
    STEPS,
    class_table,
    collapse_notes,
    format_seconds,
    format_time,
    format_value,
    metric_rows,
    natural_key,
    stage_rows,
)
from stages.contracts import (
    AttentionRecord,
    ClassList,
    ImageIndex,
    ImageRecord,
    StageConfig,
    open_image_set,
    voc_palette,
    write_attention_shard,
    write_index_mask,
    write_json,
)
from stages.evaluate import EvaluateConfig
from stages.masks.mask_files import step_path
from stages.ops.metrics.confusion import SparseConfusions, confusion_matrix, write_confusions

PALETTE = safe_palette()
CLASSES = ClassList(names=("red fox", "<b>owl</b>"))
SIZE = (24, 32)


class FakeRun(StageConfig):
    """The part of RunConfig that the report looks at."""

    name: str = "fake"
    seed: int = 3
    data: dict[str, Any]
    train_classifier: dict[str, Any]
    train_segmenter: dict[str, Any]
    evaluate: EvaluateConfig = EvaluateConfig()


def make_run(name: str = "fake", supervision: str = "weak") -> FakeRun:
    return FakeRun(
        name=name,
        data={"format": "synthetic"},
        train_classifier={"backbone": {"name": "small"}, "method": {"name": "cam"}},
        train_segmenter={
            "supervision": supervision,
            "net": {"name": "largefov", "backbone": {"name": "squeezenet1_1"}},
        },
    )


def object_mask(class_index: int, num_columns: int) -> np.ndarray:
    """``num_columns`` columns of ``class_index`` on the left, background elsewhere, one void row at the bottom."""
    mask = np.zeros(SIZE, dtype=np.uint8)
    mask[:, :num_columns] = class_index
    mask[-1] = 255
    return mask


TRUTH_COLUMNS = 16
RESULT_COLUMNS = {"a": 16, "b": 8, "c": 4, "d": 12, "e": 0}
"""Columns that each image's result gets right out of 16 of 32: IoU of the object n/16, of background 16/(32-n)."""


def expected_miou(image_id: str) -> float:
    right = RESULT_COLUMNS[image_id]
    return (right / 16 + 16 / (32 - right)) / 2


@pytest.fixture
def artifacts(tmp_path: Path) -> dict[str, Path]:
    """A finished weak run over ten images: t.a … t.e for training, v.a … v.e for validation."""
    folders = {stage: tmp_path / "store" / stage for stage in STAGE_MEANINGS}
    truth = object_mask(1, TRUTH_COLUMNS)
    rng = np.random.default_rng(0)
    records, counted = [], {"masks": [], "segmenter": []}
    for split, thing, folder, kind in (
        ("t", "masks", folders["make_masks"], "masks"),
        ("v", "segmenter", folders["evaluate"], "predictions"),
    ):
        for letter, columns in RESULT_COLUMNS.items():
            image_id = f"{split}.{letter}"
            data = folders["prepare_data"] / "data"
            (data / "images").mkdir(parents=True, exist_ok=True)
            Image.fromarray(rng.integers(0, 255, (*SIZE, 3), dtype=np.uint8)).save(data / f"images/{image_id}.png")
            write_index_mask(data / f"truth/{image_id}.png", truth)
            write_index_mask(folder / kind / f"{image_id}.png", object_mask(1, columns))
            counted[thing].append((image_id, confusion_matrix(truth, object_mask(1, columns), 3)))
            records.append(
                ImageRecord(
                    id=image_id,
                    image=f"images/{image_id}.png",
                    size=SIZE,
                    labels=(0,) if split == "t" else None,
                    mask=f"truth/{image_id}.png",
                )
            )
    training = tuple(f"t.{letter}" for letter in RESULT_COLUMNS)
    index = ImageIndex(
        classes=CLASSES,
        images=tuple(records),
        splits={"train": training, "train_score": training, "val": tuple(f"v.{letter}" for letter in RESULT_COLUMNS)},
        mask_values={0: 0, 1: 1, 2: 2, 255: 255},
    )
    write_json(folders["prepare_data"] / "index.json", index.model_dump(mode="json"))
    write_attention(folders["make_attention"], training)
    confusions = {thing: SparseConfusions.from_matrices(3, pairs) for thing, pairs in counted.items()}
    write_confusions(folders["evaluate"] / "confusions.npz", confusions)
    write_training(folders)
    return folders


def write_attention(folder: Path, ids: tuple[str, ...]) -> None:
    maps = np.zeros((1, 6, 8), dtype=np.uint8)
    maps[0, :, :2] = 255
    peaks = np.ones(1, dtype=np.float32)
    records = [AttentionRecord(id=i, size=SIZE, labels=(0,), maps=maps, peaks=peaks) for i in ids]
    for number, start in enumerate(range(0, len(records), 2)):
        write_attention_shard(folder / f"shards/attention-{number:05d}.npz", records[start : start + 2])


def write_training(folders: dict[str, Path]) -> None:
    history = [{"step": n, "epoch": n / 4, "learning_rate": 0.1 / (n + 1), "loss": 1 / (n + 1)} for n in range(9)]
    write_json(folders["train_classifier"] / "history.json", history)
    write_json(folders["train_segmenter"] / "history.json", [{**entry, "aux": entry["loss"] / 2} for entry in history])
    thresholds = [n / 100 for n in range(101)]
    sweep = {"thresholds": thresholds, "miou": [0.4 - (t - 0.3) ** 2 for t in thresholds]}
    rest = {"configured": 0.2, "oracle": 0.3, "split": "train_score", "images": 5}
    write_json(folders["evaluate"] / "sweep.json", {**sweep, **rest})


def make_manifests(artifacts: dict[str, Path]) -> dict[str, dict[str, Any]]:
    metrics: dict[str, dict[str, Any]] = {
        "train_classifier": {"classifier.map": 0.991},
        "make_attention": {"attention.bytes_per_image": 812.0},
        "make_masks": {"masks.coverage": 0.934},
        "evaluate": {"masks.miou": 0.4567, "masks.miou_before_crf": 0.4, "segmenter.iou": {"red fox": 0.5}},
    }
    return {
        stage: {
            "content": {"stage": stage, "key": f"{stage[:4]}0123456789abcdef", "files": {"x": {"size": 1500}}},
            "run": {
                "started": "2026-11-20T12:05:09+00:00",
                "seconds": 75.0,
                "host": "anvil",
                "machine": "Linux x86_64",
                "python": "3.11.9",
                "revision": "0123456789abcdef0123456789abcdef01234567+",
                "packages": {"numpy": "2.4.6"},
                "metrics": metrics.get(stage, {}),
                "warnings": ["the CRF made masks worse <script>"] if stage == "make_masks" else [],
            },
        }
        for stage in artifacts
    }


class Page(HTMLParser):
    """Collects tags with attributes, and visible text, and insists that tags are balanced."""

    VOID = frozenset({"meta", "img", "br", "input"})

    def __init__(self, html: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str]]] = []
        self.text = ""
        self.open: list[str] = []
        self.feed(html)
        assert not self.open

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, {name: value or "" for name, value in attrs}))
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, {name: value or "" for name, value in attrs}))

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text += data

    def images(self) -> list[dict[str, str]]:
        return [attributes for tag, attributes in self.tags if tag == "img"]


def build(artifacts: dict[str, Path], out: Path, run: FakeRun | None = None, **options: Any) -> tuple[str, Page]:
    options = {"invocation": "fake.yaml --set seed=3", **options}
    path = build_report(run or make_run(), artifacts, make_manifests(artifacts), None, out, **options)
    assert path == out
    html = path.read_text(encoding="utf-8")
    return html, Page(html)


# --- the page ---------------------------------------------------------------------------------------------------------


def test_page_fetches_nothing_and_runs_its_own_script_alone(artifacts, tmp_path):
    html, page = build(artifacts, tmp_path / "report.html")
    assert {attributes["src"].split(",")[0] for attributes in page.images()} == {"data:image/webp;base64"}
    assert not {tag for tag, _ in page.tags} & {"link", "iframe", "object"}
    assert all(attributes["href"].startswith("#") for tag, attributes in page.tags if tag == "a")
    assert not re.search(r"https?://|url\(|@import", html)
    [script] = re.findall(r"<script>(.*?)</script>", html, re.DOTALL)
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    assert (
        f"default-src 'none'; img-src data: 'self' file:; style-src 'unsafe-inline'; script-src 'sha256-{digest}'"
        in html
    )


def test_headings_are_linked_and_the_list_of_sections_reaches_each(artifacts, tmp_path):
    _, page = build(artifacts, tmp_path / "report.html")
    ids = [attributes["id"] for tag, attributes in page.tags if tag == "h2"]
    links = [attributes["href"] for tag, attributes in page.tags if tag == "a"]
    assert sorted(links) == sorted([f"#{name}" for name in ids] * 2)
    assert len(ids) == 10


def test_the_command_is_among_the_facts(artifacts, tmp_path):
    _, page = build(artifacts, tmp_path / "report.html", invocation="mine.yaml --set 'data.root=a b'")
    assert "wsss run mine.yaml --set 'data.root=a b'" in page.text


def test_the_score_is_the_second_column(artifacts, tmp_path):
    html, _ = build(artifacts, tmp_path / "report.html")
    assert "<th>Number</th><th>Score</th><th>What it means</th>" in html
    assert "<th>Class</th><th>Segmenter</th><th>Pseudo-masks</th>" in html


def test_page_escapes_what_comes_from_the_run(artifacts, tmp_path):
    html, page = build(artifacts, tmp_path / "report.html", make_run("</title><script>alert(1)</script>"))
    assert html.count("<script") == 1
    assert "alert" not in html[html.index("<script") :]
    assert "&lt;b&gt;owl&lt;/b&gt;" in html
    assert "the CRF made masks worse <script>" in page.text
    assert "</title><script>alert(1)</script>" in page.text


def test_page_shows_numbers_with_their_meaning(artifacts, tmp_path):
    _, page = build(artifacts, tmp_path / "report.html")
    for text in ("45.7 %", "40.0 %", "99.1 %", "93.4 %", "812 B", "unsure pixels count as background"):
        assert text in page.text
    assert "supervision: weak" in page.text
    assert "largefov on squeezenet1_1" in page.text
    assert "anvil, Linux x86_64" in page.text
    assert "anvil, Linux x86_64;" not in page.text  # six stages on one machine name it once
    assert "0123456789, with changes" in page.text
    assert "2026-11-20 12:05 UTC" in page.text
    assert "7 min 30 s" in page.text  # six stages of 75 s


def test_page_shows_intervals_below_their_scores(artifacts, tmp_path):
    manifests = make_manifests(artifacts)
    manifests["evaluate"]["run"]["metrics"] |= {"masks.miou_low": 0.4321, "masks.miou_high": 0.4789}
    html = build_report(make_run(), artifacts, manifests, None, tmp_path / "report.html", invocation="fake").read_text()
    page = Page(html)
    assert "43.2 … 47.9" in page.text
    assert html.count('class="soft interval"') == 1
    assert "miou_low" not in page.text


def test_page_draws_what_the_segmenter_takes_for_what(artifacts, tmp_path):
    """40 of each image's 16 columns x 23 rows of object are found: 16 + 8 + 4 + 12 + 0 of 80 columns."""
    html, page = build(artifacts, tmp_path / "report.html")
    cells = [attributes for tag, attributes in page.tags if tag == "rect" and attributes["class"] == "cell"]
    assert [cell["fill-opacity"] for cell in cells] == ["1.000", "0.500", "0.500"]
    assert "red fox taken for background: 50.00 % of its pixels (920)" in page.text
    assert 'class="on-dark"' in html
    assert 'class="on-light"' in html
    assert [html.count(f">{axis}</text>") for axis in ("true", "predicted")] == [1, 1]
    del artifacts["evaluate"]
    assert "taken for background" not in build(artifacts, tmp_path / "report.html")[1].text


def test_page_marks_both_thresholds_and_says_what_oracle_means(artifacts, tmp_path):
    _, page = build(artifacts, tmp_path / "report.html")
    assert "configured 0.20" in page.text
    assert "oracle 0.30" in page.text
    assert "chosen on the very masks it is scored on" in page.text
    lines = [attributes for tag, attributes in page.tags if tag == "line" and attributes["class"] == "mark-0"]
    assert lines[0]["x1"] == f"{58 + 0.2 * (520 - 58 - 16):.1f}"


def test_page_shows_what_each_step_of_the_masks_is_worth_with_pictures(artifacts, tmp_path):
    steps = [
        {"step": "threshold", "miou": 0.31, "coverage": 1.0, "miou_labelled": 0.31},
        {"step": "par", "miou": 0.36, "coverage": 0.875, "miou_labelled": 0.42},
        {"step": "crf", "miou": 0.35, "coverage": 0.875, "miou_labelled": 0.42},
    ]
    manifests = make_manifests(artifacts)
    manifests["evaluate"]["run"]["metrics"][STEPS] = steps
    for number, name in enumerate(("threshold", "par")):
        for letter in RESULT_COLUMNS:
            path = step_path(artifacts["make_masks"], number, name, f"t.{letter}")
            write_index_mask(path, object_mask(1, 5 * number))
    out = build_report(make_run(), artifacts, manifests, None, tmp_path / "report.html", invocation="fake")
    html = out.read_text(encoding="utf-8")
    page = Page(html)
    table = page.text[page.text.index("Masks after") :].split()
    for text in ("31.0 %", "36.0 %", "+5.0", "35.0 %", "-1.0", "42.0 %", "87.5 %"):
        assert text in " ".join(table)
    assert "masks.steps" not in page.text, "a list is no line of the table of numbers"
    titles = [image["alt"] for image in page.images() if image["alt"].endswith("of t.b")]
    shown = ("image", "attention", "threshold rule", "pixel-adaptive", "pseudo-mask", "truth", "errors")
    assert titles == [f"{title} of t.b" for title in shown]
    assert 'class="examples one"' in html, "seven pictures side by side want the whole width"


def test_page_of_a_run_without_steps_has_no_table_of_them(artifacts, tmp_path):
    html, page = build(artifacts, tmp_path / "report.html")
    assert "Masks after" not in page.text
    assert 'class="examples one"' not in html


def test_class_table_has_the_steps_between_and_no_second_count_of_them():
    counts = SparseConfusions.from_matrices(3, [("x", confusion_matrix(object_mask(1, 16), object_mask(1, 8), 3))])
    things = ("masks_before_crf", "masks_before_crf_labelled", "masks_after_par", "masks_after_par_labelled", "masks")
    table = class_table(dict.fromkeys(things, counts), CLASSES)
    assert table.columns == ("Before refinement", "After PAR", "Pseudo-masks")
    assert class_table({"masks": counts, "segmenter": counts}, CLASSES).columns == ("Segmenter", "Pseudo-masks")


def test_page_states_come_from_the_outcome(artifacts, tmp_path):
    states = dict.fromkeys(artifacts, "cached") | {"evaluate": "built"}
    _, page = build(artifacts, tmp_path / "report.html", states=states)
    assert page.text.count("cached") == 5
    assert "eval01234567" in page.text
    assert "eval0123456789" not in page.text


@pytest.mark.parametrize(
    ("state", "change", "is_written"),
    [
        ("cached", None, False),
        ("built", None, True),
        ("cached", lambda page: page.unlink(), True),
        ("cached", lambda page: page.write_text("<html>drawn by an older version</html>"), True),
    ],
)
def test_a_run_that_is_cached_keeps_the_page_that_this_version_drew(
    artifacts, tmp_path, monkeypatch, state, change, is_written
):
    plan = SimpleNamespace(table=SimpleNamespace(names=list(artifacts)), keys=dict.fromkeys(artifacts, "0" * 20))
    outcome = SimpleNamespace(stages=[SimpleNamespace(stage=name, state="cached") for name in artifacts])
    outcome.stages[-1].state = state
    store, run, written = SimpleNamespace(root=tmp_path), make_run(), []
    page = report_path(run, plan, store, is_complete=True)
    page.parent.mkdir()
    build(artifacts, page)
    if change is not None:
        change(page)
    monkeypatch.setattr("pipeline.report.page.write_report", lambda *words, **options: written.append(words[4]))
    ensure_report(run, plan, store, outcome, "fake.yaml")
    assert written == [page] * is_written


def test_page_shows_images_beside_masks_truth_and_errors(artifacts, tmp_path):
    _, page = build(artifacts, tmp_path / "report.html")
    alts = [attributes["alt"] for attributes in page.images()]
    kinds = ("image", "attention", "pseudo-mask", "truth", "errors")
    assert [a for a in alts if a.endswith("of t.b")] == [f"{kind} of t.b" for kind in kinds]
    kinds = ("image", "prediction", "truth", "errors")
    assert [a for a in alts if a.endswith("of v.b")] == [f"{kind} of v.b" for kind in kinds]


def test_page_of_a_fully_supervised_run_says_what_is_left_out(artifacts, tmp_path):
    for stage in ("train_classifier", "make_attention", "make_masks"):
        del artifacts[stage]
    (artifacts["evaluate"] / "sweep.json").unlink()
    _, page = build(artifacts, tmp_path / "report.html", make_run(supervision="full"))
    assert "this run made no attention maps or pseudo-masks." in page.text
    assert "there are no attention maps with true masks to compare them with." in page.text
    assert "true masks (the upper bound)" in page.text
    assert not [a for a in page.images() if "attention" in a["alt"]]
    assert page.text.count("skipped") == 3


def test_page_says_which_pixel_masks_a_weak_run_has_seen(artifacts, tmp_path):
    run, manifests = make_run(), make_manifests(artifacts)
    run.train_segmenter["init"] = "coco"
    manifests["make_masks"]["content"]["mask_supervision"] = ["t.a", "t.b"]
    page = Page(
        build_report(run, artifacts, manifests, None, tmp_path / "r.html", invocation="fake").read_text("utf-8")
    )
    assert (
        "5 training images with image-level labels and the true masks of 2 (make_masks) and a backbone trained on "
        "COCO's pixel masks, supervision: weak."
    ) in page.text
    assert "Starts from" in page.text

    _, page = build(artifacts, tmp_path / "r.html")
    assert "5 training images with image-level labels, supervision: weak." in page.text


def test_page_of_a_run_that_only_prepared_data(artifacts, tmp_path):
    _, page = build({"prepare_data": artifacts["prepare_data"]}, tmp_path / "report.html")
    assert "No stage has reported a number yet." in page.text
    assert "nothing was trained in this run." in page.text
    assert "this run has not evaluated a segmenter." in page.text
    assert not page.images()


def test_page_of_a_run_without_true_masks_shows_unscored_predictions(artifacts, tmp_path):
    index = json.loads((artifacts["prepare_data"] / "index.json").read_text())
    for record in index["images"]:
        record["mask"] = None
    write_json(artifacts["prepare_data"] / "index.json", index)
    (artifacts["evaluate"] / "confusions.npz").unlink()
    (artifacts["evaluate"] / "sweep.json").unlink()
    _, page = build(artifacts, tmp_path / "report.html")
    assert "no true masks were scored." in page.text
    assert "they have no true masks, so nothing is scored." in page.text
    assert "prediction of v.e" in [attributes["alt"] for attributes in page.images()]
    assert not [a for a in page.images() if "truth" in a["alt"]]


def test_images_that_are_gone_cost_the_pictures_and_not_the_page(artifacts, tmp_path):
    (artifacts["prepare_data"] / "data/images/t.a.png").unlink()
    _, page = build(artifacts, tmp_path / "report.html")
    assert "the pictures could not be read:" in page.text
    assert "t.a.png" in page.text
    assert "45.7 %" in page.text


def test_page_names_the_encoder_of_a_deeplab(artifacts, tmp_path):
    run = make_run().model_copy(update={"train_segmenter": {"net": {"name": "deeplabv3plus", "encoder": "resnet50"}}})
    _, page = build(artifacts, tmp_path / "report.html", run)
    assert "deeplabv3plus on resnet50" in page.text


def test_page_of_a_shipped_config_shows_it_whole(artifacts, tmp_path):
    from pipeline.config.run_config import find_config, load_config

    run = load_config(find_config("demo"))
    page = Page(
        build_report(run, artifacts, make_manifests(artifacts), None, tmp_path / "r.html", invocation="fake").read_text(
            "utf-8"
        )
    )
    assert page.text.lstrip().startswith(f"{run.name} · wsss report")
    for stage in STAGE_MEANINGS:
        assert f"\n{stage}:" in page.text


def test_stages_are_the_runners():
    from pipeline.engine.stage_table import STAGES

    assert tuple(STAGE_MEANINGS) == STAGES


def test_equal_runs_give_equal_pages(artifacts, tmp_path):
    assert build(artifacts, tmp_path / "1.html")[0] == build(artifacts, tmp_path / "2.html")[0]


# --- choice of images -------------------------------------------------------------------------------------------------


def test_score_images_matches_hand_computation(artifacts):
    scores = score_images(load_confusions(artifacts), "segmenter")
    assert scores == pytest.approx({f"v.{letter}": expected_miou(letter) for letter in RESULT_COLUMNS})
    assert scores["v.a"] == 1.0
    assert scores["v.e"] == 0.25  # no object found: (0 + 16/32) / 2


def test_pictures_carry_the_scores_of_the_masks_that_were_written(artifacts, tmp_path):
    """With ``predictions: multi_scale`` an image's score is that of its multi-scale mask."""
    from stages.ops.metrics.confusion import read_confusions

    path = artifacts["evaluate"] / "confusions.npz"
    nothing = confusion_matrix(object_mask(1, TRUTH_COLUMNS), object_mask(1, 0), 3)
    multi = SparseConfusions.from_matrices(3, [(f"v.{letter}", nothing) for letter in RESULT_COLUMNS])
    write_confusions(path, read_confusions(path) | {"segmenter_ms": multi})
    run = make_run().model_copy(update={"evaluate": EvaluateConfig(predictions="multi_scale", scales=(0.5, 1))})
    single, _ = build(artifacts, tmp_path / "single.html")
    html, _ = build(artifacts, tmp_path / "multi.html", run)
    assert "one scale, no CRF (scored as segmenter.miou)" in single
    assert "mean of scales 0.5, 1, each with its mirror image; no CRF (scored as segmenter.miou_ms)" in html
    all_wrong = f"{expected_miou('e') * 100:.1f} %"
    assert html.count(all_wrong) >= len(RESULT_COLUMNS) > single.count(all_wrong)


def test_best_and_worst_share_no_image_and_are_in_order(artifacts):
    images = open_image_set(artifacts["prepare_data"], None)
    scores = {f"v.{letter}": expected_miou(letter) for letter in RESULT_COLUMNS}
    best, worst = load_scored_examples(images, artifacts["evaluate"], scores, 2)
    assert [e.id for e in best] == ["v.a", "v.d"]
    assert [e.id for e in worst] == ["v.e", "v.c"]
    best, worst = load_scored_examples(images, artifacts["evaluate"], scores, 4)
    assert [e.id for e in worst] == ["v.e"]


def test_training_examples_are_spread_by_rank(artifacts):
    images = open_image_set(artifacts["prepare_data"], None)
    scores = {f"t.{letter}": expected_miou(letter) for letter in RESULT_COLUMNS}
    examples = load_training_examples(images, artifacts, scores, 3)
    assert [e.id for e in examples] == ["t.a", "t.b", "t.e"]
    assert examples[1].classes == (1,)
    assert examples[1].heat is not None
    np.testing.assert_array_equal(examples[1].pseudo_mask, object_mask(1, 8))
    np.testing.assert_array_equal(examples[1].truth, object_mask(1, 16))


def test_find_attention_stops_after_the_last_wanted_shard(artifacts):
    (artifacts["make_attention"] / "shards/attention-00002.npz").write_bytes(b"damaged")
    assert sorted(find_attention(artifacts["make_attention"], ["t.a", "t.d"])) == ["t.a", "t.d"]
    assert find_attention(None, ["t.a"]) == {}


# --- pictures ---------------------------------------------------------------------------------------------------------


def decode(uri: str) -> Image.Image:
    return Image.open(io.BytesIO(base64.b64decode(uri.split(",")[1])))


def test_pictures_get_the_longest_side_and_masks_gain_no_value():
    mask = np.zeros((300, 400), dtype=np.uint8)
    mask[:, 200:] = 15
    assert set(np.unique(fit(mask, 200))) == {0, 15}
    assert fit(mask, 200).shape == (150, 200)
    assert decode(picture_uri(encode_picture(fit(np.zeros((30, 40, 3), np.uint8), 200)))).size == (200, 150)


def test_a_mask_is_an_outline_a_tint_and_a_halo_on_the_photo():
    mask = np.zeros((20, 20), np.uint8)
    mask[5:15, 5:15] = 2
    mask[:, 18:] = 255
    layer = paint_mask(mask, PALETTE)
    colour = PALETTE[2].tolist()
    assert layer[10, 5].tolist() == layer[10, 6].tolist() == [*colour, 255], "the outline is two pixels wide"
    assert layer[10, 10].tolist() == [*colour, TINT_ALPHA]
    assert layer[10, 4].tolist() == list(HALO)
    assert layer[10, 2].tolist() == [0, 0, 0, 0], "background is the photo"
    assert {tuple(pixel) for pixel in layer[:, 18:].reshape(-1, 4).tolist()} == {HATCH, (0, 0, 0, 0)}
    photo = np.full((20, 20, 3), 100, np.uint8)
    over = lay_over(photo, layer)
    assert over[10, 2].tolist() == [100, 100, 100]
    assert over[10, 5].tolist() == colour
    expected = [round((100 * (255 - TINT_ALPHA) + value * TINT_ALPHA) / 255) for value in colour]
    assert over[10, 10].tolist() == expected


def test_a_layer_is_kept_without_loss():
    layer = paint_mask(object_mask(2, 5), PALETTE)
    np.testing.assert_array_equal(np.asarray(decode(picture_uri(encode_picture(layer)))), layer)


def test_errors_have_a_colour_each_and_void_has_none():
    truth = np.array([[1, 0, 1, 1, 255, 0, 1]], np.uint8)
    result = np.array([[0, 2, 2, 1, 2, 255, 255]], np.uint8)
    missed, extra, other = ((*colour, 230) for colour in ERRORS.values())
    nothing = (0, 0, 0, 0)
    found = [tuple(pixel) for pixel in paint_errors(truth, result)[0].tolist()]
    assert found == [missed, extra, other, nothing, nothing, nothing, missed], "unsure counts as background"


def test_overlay_heat_is_bright_at_the_peak_and_dark_without_evidence():
    image = np.full((40, 60, 3), 128, dtype=np.uint8)
    maps = np.zeros((2, 4, 6), dtype=np.uint8)
    maps[1, :, :3] = 255
    record = AttentionRecord("x", (40, 60), (0, 1), maps, np.ones(2, np.float32))
    heat = overlay_heat(image, record)
    assert heat.shape == image.shape
    red, green, blue = heat[20, 5].tolist()
    assert min(red, green) > blue + 60, "yellow"
    red, green, blue = heat[20, 55].tolist()
    assert blue > red > green, "violet"
    assert heat[20, 5].mean() > heat[20, 55].mean() + 40, "it keeps its order without colours"
    nothing = AttentionRecord("x", (40, 60), (), np.zeros((0, 4, 6), np.uint8), np.ones(0, np.float32))
    np.testing.assert_array_equal(overlay_heat(image, nothing)[0, 0], heat[20, 55])


def test_pages_take_either_palette(artifacts, tmp_path):
    assert "background:#e69f00" in build(artifacts, tmp_path / "safe.html")[0]  # Okabe and Ito's orange
    assert "background:#800000" in build(artifacts, tmp_path / "voc.html", palette="voc")[0]
    assert find_palette("voc") is voc_palette()


def test_picture_grid_puts_each_picture_in_its_column(artifacts, tmp_path):
    path = write_picture_grid(artifacts, None, tmp_path / "grid.png", num_rows=2, tile_px=64)
    with Image.open(path) as picture:
        grid = np.asarray(picture.convert("RGB"))
    assert grid.shape[1] == 7 * (64 + 6) + 6 + 12
    middle = 24 + 32  # first row: t.a, the best pseudo-mask, and v.a, the best prediction

    def has_outline(row: int, column: int, extra: int) -> bool:
        """Whether the right edge of the object, 16 of 32 columns, has its colour."""
        return grid[row, 6 + column * 70 + extra + 31].tolist() == PALETTE[1].tolist()

    assert [has_outline(middle, *place) for place in ((0, 0), (2, 0), (3, 0), (5, 12), (6, 12))] == [False] + [True] * 4
    worst = 24 + 70 + 32  # second row: t.e and v.e, where nothing was found
    assert [has_outline(worst, *place) for place in ((2, 0), (3, 0), (5, 12), (6, 12))] == [False, True, False, True]


def test_picture_grid_of_a_fully_supervised_run_has_three_columns(artifacts, tmp_path):
    del artifacts["make_masks"]
    path = write_picture_grid(artifacts, None, tmp_path / "grid.png", num_rows=2, tile_px=64)
    with Image.open(path) as grid:
        assert grid.width == 3 * 70 + 6
    del artifacts["evaluate"]
    with pytest.raises(ValueError, match="needs the artifacts of make_masks or evaluate"):
        write_picture_grid(artifacts, None, tmp_path / "none.png")


# --- tables and charts ------------------------------------------------------------------------------------------------


def test_class_table_is_percent_and_leaves_absent_classes_out_of_the_mean():
    truth, found = object_mask(1, 16), object_mask(1, 8)
    counts = SparseConfusions.from_matrices(3, [("x", confusion_matrix(truth, found, 3))])
    table = class_table({"segmenter": counts}, CLASSES)
    assert table.columns == ("Segmenter",)
    assert table.rows == (
        ("background", 0, (pytest.approx(100 * 16 / 24),)),
        ("red fox", 1, (50.0,)),
        ("<b>owl</b>", 2, (None,)),
    )
    assert table.means == (pytest.approx((100 * 16 / 24 + 50) / 2),)
    assert table.num_images == (1,)


def test_metric_rows_are_ordered_and_keep_unknown_metrics():
    metrics = {
        "zeta": 0.1234567,
        "segmenter.miou": 0.5,
        "attention.threshold_oracle": 0.12,
        "segmenter.iou": {"a": 1.0},
    }
    rows = metric_rows(metrics)
    assert [(row.label, row.text) for row in rows] == [
        ("threshold, oracle", "0.12"),
        ("mIoU", "50.0 %"),
        ("zeta", "0.123"),
    ]
    assert [row.bar for row in rows] == [None, 50.0, None]


def test_limits_stand_in_the_row_of_their_metric():
    metrics = {"segmenter.miou": 0.5, "segmenter.miou_low": 0.456, "segmenter.miou_high": 0.543, "new.score_low": 0.1}
    metrics |= {"segmenter.boundary_iou": 0.3, "segmenter.boundary_iou_low": 0.2}
    rows = {row.name: row for row in metric_rows(metrics)}
    assert list(rows) == ["segmenter.miou", "segmenter.boundary_iou", "new.score_low"]
    assert rows["segmenter.miou"].interval == "45.6 … 54.3"
    assert rows["segmenter.miou"].text == "50.0 %"
    assert rows["segmenter.boundary_iou"].interval == ""


def test_metric_that_is_not_finite_is_a_dash():
    (row,) = metric_rows({"segmenter.miou": float("nan")})
    assert (row.text, row.bar) == ("–", None)


def test_stage_rows_cover_every_stage():
    content = {"key": "k", "files": {"a": {"size": 1_200_000}, "b": {"size": 300_000}}}
    manifests = {"evaluate": {"content": content, "run": {"seconds": 2.0, "started": None}}}
    rows = stage_rows(manifests, {"evaluate": "resumed"})
    assert [row["name"] for row in rows] == list(STAGE_MEANINGS)
    assert [row["state"] for row in rows] == ["skipped"] * 5 + ["resumed"]
    assert (rows[-1]["size"], rows[-1]["seconds"]) == ("1.5 MB", "2.0 s")


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(None, "–"), (0.42, "0.4 s"), (9.97, "10 s"), (59.7, "1 min 00 s"), (185, "3 min 05 s"), (8050, "2 h 14 min")],
)
def test_format_seconds(seconds, text):
    assert format_seconds(seconds) == text


def test_format_value_and_time():
    assert [format_value(v, "bytes") for v in (12, 999.6, 1234, 123_456, 2.5e9)] == [
        "12 B", "1.0 kB", "1.2 kB", "123 kB", "2.5 GB",
    ]  # fmt: skip
    assert format_value(10582, "count") == "10,582"
    assert format_time(0) == "1970-01-01 00:00 UTC"
    assert format_time("someday") == "someday"


@pytest.mark.parametrize(
    ("low", "high", "ticks"),
    [(0, 1, [0, 0.2, 0.4, 0.6, 0.8, 1]), (0, 0.83, [0, 0.2, 0.4, 0.6, 0.8, 1]), (0, 43, [0, 10, 20, 30, 40, 50])],
)
def test_nice_ticks(low, high, ticks):
    assert nice_ticks(low, high) == pytest.approx(ticks)


def test_line_chart_places_points_and_skips_what_is_not_finite():
    chart = line_chart("t", x_label="x", y_label="y", x=[0, 1, 2], lines={"a": [0.0, float("nan"), 1.0]})
    assert chart["curves"][0]["points"] == "58.0,222.0 504.0,16.0"
    assert [tick["text"] for tick in chart["y_ticks"]] == ["0", "0.2", "0.4", "0.6", "0.8", "1"]


def test_line_chart_thins_long_histories_and_keeps_the_last_point():
    steps = list(range(10_001))
    chart = line_chart("t", x_label="x", y_label="y", x=steps, lines={"a": [1.0] * len(steps)})
    points = chart["curves"][0]["points"].split()
    assert len(points) <= 402
    assert points[-1] == "504.0,16.0"


def test_line_chart_survives_flat_and_single_values():
    chart = line_chart("t", x_label="x", y_label="y", x=[1.0], lines={"a": [0.0]}, faint={"r": [0.0]})
    assert chart["curves"][1]["points"] == "58.0,222.0"


def test_line_chart_goes_below_zero_where_a_value_does():
    chart = line_chart("t", x_label="x", y_label="y", x=[0, 1], lines={"a": [-2.0, 4.0]})
    low, high = (tuple(map(float, point.split(","))) for point in chart["curves"][0]["points"].split())
    texts = [tick["text"] for tick in chart["y_ticks"]]
    assert texts[0] == "-2"
    assert low[1] == pytest.approx(chart["y_ticks"][0]["at"], abs=0.1)
    assert low[1] > high[1]


def test_marks_have_colours_that_no_line_has():
    lines = {"a": [0.0, 1.0], "b": [1.0, 0.0]}
    for names, styles in ((["a"], ["mark-0", "mark-1"]), (["a", "b"], ["mark-1", "mark-2"])):
        chosen = {name: lines[name] for name in names}
        chart = line_chart("t", x_label="x", y_label="y", x=[0, 1], lines=chosen, marks={"m": 0.5, "n": 1.0})
        assert [mark["style"] for mark in chart["marks"]] == styles  # mark-n is drawn in the colour of line-(n + 1)


def test_what_a_method_watches_stands_on_charts_of_its_own():
    history = [
        {"step": n, "epoch": n, "learning_rate": 0.1, "loss": 1.0, "peak_logit": 9.0, "recall": 0.5, "kept": 0.4}
        for n in (1, 2)
    ]
    loss, logit, share = _history_charts("Classifier", history)
    assert [curve["name"] for curve in loss["curves"] if "rate" not in curve["name"]] == ["loss"]
    assert (logit["title"], logit["y_label"]) == ("Classifier: peak logit", "logit")
    assert {curve["name"] for curve in share["curves"]} == {"recall", "kept"}
    assert len(_history_charts("Segmenter", [{"step": 1, "epoch": 1, "loss": 1.0}])) == 1


def test_held_out_images_have_a_chart(artifacts, tmp_path):
    curve = [{"step": step, "miou": step / 100, "pixel_accuracy": 0.5} for step in (10, 20, 30)]
    found = {"compared_with": "pseudo-masks", "held_out": ["a", "b"], "best_step": 30, "curve": curve}
    write_json(artifacts["train_segmenter"] / "validation.json", found)
    html, page = build(artifacts, tmp_path / "report.html")
    assert "Segmenter on 2 held-out images, against their pseudo-masks" in html
    assert "best, epoch 7.5" in page.text, "eight steps are two epochs"


def test_a_segmenter_that_says_one_class_alone_is_named(artifacts, tmp_path):
    def note(cells: list[list[int]]) -> str:
        found = {"segmenter": SparseConfusions.from_matrices(3, [("x", np.array(cells))])}
        return "; ".join(text for _, text in collapse_notes(found, CLASSES))

    assert note([[90, 10, 0], [50, 50, 0], [20, 50, 30]]) == ""
    assert note([[90, 10, 0], [50, 50, 0], [50, 48, 2]]) == (
        "98% of the object pixels are red fox, of the true ones 50%: it has collapsed to one class"
    )
    assert note([[90, 0, 0], [50, 0, 0], [50, 0, 0]]).startswith("every pixel is background")
    assert note([[90, 10, 0], [10, 90, 0], [5, 5, 0]]) == "1 of 2 classes never appear: <b>owl</b>"
    assert note([[90, 10, 0], [10, 90, 0], [0, 0, 0]]) == "", "a class that no truth has is not missed"


def test_classes_that_come_together_are_counted(artifacts, tmp_path):
    index = json.loads((artifacts["prepare_data"] / "index.json").read_text())
    training = [record for record in index["images"] if record["id"].startswith("t.")]
    for record, labels in zip(training, ([0], [0, 1], [0], [0], [1]), strict=True):
        record["labels"] = labels
    write_json(artifacts["prepare_data"] / "index.json", index)
    _, page = build(artifacts, tmp_path / "report.html")
    assert "1 of 5 training images with a label have several classes." in page.text
    assert "1 of 4 images with red fox have <b>owl</b> too (25.0 %)" in page.text
    assert "1 of 2 images with <b>owl</b> have red fox too (50.0 %)" in page.text


def test_natural_order():
    assert sorted(["a10", "a9", "B1", "a"], key=natural_key) == ["a", "a9", "a10", "B1"]
