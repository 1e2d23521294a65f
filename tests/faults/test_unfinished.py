"""Unfinished work that is not as the build left it: flipped bits, files of others, files that are gone.

A run is stopped in each stage, where most of its files are there; what lies in the work folder is damaged, and the run
goes on.  In the end every file of the store has the bytes of the run that nobody disturbed.
"""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from functools import cache
from pathlib import Path

import pytest

from pipeline.engine.stage_table import STAGES
from pipeline.store.artifacts import survey
from stages import make_masks
from stages.contracts import JOURNAL
from stages.errors import EnvironmentFailure
from tests.faults.test_corruption import artifact, flip, run, verify
from tests.pipeline.whole_runs.here import wsss_here
from tests.pipeline.whole_runs.tiny_run import tiny_yaml

CONFIG = tiny_yaml(
    make_attention={"shard_images": 2},
    make_masks={"refine": "crf", "soft": True, "crf": {"iterations": 1, "backend": "numba"}},
    train_segmenter={
        "rounds": 1,
        "validation": {"every_steps": 10, "ratio": 0.3},
        "loss": "balanced_cross_entropy",
        "training": {"steps": 20, "batch_size": 4, "learning_rate": 0.1},
    },
    evaluate={"localization": {}},
)

STOPS = {
    **dict.fromkeys(STAGES, "pipeline.store.artifacts._seal"),
    "train_classifier, with its checkpoint": "stages.train_classifier.save_classifier",
    "train_segmenter, with its checkpoint": "stages.train_segmenter.save_segmenter",
    "train_segmenter, at its end": "stages.training.rounds._conclude",
    "evaluate, with its counts": "stages.evaluate.shutil.rmtree",
}
"""Where each stage is stopped: before the call of this function."""


@pytest.fixture(scope="module")
def quiet(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the run that nobody disturbs."""
    folder = tmp_path_factory.mktemp("quiet")
    (folder / "tiny.yaml").write_text(CONFIG)
    run(folder)
    return folder


@pytest.fixture(scope="module")
def stopped(quiet: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """Gives a folder with the run stopped at one of ``STOPS``."""

    @cache
    def stop_at(where: str) -> Path:
        stage = where.partition(",")[0]
        folder = tmp_path_factory.mktemp("stopped") / "run"
        shutil.copytree(quiet, folder)
        for late in STAGES[STAGES.index(stage) :]:
            shutil.rmtree(folder / "artifacts" / late)

        def stop(*_: object, **__: object) -> None:
            raise EnvironmentFailure("stopped")

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(STOPS[where], stop)
            wsss_here(folder, "stage", stage, "tiny.yaml", code=4)
        return folder

    return stop_at


class Stopped:
    """A copy of a run that was stopped, to be damaged."""

    def __init__(self, stopped: Callable[[str], Path], quiet: Path, folder: Path, where: str) -> None:
        self.folder, self.stage, self._quiet = folder, where.partition(",")[0], quiet
        shutil.copytree(stopped(where), folder, dirs_exist_ok=True)
        (self.work,) = (folder / "artifacts" / self.stage).glob(".work-*")
        self.names = sorted(
            name for name in survey(self.work)[0] if not name.startswith(JOURNAL) and ".tmp-" not in name
        )
        assert self.names

    def go_on(self) -> list[str]:
        """The warnings of the stage that goes on; its bytes are those of the quiet run."""
        wsss_here(self.folder, "stage", self.stage, "tiny.yaml")
        here, there = (artifact(folder, self.stage) for folder in (self.folder, self._quiet))
        assert survey(here)[0].keys() == survey(there)[0].keys()
        manifests = [json.loads((path / "manifest.json").read_text()) for path in (here, there)]
        assert manifests[0]["content"] == manifests[1]["content"]
        assert verify(self.folder) == []
        return [text for text in manifests[0]["run"]["warnings"] if "unfinished work" in text]


SAMPLE = ("make_masks", "train_segmenter, at its end", "evaluate, with its counts")
every_stop = pytest.mark.parametrize(
    "where", [where if where in SAMPLE else pytest.param(where, marks=pytest.mark.slow) for where in STOPS]
)


@every_stop
def test_what_nobody_touched_is_continued_without_a_word(stopped, quiet, tmp_path, where: str) -> None:
    assert Stopped(stopped, quiet, tmp_path, where).go_on() == []


@every_stop
def test_flipped_bits_and_strangers_are_set_aside_and_made_again(stopped, quiet, tmp_path, where: str) -> None:
    broken = Stopped(stopped, quiet, tmp_path, where)
    for name in broken.names:
        flip(broken.work / name, broken.work)
        shutil.copy(broken.work / name, (broken.work / name).with_stem("stranger"))
    (warning,) = broken.go_on()
    assert int(re.match(r"[\d,]+", warning)[0].replace(",", "")) > len(broken.names)
    (aside,) = (tmp_path / "artifacts" / broken.stage).glob(".damaged-*")
    assert survey(aside)[0].keys() > set(broken.names)


@every_stop
def test_without_a_journal_nothing_is_taken(stopped, quiet, tmp_path, where: str) -> None:
    broken = Stopped(stopped, quiet, tmp_path, where)
    shutil.rmtree(broken.work / JOURNAL)
    (warning,) = broken.go_on()
    assert f"{len(broken.names)} files" in warning


@pytest.mark.slow
@pytest.mark.parametrize("where", STOPS)
def test_one_file_of_each_kind(stopped, quiet, tmp_path, where: str) -> None:
    """What rests on the damaged file, and nothing more, is made again with it."""
    names = Stopped(stopped, quiet, tmp_path / "first", where).names
    kinds = {re.sub(r"\d+|train|val", "#", name): name for name in names}
    for number, name in enumerate(kinds.values()):
        for is_gone in (False, True):
            broken = Stopped(stopped, quiet, tmp_path / f"{number}{is_gone}", where)
            if is_gone:
                (broken.work / name).unlink()
            else:
                flip(broken.work / name, broken.work)
            assert len(broken.go_on()) == (0 if is_gone else 1), name


def test_a_mask_that_is_put_there_while_the_stage_works_is_not_published(
    stopped, quiet, tmp_path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is taken, and found before it is published; the next call makes it."""
    broken = Stopped(stopped, quiet, tmp_path, "make_masks")
    shutil.rmtree(broken.work)
    make = make_masks.run_jobs

    def put(function, jobs, context, *words, **named):
        (source,) = (quiet / "artifacts/make_masks").glob("*/masks/train_00001.png")
        for folder in ("masks", "confidence", "steps/0-threshold"):
            (context.out.parent / folder).mkdir(parents=True)
            shutil.copy(source, context.out.parent / folder / "train_00002.png")
        return make(function, jobs, context, *words, **named)

    with monkeypatch.context() as patch:
        patch.setattr(make_masks, "run_jobs", put)
        error = wsss_here(tmp_path, "stage", "make_masks", "tiny.yaml", code=4)["error"]
    assert "has files that are not as make_masks wrote them: confidence/train_00002.png and 2 more" in error["message"]
    assert len(broken.go_on()) == 1
