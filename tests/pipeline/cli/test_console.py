"""What people see: the time left, throttled lines, the plan, the tables."""

import io
from pathlib import Path

import pytest
from rich.console import Console

from pipeline.cli.console import (
    ConsoleListener,
    make_console,
    print_end,
    print_metrics,
    print_plan,
)
from pipeline.engine.outcomes import Pace
from pipeline.engine.run import StageOutcome, StageStatus
from pipeline.report.tables import describe_value

STAGES = ("prepare_data", "train_classifier", "evaluate")


class Clock:
    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


def make(*, is_terminal: bool = False) -> tuple[ConsoleListener, Clock, io.StringIO]:
    file, clock = io.StringIO(), Clock()
    console = Console(file=file, force_terminal=is_terminal, width=120, highlight=False, soft_wrap=True)
    return ConsoleListener(console, STAGES, clock=clock), clock, file


def outcome(stage: str, state: str = "built", seconds: float = 71.3, **metrics: float) -> StageOutcome:
    named = {name.replace("__", "."): value for name, value in metrics.items()}
    return StageOutcome(stage, "k" * 20, Path("artifacts"), state, seconds, named)


def test_what_comes_before_the_first_finished_unit_is_in_no_time_left():
    """A compiler's minute is not that of an image, and neither are the images that were there before."""
    pace = Pace()
    assert pace.left_s("masks", 100, 40, 0.0) is None
    assert pace.left_s("masks", 100, 41, 60.0) is None, "one minute for 40 old images, a start and a new one"
    assert pace.left_s("masks", 100, 41, 62.0) is None
    assert pace.left_s("masks", 100, 43, 64.0) == pytest.approx(57 * 2.0)
    assert pace.left_s("masks", 100, 1, 65.0) is None, "it began anew"
    assert pace.left_s("masks", 100, 2, 66.0) is None
    assert pace.left_s("masks", 100, 3, 67.0) == pytest.approx(97.0)


def test_plain_progress_is_throttled_and_tells_the_time_left():
    listener, clock, file = make()
    listener.stage_started("train_classifier", "key")
    for step in range(1, 31):
        clock.now += 1.0
        listener.step("train", step, 60, unit="steps", loss=0.12345)
    lines = file.getvalue().splitlines()
    assert len(lines) == 3, "30 updates in 30 s, one line every 10 s"
    # the pace counts from the first update on: 9 steps in 9 s, 50 to go
    assert lines[0] == "  2/3 train_classifier: train 10/60 steps, loss 0.1235, 50 s left"


def test_a_new_task_starts_a_new_countdown():
    listener, clock, file = make()
    listener.stage_started("evaluate", "key")
    listener.step("single scale", 0, 10)
    clock.now += 11
    listener.step("multi-scale", 0, 10)
    assert file.getvalue() == "  3/3 evaluate: multi-scale 0/10 images\n"


def test_stage_lines_show_state_seconds_and_the_headline():
    listener, _, file = make()
    listener.stage_started("train_classifier", "key")
    listener.stage_finished(outcome("train_classifier", classifier__map=0.9712))
    listener.stage_finished(outcome("evaluate", "skipped", 0.0))
    first, second = file.getvalue().splitlines()
    assert first.split() == [
        "2/3",
        "train_classifier",
        "built",
        "1",
        "min",
        "11",
        "s",
        "Classifier",
        "mAP",
        "97.1",
        "%",
    ]
    assert second.split() == ["3/3", "evaluate", "skipped"]
    assert [found.state for found in listener.outcomes] == ["built", "skipped"]


def test_a_terminal_gets_a_bar_that_is_taken_away():
    listener, _, file = make(is_terminal=True)
    listener.stage_started("train_classifier", "key")
    listener.step("train", 30, 60, unit="steps", loss=0.5)
    listener.stage_finished(outcome("train_classifier"))
    text = file.getvalue()
    assert "30/60" in text
    assert "loss 0.5" in text
    assert text.endswith("1 min 11 s\n")
    assert "\x1b[?25h" in text, "the cursor is shown again"


