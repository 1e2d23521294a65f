"""Trackers hear a run's curves and numbers; they are fake packages here, and none of them may cost a run."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from fake_stages.table import TABLE, FakeRun

from pipeline.engine import tracking
from pipeline.engine.outcomes import SilentListener, StageOutcome
from pipeline.engine.run import Run
from pipeline.engine.tracking import check_trackers, tracked
from pipeline.store.artifacts import Store
from stages.errors import ConfigError, DataError
from tests.pipeline.engine.fake_trackers import write_fake_trackers


class Notes(SilentListener):
    def __init__(self) -> None:
        super().__init__()
        self.infos: list[str] = []

    def info(self, text: str) -> None:
        self.infos.append(text)


@pytest.fixture
def fakes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_fake_trackers(tmp_path / "fakes")
    for name in [name for name in sys.modules if name.partition(".")[0] in ("tensorboard", "wandb", "mlflow")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.syspath_prepend(str(tmp_path / "fakes"))
    for name in ("MLFLOW_TRACKING_URI", "MLFLOW_EXPERIMENT_NAME", "WANDB_PROJECT", "WANDB_DIR"):
        monkeypatch.delenv(name, raising=False)
    yield
    for name in [name for name in sys.modules if name.partition(".")[0] in ("tensorboard", "wandb", "mlflow")]:
        del sys.modules[name]


def use(monkeypatch: pytest.MonkeyPatch, opened: Callable[..., Any]) -> None:
    monkeypatch.setattr(tracking, "_TRACKERS", {"wandb": lambda *words: opened(*words)})


class Keeps:
    """A tracker that keeps what it gets, or breaks at a call of ``log``."""

    place = "here"

    def __init__(self, breaks_at: int = 0) -> None:
        self.points: list[tracking.Point] = []
        self.breaks_at, self.num_logs, self.ends = breaks_at, 0, []

    def log(self, points: list[tracking.Point]) -> None:
        self.num_logs += 1
        if self.num_logs == self.breaks_at:
            raise OSError("no route to host\nmore")
        self.points += points

    def close(self, *, is_done: bool) -> None:
        self.ends.append(is_done)


# -- a run ---------------------------------------------------------------------------------------------------------


def test_tensorboard_follows_a_run_of_its_own_folder(fakes: None, tmp_path: Path) -> None:
    notes, store = Notes(), Store(tmp_path / "artifacts")
    config = FakeRun(track=("tensorboard",))
    outcome = Run(config, store, table=TABLE, listener=notes).run_pipeline()
    folder = store.root / "tensorboard" / f"fake-{outcome.run_id}"
    points = [json.loads(line) for line in (folder / "points.jsonl").read_text().splitlines()]
    # the last point of a curve is there, however quick it is; a metric that is no number has none
    assert [point for point in points if point[0] == "collect/loss"][-1] == ["collect/loss", pytest.approx(1 / 3), 3]
    assert {tag: value for tag, value, _ in points if "." in tag} == {
        "collect.items": 3,
        "combine.length": 3,
        "finish.excluded": 0,
    }
    assert points[-1] == ["closed", 1, 0]
    assert notes.infos[0] == f"tensorboard: tensorboard --logdir {store.root / 'tensorboard'}"
    assert list(store.folders()) == [(stage.stage, stage.key) for stage in outcome.stages]  # no artifact of the store


def test_trackers_are_in_no_key(tmp_path: Path) -> None:
    store = Store(tmp_path / "artifacts")
    keys = [dict(Run(FakeRun(track=track), store, table=TABLE).plan.keys) for track in ((), ("wandb", "mlflow"))]
    assert keys[0] == keys[1]


def test_a_cached_run_has_its_numbers_too(fakes: None, tmp_path: Path) -> None:
    store = Store(tmp_path / "artifacts")
    Run(FakeRun(), store, table=TABLE).run_pipeline()
    outcome = Run(FakeRun(track=("tensorboard",)), store, table=TABLE).run_pipeline()
    text = (store.root / "tensorboard" / f"fake-{outcome.run_id}" / "points.jsonl").read_text()
    assert "collect.items" in text
    assert "collect/loss" not in text


def test_a_failed_run_ends_as_failed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tracker = Keeps()
    use(monkeypatch, lambda *words: tracker)
    config = FakeRun.model_validate({"track": ("wandb",), "runtime": {"mischief": "input"}})
    monkeypatch.setattr("pipeline.engine.run.check_trackers", lambda names: None)
    with pytest.raises(DataError):
        Run(config, Store(tmp_path / "artifacts"), table=TABLE).run_pipeline()
    assert tracker.ends == [False]


def test_a_tracker_that_is_not_installed_ends_the_run_before_anything_starts(tmp_path: Path) -> None:
    config, notes = FakeRun(track=("tensorbored", "wandbb", "tensorbored")), Notes()
    store = Store(tmp_path / "artifacts")
    text = (
        "track: tensorbored and wandbb are not installed; pip install 'wsss-pipeline[tensorbored,wandbb]', "
        r"or leave out with --set track=[]"
    )
    for call in (lambda run: run.run_pipeline(), lambda run: run.run_stage("collect")):
        with pytest.raises(ConfigError) as found:
            call(Run(config, store, table=TABLE, listener=notes))
        assert found.value.message == text
    assert not (store.root / "runs").exists()
    check_trackers(["json"])  # what can be imported is installed


# -- failures --------------------------------------------------------------------------------------------------------


def test_a_tracker_that_breaks_midway_is_warned_of_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    broken, notes = Keeps(breaks_at=1), Notes()
    use(monkeypatch, lambda *words: broken)
    monkeypatch.setattr("pipeline.engine.run.check_trackers", lambda names: None)
    run = Run(FakeRun(track=("wandb",)), Store(tmp_path / "artifacts"), table=TABLE, listener=notes)
    outcome = run.run_pipeline()
    assert [stage.state for stage in outcome.stages] == ["built"] * 3
    assert notes.warnings == ["wandb does not follow this run any more (no route to host); the run goes on without it"]
    assert outcome.stages[0].warnings == ()  # nothing of it in an artifact
    assert run.listener is notes


def test_a_tracker_that_does_not_open_is_warned_of_and_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*words: Any) -> Any:
        raise RuntimeError("No API key configured")

    use(monkeypatch, refuse)
    notes = Notes()
    with tracked(notes, ["wandb"], config=FakeRun(), name="x", folder=Path("unused")) as listener:
        assert listener is notes
    assert notes.warnings == [
        "wandb does not follow this run any more (No API key configured); the run goes on without it"
    ]


def test_a_tracker_that_hangs_is_left_behind(monkeypatch: pytest.MonkeyPatch) -> None:
    import threading

    release = threading.Event()

    class Hangs(Keeps):
        def log(self, points: list[tracking.Point]) -> None:
            release.wait(30)

    use(monkeypatch, lambda *words: Hangs())
    monkeypatch.setattr(tracking, "CLOSE_TIMEOUT_S", 0.1)
    notes = Notes()
    with tracked(notes, ["wandb"], config=FakeRun(), name="x", folder=Path("unused")) as listener:
        listener.step("train", 1, 9, loss=1.0)  # does not wait
    release.set()
    assert "it does not answer within 0 s" in notes.warnings[0]


# -- what each tracker is told ----------------------------------------------------------------------------------------


def follow(name: str, folder: Path) -> Notes:
    """Two rounds of one training, and the metrics at its end."""
    notes = Notes()
    config = FakeRun(root=Path("/home/somebody/data"))
    with tracked(notes, [name], config=config, name="fake-1", folder=folder) as listener:
        for losses in ((0.5, 0.25), (0.75, 0.125)):
            listener.step("train classifier", 0, 2, unit="steps")
            for step, loss in enumerate(losses, start=1):
                listener.step("train classifier", step, 2, unit="steps", loss=loss if step == 1 else 9.0)
            listener.step("train classifier", step, 2, unit="steps", loss=loss)  # the last step, told anew
        metrics = {"segmenter.miou": 0.5, "segmenter.iou": {"cat (big)": 0.25, "dog": None}, "masks.steps": [{"a": 1}]}
        listener.stage_finished(StageOutcome("evaluate", "k", None, "built", 1.0, metrics))
    assert notes.warnings == []
    return notes


def test_wandb_has_curves_by_their_own_steps_and_a_summary(fakes: None, tmp_path: Path) -> None:
    notes = follow("wandb", tmp_path)
    import wandb

    _, options = wandb.calls[0]
    assert (options["project"], options["name"], options["dir"]) == ("wsss", "fake-1", str(tmp_path))
    assert options["config"]["collect.items"] == 3
    assert "somebody" not in json.dumps(options["config"])
    assert wandb.calls[1:] == [
        ["define_metric", "train_classifier/*", {"step_metric": "train_classifier/step"}],
        ["log", {"train_classifier/step": 1, "train_classifier/loss": 0.5}, {}],
        ["log", {"train_classifier/step": 2, "train_classifier/loss": 0.25}, {}],
        ["define_metric", "train_classifier_2/*", {"step_metric": "train_classifier_2/step"}],
        ["log", {"train_classifier_2/step": 1, "train_classifier_2/loss": 0.75}, {}],
        ["log", {"train_classifier_2/step": 2, "train_classifier_2/loss": 0.125}, {}],
        ["update", {"segmenter.miou": 0.5, "segmenter.iou.cat (big)": 0.25}, {}],
        ["finish", {"exit_code": 0}],
    ]
    assert notes.infos == ["wandb: wandb/offline-run-1"]


def test_mlflow_has_parameters_and_metrics(fakes: None, tmp_path: Path) -> None:
    follow("mlflow", tmp_path)
    from mlflow.tracking import calls

    assert calls[:2] == [("client", f"sqlite:///{tmp_path / 'mlflow.db'}"), ("experiment", "wsss")]
    params = dict(calls[2][2])
    assert (params["name"], params["collect.items"]) == ("fake", "3")
    assert "root" not in params
    assert [metric for _, metrics, _ in calls[3:-1] for metric in metrics] == [
        ("train_classifier/loss", 0.5, 1),
        ("train_classifier/loss", 0.25, 2),
        ("train_classifier_2/loss", 0.75, 1),
        ("train_classifier_2/loss", 0.125, 2),
        ("segmenter.miou", 0.5, 0),
        ("segmenter.iou.cat _big_", 0.25, 0),
    ]
    assert calls[-1] == ("end", "FINISHED")
    assert len(calls[2][2]) <= 100


def test_a_long_training_sends_a_point_a_second(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = [100.0]
    monkeypatch.setattr(tracking.time, "monotonic", lambda: clock[0])
    tracker = Keeps()
    use(monkeypatch, lambda *words: tracker)
    with tracked(Notes(), ["wandb"], config=FakeRun(), name="x", folder=Path("unused")) as listener:
        for step in range(1, 101):
            listener.step("train", step, 1000, unit="steps", loss=1.0 / step)
            clock[0] += 0.25
    # one in four steps, and at the end the last one that was seen
    assert [point.step for point in tracker.points] == [*range(1, 101, 4), 100]
