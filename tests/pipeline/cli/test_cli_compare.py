"""``wsss compare``: what a word means, the JSON document, the page, exit codes, and what is not imported."""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from pipeline.cli import main as cli
from pipeline.config.run_config import load_config
from pipeline.engine.plan import plan_run
from pipeline.report.comparison import compare_runs, write_page
from pipeline.store.artifacts import Store
from stages.ops.metrics.boundaries import count_boundaries
from stages.ops.metrics.confusion import SparseConfusions, mean_iou
from tests.pipeline.report.scored_worlds import (
    IDS,
    PREPARED,
    counts,
    publish_data,
    publish_scores,
    scored_run,
    write_record,
)

ROOT = Path(__file__).parents[3]
ONE, TWO = "1a" * 10, "1b" * 10


@pytest.fixture
def store(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Store:
    """A store with the evaluations of two runs."""
    monkeypatch.chdir(tmp_path)
    store = Store(Path("artifacts"))
    publish_data(store)
    publish_scores(store, ONE, {"segmenter": counts(0.5)})
    publish_scores(store, TWO, {"segmenter": counts(0.7, seed=1), "masks": counts(0.6)})
    write_record(store, "20260101-000000-aaaaaa", "plain", ONE)
    write_record(store, "20260102-000000-bbbbbb", "better", TWO)
    return store


@pytest.fixture
def wsss(capsys: pytest.CaptureFixture[str]):
    def call(*words: str, code: int = 0) -> tuple[str, str]:
        found = cli.main(["compare", *words])
        captured = capsys.readouterr()
        assert found == code, captured.err + captured.out
        return captured.out, captured.err

    return call


@pytest.fixture
def wsss_json(wsss):
    def call(*words: str, code: int = 0) -> dict:
        document = json.loads(wsss(*words, "--json", code=code)[0])
        assert document.get("error", {}).get("code", 0) == code
        return document

    return call


def test_the_document(store: Store, wsss_json) -> None:
    document = wsss_json("20260101", f"evaluate/{TWO}")
    assert [(run["run"], run["title"], run["key"]) for run in document["runs"]] == [
        ("20260101", "plain-1a1a1a1a", ONE),
        (f"evaluate/{TWO}", "better-1b1b1b1b", TWO),
    ]
    [score] = [row for row in document["metrics"] if row["metric"] == "segmenter.miou"]
    first, second = (mean_iou(counts(*arguments).total()) for arguments in ((0.5,), (0.7,)))
    assert score["values"][0]["value"] == pytest.approx(first)
    assert score["values"][0]["low"] < first < score["values"][0]["high"]
    assert score["differences"][0] is None
    assert score["differences"][1]["better_ratio"] == 1
    assert score["differences"][1]["value"] == score["values"][1]["value"] - score["values"][0]["value"]
    classes = [row["class"] for row in document["classes"] if row["metric"] == "segmenter.miou"]
    assert classes == ["background", "cat", "dog"]
    masks = next(row for row in document["metrics"] if row["metric"] == "masks.miou")
    assert (masks["values"][0], masks["differences"]) == (None, [None, None])
    assert second > first


def test_a_run_is_known_by_its_name(store: Store, wsss_json) -> None:
    """Also by the title that the table prints; a run whose evaluation is gone does not count."""
    write_record(store, "20260103-000000-cccccc", "plain", "1c" * 10)
    assert [run["key"] for run in wsss_json("plain", "better-1b1b1b1b")["runs"]] == [ONE, TWO]
    write_record(store, "20260104-000000-dddddd", "plain", TWO)
    error = wsss_json("plain", "better", code=2)["error"]
    assert "plain means 2 evaluations" in error["message"]
    assert error["problems"] == [ONE, TWO]


def test_localization_alone_is_compared_on_one_list_of_images_only(store: Store, wsss_json) -> None:
    other, third = "9" * 20, "8" * 20
    publish_data(store, other, ids=IDS[:9])
    publish_scores(store, "2a" * 10, {}, **{"localization.top1_loc": 0.5})
    publish_scores(store, "2b" * 10, {}, prepared=other, **{"localization.top1_loc": 0.6})
    publish_scores(store, "2c" * 10, {}, prepared=third, **{"localization.top1_loc": 0.6})
    error = wsss_json("2a", "artifacts/evaluate/" + "2b" * 10, code=2)["error"]
    assert "scored on other images (localization: 30 and 9)" in error["message"]
    assert len(wsss_json("2a", "2a" * 10)["metrics"]) == 1
    assert "not in the store any more" in wsss_json("2a", "2c")["notes"][0]


@pytest.mark.parametrize(
    "word",
    [ONE, ONE[:4], "20260101-000000-aaaaaa", "plain-20260101-000000-aaaaaa", f"artifacts/evaluate/{ONE}", "plain-2026"],
)
def test_words_that_mean_one_evaluation(store: Store, wsss_json, word: str) -> None:
    assert wsss_json(word, TWO)["runs"][0]["key"] == ONE


def test_the_last_run_is_compared_as_every_command_knows_it(store: Store, wsss_json) -> None:
    assert [run["key"] for run in wsss_json(ONE, "last")["runs"]] == [ONE, TWO]
    write_record(store, "20260103-000000-cccccc", "later", "2" * 20)
    assert "the evaluation of last (evaluate 2222" in wsss_json(ONE, "last", code=3)["error"]["message"]
    record = store.root / "runs" / "later-20260103-000000-cccccc.json"
    record.write_text(record.read_text().replace('"evaluate"', '"make_masks"'))
    error = wsss_json(ONE, "last", code=3)["error"]
    assert error["message"] == (
        "later-20260103-000000-cccccc has no evaluation; build it with: wsss run later-20260103-000000-cccccc"
    )


def test_a_config_means_its_evaluation(store: Store, wsss_json, tmp_path: Path) -> None:
    text = (ROOT / "configs" / "demo.yaml").read_text()
    (tmp_path / "mine.yaml").write_text(text)
    error = wsss_json("mine.yaml", ONE, code=3)["error"]
    assert error["message"].endswith("build it with: wsss run mine.yaml")
    elsewhere = wsss_json("mine.yaml", "mine.yaml", "--artifacts", "other", code=3)["error"]
    assert elsewhere["message"].endswith("build it with: wsss run mine.yaml --artifacts other")
    (tmp_path / "demo").mkdir()  # a folder that is called as a shipped config
    assert wsss_json("demo", ONE, code=3)["error"]["message"].endswith("build it with: wsss run demo")
    key = plan_run(load_config(tmp_path / "mine.yaml"), store.digest_cache).keys["evaluate"]
    publish_scores(store, key, {"segmenter": counts(0.9)})
    assert wsss_json("mine.yaml", ONE)["runs"][0]["key"] == key


@pytest.mark.parametrize(
    ("words", "code", "text"),
    [
        ((ONE,), 2, "at least two runs, found 1"),
        ((ONE, "1"), 2, "1 means 2 evaluations; give more digits"),
        ((ONE, "nothing"), 2, "'nothing' is no config, run name, run id, folder or key"),
        ((ONE, "none.yaml"), 2, "there is no config file none.yaml"),
        ((ONE, PREPARED), 2, "is an artifact of prepare_data; name one of evaluate"),
        ((ONE, "artifacts"), 2, "artifacts is no folder of an evaluate artifact: it has no confusions.npz"),
        ((ONE, "20260103"), 3, "the evaluation of 20260103 (evaluate 2222"),
        ((ONE, "3c3c"), 4, "confusions.npz: the content differs from the manifest"),
    ],
)
def test_wrong_words_are_named(store: Store, wsss, words: tuple[str, ...], code: int, text: str) -> None:
    write_record(store, "20260103-000000-cccccc", "gone", "2" * 20)
    damaged = publish_scores(store, "3c" * 10, {"segmenter": counts(0.5)}).path / "confusions.npz"
    damaged.write_bytes(b"x" * damaged.stat().st_size)
    _, err = wsss(*words, code=code)
    assert text in err


def test_runs_on_other_classes_are_refused(store: Store, wsss_json) -> None:
    publish_data(store, "9" * 20, ("cat", "owl"))
    publish_scores(store, "4" * 20, {"segmenter": counts(0.5)}, prepared="9" * 20)
    error = wsss_json(ONE, "4" * 20, code=2)["error"]
    assert "have other classes" in error["message"]
    assert error["problems"] == [f"only {'4' * 20}: owl", f"only {ONE}: dog"]


def test_outlines_are_compared_where_they_were_counted(store: Store, wsss_json) -> None:
    """Artifacts of versions without outlines are still read."""
    rng = np.random.default_rng(0)
    truth = (rng.random((30, 30)) < 0.5).astype(np.uint8)
    for key, prediction in (("5" * 20, truth), ("6" * 20, np.zeros_like(truth))):
        matrix = count_boundaries(truth, prediction, 3)["_boundary"]
        outlines = {"segmenter_boundary": SparseConfusions.from_matrices(4, [("v00", matrix)])}
        publish_scores(store, key, {"segmenter": counts(0.5)}, outlines=outlines)
    document = wsss_json("5" * 20, "6" * 20)
    row = next(row for row in document["metrics"] if row["metric"] == "segmenter.boundary_iou")
    assert row["values"][0]["value"] == 1
    assert row["differences"][1]["value"] < -0.4
    old = next(row for row in wsss_json(ONE, "6" * 20)["metrics"] if row["metric"] == "segmenter.boundary_iou")
    assert old["values"][0] is None


def test_a_folder_of_another_store_is_read(store: Store, wsss_json, tmp_path: Path) -> None:
    moved = tmp_path / "copied"
    store.path("evaluate", ONE).rename(moved)
    document = wsss_json(str(moved), TWO)
    assert document["runs"][0]["key"] == ONE
    assert [row["class"] for row in document["classes"]][:3] == ["background", "cat", "dog"]


def test_people_see_a_table_and_classes_when_asked(store: Store, wsss) -> None:
    out, _ = wsss(ONE, TWO)
    assert "Segmenter mIoU" in out
    assert "better in 100 % of resamples" in out
    assert "dog" not in out
    assert "dog" in wsss(ONE, TWO, "--per-class")[0]


def test_the_page_fetches_nothing_and_escapes_names(tmp_path: Path) -> None:
    runs = [scored_run(word, {"segmenter": counts(right)}) for word, right in (("<i>a</i>", 0.5), ("b", 0.8))]
    html = write_page(compare_runs(runs), tmp_path / "c.html").read_text()
    assert "&lt;i&gt;a&lt;/i&gt;" in html
    assert "<i>" not in html
    assert "http:" not in html
    assert "https:" not in html
    assert "<script" not in html
    assert 'class="better">+' in html
    assert html.count("of each class</a></h2>") == 1


def test_the_page_is_written_where_it_is_asked_for(store: Store, wsss_json, tmp_path: Path) -> None:
    assert wsss_json(ONE, TWO, "--out", "sub/c.html")["page"] == "sub/c.html"
    assert "better-1b1b1b1b" in (tmp_path / "sub" / "c.html").read_text()


@pytest.mark.parametrize(("words", "palette"), [((), "safe"), (("--palette", "voc"), "voc")])
def test_the_page_has_the_chosen_colours(store: Store, wsss, monkeypatch, words, palette) -> None:
    taken = []
    monkeypatch.setattr("pipeline.report.comparison.write_page", lambda found, out, name: taken.append(name))
    wsss(ONE, TWO, "--out", "c.html", *words)
    assert taken == [palette]


def test_neither_torch_nor_prefect_is_imported(store: Store, tmp_path: Path) -> None:
    program = (
        "import sys; from pipeline.cli.main import main; code = main(sys.argv[1:]); "
        "print(code, [m for m in ('torch', 'prefect', 'cv2', 'scipy') if m in sys.modules], file=sys.stderr)"
    )
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [sys.executable, "-c", program, "compare", ONE, TWO, "--out", "c.html"],
        capture_output=True, text=True, env=environment, check=True,
    )  # fmt: skip
    assert done.stderr.splitlines()[-1] == "0 []"