def test_markup_in_what_a_stage_says_is_text():
    listener, clock, file = make()
    listener.stage_started("evaluate", "key")
    listener.warn("class [bold]dog[/bold] is dead")
    listener.output("[/]")
    clock.now += 20
    listener.step("[red]x", 1, 2)
    assert file.getvalue().splitlines() == [
        "  evaluate: warning: class [bold]dog[/bold] is dead",
        "  evaluate: [/]",
        "  3/3 evaluate: [red]x 1/2 images",
    ]


def test_a_stage_function_in_this_process_reports_to_the_listener_itself():
    listener, clock, file = make()
    listener.stage_started("data check")
    listener.step("decode", 1, 4)
    clock.now += 10
    listener.step("decode", 3, 4)
    listener.info("a line")
    listener.warn("two masks are empty")
    assert listener.warnings == ["two masks are empty"]
    assert file.getvalue().splitlines() == [
        "  data check: decode 3/4 images",
        "  data check: a line",
        "  data check: warning: two masks are empty",
    ]


def test_plan_says_what_is_built_and_what_is_there():
    console = Console(file=(file := io.StringIO()), width=120)
    stages = [
        StageStatus(stage, state, None, None)
        for stage, state in (("a", "cached"), ("b", "cached"), ("c", "partial"), ("d", "skipped"), ("e", "damaged"))
    ]
    seconds = {"b": 2.0, "c": 185.0}
    print_plan(console, stages, forced=9, last_time=seconds.get)
    assert file.getvalue().splitlines() == [
        "in the store: a, b",
        "to continue:  c (last time on this machine: 3 min 05 s)",
        "not needed:   d",
        "to build:     e (not yet built here)",
    ]
    file.truncate(file.seek(0))
    print_plan(console, stages, forced=1, last_time=seconds.get)
    assert "to build:     b (last time on this machine: 2.0 s), c (last time on this machine" in file.getvalue()


def test_intervals_stand_beside_their_metric():
    console = Console(file=(file := io.StringIO()), width=120)
    metrics = {"segmenter.miou": 0.4312, "segmenter.miou_low": 0.41, "segmenter.miou_high": 0.452}
    print_metrics(console, {**metrics, "segmenter.pixel_accuracy": 0.8})
    assert [line.split() for line in file.getvalue().splitlines() if line.strip()] == [
        ["metric", "value", "95", "%"],
        ["Segmenter", "mIoU", "43.1", "%", "41.0", "…", "45.2"],
        ["pixel", "accuracy", "80.0", "%"],
    ]


def test_metrics_are_percentages_and_classes_begin_with_background():
    console = Console(file=(file := io.StringIO()), width=120)
    print_metrics(
        console,
        {
            "segmenter.miou": 0.4312,
            "attention.threshold_oracle": 0.41,
            "segmenter.iou": {"auk": 0.25, "background": 0.9, "zebra": None},
        },
    )
    rows = [line.split() for line in file.getvalue().splitlines() if line.strip()]
    assert rows == [
        ["metric", "value"],
        ["Attention", "threshold,", "oracle", "0.41"],
        ["Segmenter", "mIoU", "43.1", "%"],
        ["segmenter.iou", "IoU"],
        ["background", "90.0", "%"],
        ["auk", "25.0", "%"],
        ["zebra", "–"],
    ]


def test_the_end_repeats_warnings_and_names_the_report():
    console = Console(file=(file := io.StringIO()), width=120)
    print_end(console, [("make_masks", "objects [nearly] vanish")], Path("artifacts/reports/x.html"))
    assert file.getvalue().splitlines() == [
        "",
        "1 warning:",
        "  - make_masks: objects [nearly] vanish",
        "",
        "report: artifacts/reports/x.html",
    ]
    file.truncate(file.seek(0))
    print_end(console, [], None)
    assert file.getvalue() == ""


def test_people_read_stderr_when_stdout_is_for_json(capsys):
    make_console(is_json=True).print("words")
    make_console(is_json=False).print("more words")
    captured = capsys.readouterr()
    assert (captured.err, captured.out) == ("words\n", "more words\n")


@pytest.mark.parametrize(
    ("name", "value", "text"),
    [("loss", 0.12345, "loss 0.1235"), ("images_per_s", 3.14, "3.1 images/s"), ("images_per_s", 212.7, "213 images/s")],
)
def test_numbers_beside_progress(name: str, value: float, text: str) -> None:
    assert describe_value(name, value) == text
