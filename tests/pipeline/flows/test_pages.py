"""The page of a run in Prefect's UI."""

from pathlib import Path

import pytest

from pipeline.engine.outcomes import StageOutcome
from pipeline.flows.pages import headline, write_page

STAGES = [
    StageOutcome("make_masks", "aa11", Path("/s/make_masks/aa11"), "cached", 0.2, {"masks.coverage": 0.9}, ("a|b\nc",)),
    StageOutcome(
        "evaluate",
        "bb22",
        Path("/s/evaluate/bb22"),
        "built",
        75.0,
        {"segmenter.miou": 0.5464, "segmenter.iou": {"background": 0.9, "cat": 0.1929}},
    ),
]


def test_the_page_has_numbers_the_iou_of_every_class_and_what_became_of_each_stage():
    page = write_page("demo-1234", "wsss run demo", STAGES)
    lines = page.splitlines()
    assert lines[0] == "# demo-1234"
    assert "`wsss run demo`" in lines
    assert any("mIoU" in line and "54.6 %" in line for line in lines)
    assert "| cat | 19.3 % |" in lines
    assert "| background | 90.0 % |" in lines
    assert "| make_masks | cached | 0.2 s | aa11 | /s/make_masks/aa11 |" in lines
    assert "| evaluate | built | 1 min 15 s | bb22 | /s/evaluate/bb22 |" in lines


def test_a_warning_cannot_break_a_line():
    assert "- **make_masks**: a\\|b c" in write_page("x", "y", STAGES).splitlines()


def test_a_report_is_a_path_and_a_link_where_a_web_server_has_it(monkeypatch: pytest.MonkeyPatch):
    files = Path("/s/reports/r.html"), Path("/s/reports/r.png")
    monkeypatch.delenv("WSSS_FILES_URL", raising=False)
    page = write_page("x", "y", STAGES, *files)
    assert "- report: `/s/reports/r.html`" in page
    assert "](" not in page, "neither link nor picture"
    monkeypatch.setenv("WSSS_FILES_URL", "http://head:4201/")
    page = write_page("x", "y", STAGES, *files)
    assert "[http://head:4201/r.html](http://head:4201/r.html)" in page
    assert "](http://head:4201/r.png)" in page


def test_a_run_without_scores_has_no_empty_tables():
    page = write_page("x", "y", [StageOutcome("prepare_data", "k", Path("p"), "built", 1.0)])
    assert "## Numbers" not in page
    assert "## IoU" not in page
    assert "## Stages" in page


def test_the_headline_is_the_scores_or_what_became_of_the_last_stage():
    assert headline(STAGES) == "segmenter mIoU 54.6 %"
    assert headline(STAGES[:1]) == "make_masks cached"
