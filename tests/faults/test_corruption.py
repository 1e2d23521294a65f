"""The corruption table: each kind of file of each stage's artifact, damaged in each way, is noticed and made again.

The consumer of the damaged artifact is taken away, so that the run must build it from what is damaged.  In the end
every file of the store has the bytes of the undamaged run.
"""

from __future__ import annotations

import fnmatch
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from pipeline.config.run_config import load_config
from pipeline.engine.stage_table import STAGES, TABLE
from pipeline.store.artifacts import survey
from tests.pipeline.whole_runs.here import wsss_here
from tests.pipeline.whole_runs.tiny_run import tiny_yaml

KINDS = {
    "prepare_data": [
        "index.json",
        "data/synthetic.json",
        "data/labels.csv",
        "data/Annotations/*.xml",
        "data/ImageSets/Segmentation/*.txt",
        "data/JPEGImages/*.jpg",
        "data/SegmentationClass/*.png",
    ],
    "train_classifier": ["classifier.safetensors", "classifier.json", "history.json"],
    "make_attention": ["shards/attention-*.npz"],
    "make_masks": ["stats.json", "masks/*.png"],
    "train_segmenter": ["segmenter.safetensors", "segmenter.json", "history.json"],
    "evaluate": ["boundaries.npz", "confusions.npz", "metrics.json", "sweep.json", "predictions/*.png"],
}
"""Every kind of file in the artifacts of the tiny run; each also has its manifest."""

CONSUMERS = {
    "prepare_data": "train_classifier",
    "train_classifier": "make_attention",
    "make_attention": "make_masks",
    "make_masks": "train_segmenter",
    "train_segmenter": "evaluate",
}


def flip(file: Path, other: Path) -> None:
    """Another byte in the middle, in a file of the same size and time."""
    before, data = file.stat(), bytearray(file.read_bytes())
    data[len(data) // 2] ^= 1
    file.write_bytes(data)
    os.utime(file, ns=(before.st_atime_ns, before.st_mtime_ns))


def truncate(file: Path, other: Path) -> None:
    data = file.read_bytes()
    file.write_bytes(data[: len(data) // 2])


def delete(file: Path, other: Path) -> None:
    file.unlink()


def swap(file: Path, other: Path) -> None:
    """Two files of a kind in each other's place; of one size, if need be."""
    first, second = file.read_bytes(), other.read_bytes()
    file.write_bytes(second)
    other.write_bytes(first)


def symlink(file: Path, other: Path) -> None:
    """A link to a copy: the content is right today, and is nobody's promise."""
    copy = next(parent for parent in file.parents if parent.name == "artifacts").with_name(f"copy-{file.name}")
    shutil.move(file, copy)
    file.symlink_to(copy)


def hide(file: Path, other: Path) -> None:
    if os.geteuid() == 0:
        pytest.skip("root reads a file whatever its mode is")
    file.chmod(0)


FAULTS: list[Callable[[Path, Path], None]] = [flip, truncate, delete, swap, symlink, hide]


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a finished run."""
    folder = tmp_path_factory.mktemp("finished")
    (folder / "tiny.yaml").write_text(tiny_yaml())
    run(folder)
    return folder


def run(folder: Path, code: int = 0) -> dict:
    return wsss_here(folder, "run", "tiny.yaml", "--engine", "local", code=code)


def verify(folder: Path, code: int = 0) -> list[str]:
    return wsss_here(folder, "artifacts", "verify", code=code)["problems"]


def artifact(folder: Path, stage: str) -> Path:
    (path,) = (path for path in (folder / "artifacts" / stage).iterdir() if not path.name.startswith("."))
    return path


def contents(folder: Path) -> dict[str, bytes]:
    """Every file of the artifacts but the manifests, which say when they were built."""
    found = {}
    for stage in STAGES:
        path = artifact(folder, stage)
        names = survey(path)[0].keys() - {"manifest.json"}
        found |= {f"{stage}/{path.name}/{name}": (path / name).read_bytes() for name in names}
    return found


def files_of(path: Path, kind: str) -> list[Path]:
    return [path / name for name in sorted(survey(path)[0]) if fnmatch.fnmatch(name, kind)]


def damage(folder: Path, stage: str, kind: str, fault: Callable[[Path, Path], None]) -> Path:
    file, *others = files_of(artifact(folder, stage), kind)
    different = [other for other in others if other.read_bytes() != file.read_bytes()]
    if fault is swap and not different:
        pytest.skip("there is one file of this kind")
    fault(file, *(different or [file])[:1])
    return file


def check(finished: Path, tmp_path: Path, stage: str, kind: str, fault: Callable[[Path, Path], None]) -> None:
    folder = tmp_path / "copy"
    shutil.copytree(finished, folder)
    file = damage(folder, stage, kind, fault)
    assert any(str(file).removeprefix(f"{folder}/") in problem for problem in verify(folder, code=4))
    if stage in CONSUMERS:
        shutil.rmtree(artifact(folder, CONSUMERS[stage]))
    else:  # nothing is built of it, but pages show it; a look-up does without what it sees to be damaged
        is_found = kind != "manifest.json" and is_same_size(file, finished / file.relative_to(folder))
        wsss_here(folder, "report", "tiny.yaml", code=4 if is_found else 0)
    states = {found["stage"]: found["state"] for found in run(folder)["stages"]}
    asides = sorted(path.parent.name for path in (folder / "artifacts").glob("*/.damaged-*"))
    assert asides == [stage], "the damaged artifact alone is set aside"
    if stage in CONSUMERS:
        assert states[CONSUMERS[stage]] == "built"
    assert verify(folder) == []
    assert contents(folder) == contents(finished)


def is_same_size(file: Path, original: Path) -> bool:
    return file.is_file() and not file.is_symlink() and file.stat().st_size == original.stat().st_size


def test_the_table_names_every_kind_of_file_and_a_consumer_that_reads_it(finished: Path) -> None:
    run_config = load_config(finished / "tiny.yaml")
    for stage in STAGES:
        path = artifact(finished, stage)
        kinds = [*KINDS[stage], "manifest.json"]
        assert all(files_of(path, kind) for kind in kinds)
        assert [name for name in survey(path)[0] if not any(fnmatch.fnmatch(name, kind) for kind in kinds)] == []
    for stage, consumer in CONSUMERS.items():
        assert stage in TABLE.spec(consumer).inputs(run_config)


@pytest.mark.parametrize(
    ("stage", "kind", "fault"),
    [
        ("train_classifier", "classifier.safetensors", flip),
        ("make_masks", "masks/*.png", swap),
        ("make_attention", "shards/attention-*.npz", symlink),
        ("train_segmenter", "manifest.json", flip),
        ("evaluate", "metrics.json", flip),
    ],
)
def test_damage_is_noticed_and_made_again(finished: Path, tmp_path: Path, stage: str, kind: str, fault) -> None:
    check(finished, tmp_path, stage, kind, fault)


@pytest.mark.slow
@pytest.mark.parametrize("fault", FAULTS)
@pytest.mark.parametrize(
    ("stage", "kind"), [(stage, kind) for stage, kinds in KINDS.items() for kind in [*kinds, "manifest.json"]]
)
def test_the_whole_table(finished: Path, tmp_path: Path, stage: str, kind: str, fault) -> None:
    check(finished, tmp_path, stage, kind, fault)
