"""Unfinished work that is not as the build left it: flipped bits, files of others, files that are gone.

A run is stopped in each stage, where most of its files are there; what lies in the work folder is damaged, and the run
goes on.  In the end every file of the store has the bytes of the run that nobody disturbed.
"""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest

from pipeline.engine.stage_table import STAGES
from pipeline.store.artifacts import survey
from stages import make_masks
from stages.contracts import JOURNAL
from stages.errors import EnvironmentFailure
from tests.faults.test_corruption import artifact, contents, flip, run, verify
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
def stopped(quiet: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, Path]]:
    """A folder for each of ``STOPS``, with the run stopped there."""
    folders = {}
    for where, function in STOPS.items():
        stage = where.partition(",")[0]
        folder = folders[where] = tmp_path_factory.mktemp("stopped") / "run"
        shutil.copytree(quiet, folder)
        for late in STAGES[STAGES.index(stage) :]:
            shutil.rmtree(folder / "artifacts" / late)
        with pytest.MonkeyPatch.context() as patch:

            def stop(*_: object, **__: object) -> None:
                raise EnvironmentFailure("stopped")

            patch.setattr(function, stop)
            wsss_here(folder, "stage", stage, "tiny.yaml", code=4)
    yield folders


def work_files(folder: Path, stage: str) -> tuple[Path, list[str]]:
    (work,) = (folder / "artifacts" / stage).glob(".work-*")
    return work, sorted(name for name in survey(work)[0] if not name.startswith(JOURNAL) and ".tmp-" not in name)


def go_on(folder: Path, quiet: Path) -> list[str]:
    """The warnings of the run that goes on; its bytes are those of the quiet one."""
    run(folder)
    assert contents(folder) == contents(quiet)
    assert verify(folder) == []
    manifests = [json.loads((artifact(folder, stage) / "manifest.json").read_text()) for stage in STAGES]
    return [text for each in manifests for text in each["run"]["warnings"] if "unfinished work" in text]


@pytest.mark.parametrize("where", STOPS)
def test_what_nobody_touched_is_continued_without_a_word(stopped, quiet, tmp_path, where: str) -> None:
    shutil.copytree(stopped[where], tmp_path, dirs_exist_ok=True)
    assert go_on(tmp_path, quiet) == []


@pytest.mark.parametrize("where", STOPS)
def test_flipped_bits_and_strangers_are_set_aside_and_made_again(stopped, quiet, tmp_path, where: str) -> None:
    stage = where.partition(",")[0]
    shutil.copytree(stopped[where], tmp_path, dirs_exist_ok=True)
    work, names = work_files(tmp_path, stage)
    assert names
    for name in names:
        flip(work / name, work)
        shutil.copy(work / name, (work / name).with_stem("stranger"))
    (warning,) = go_on(tmp_path, quiet)
    assert int(re.match(r"[\d,]+", warning)[0].replace(",", "")) >= len(names)
    (aside,) = (tmp_path / "artifacts" / stage).glob(".damaged-*")
    assert survey(aside)[0].keys() > set(names)


@pytest.mark.parametrize("where", STOPS)
def test_a_journal_that_is_gone_vouches_for_nothing(stopped, quiet, tmp_path, where: str) -> None:
    stage = where.partition(",")[0]
    shutil.copytree(stopped[where], tmp_path, dirs_exist_ok=True)
    work, names = work_files(tmp_path, stage)
    shutil.rmtree(work / JOURNAL)
    (warning,) = go_on(tmp_path, quiet)
    assert f"{len(names)} files" in warning


@pytest.mark.slow
@pytest.mark.parametrize("where", STOPS)
def test_one_file_of_each_kind(stopped, quiet, tmp_path, where: str) -> None:
    """What rests on the damaged file is made again with it."""
    stage = where.partition(",")[0]
    _, names = work_files(stopped[where], stage)
    kinds = {re.sub(r"\d+|train|val", "#", name): name for name in names}
    for number, name in enumerate(kinds.values()):
        for is_gone in (False, True):
            folder = tmp_path / f"{number}{is_gone}"
            shutil.copytree(stopped[where], folder)
            work, _ = work_files(folder, stage)
            if is_gone:
                (work / name).unlink()
            else:
                flip(work / name, work)
            assert len(go_on(folder, quiet)) == (0 if is_gone else 1), name
            shutil.rmtree(folder)


def test_a_mask_that_is_put_there_while_the_stage_works_is_not_published(stopped, quiet, tmp_path) -> None:
    """It is taken, and found before it is published; the next call makes it."""
    shutil.copytree(stopped["make_masks"], tmp_path, dirs_exist_ok=True)
    work, _ = work_files(tmp_path, "make_masks")
    shutil.rmtree(work)
    with pytest.MonkeyPatch.context() as patch:
        make = make_masks.run_jobs

        def put(function, jobs, context, *words, **named):
            source = next((quiet / "artifacts/make_masks").glob("*/masks/train_00001.png"))
            context.out.mkdir(parents=True)
            shutil.copy(source, context.out / "train_00002.png")
            for folder in ("confidence", "steps/0-threshold"):
                (context.out.parent / folder).mkdir(parents=True)
                shutil.copy(source, context.out.parent / folder / "train_00002.png")
            return make(function, jobs, context, *words, **named)

        patch.setattr(make_masks, "run_jobs", put)
        wsss_here(tmp_path, "stage", "make_masks", "tiny.yaml", code=4)
    assert len(go_on(tmp_path, quiet)) == 1
