"""``wsss doctor --self-test``: it holds here, and a promise that does not hold is told."""

from pathlib import Path

import pytest

from pipeline.cli import self_test
from pipeline.cli.doctor import try_out
from pipeline.store.artifacts import Store
from pipeline.store.locks import ArtifactLock
from stages.errors import EnvironmentFailure


@pytest.mark.slow
def test_every_promise_holds_here_and_nothing_is_left(tmp_path: Path):
    checks = list(try_out(tmp_path / "artifacts"))
    assert [(check.name, check.status) for check in checks] == [
        (name, "ok") for name in ("locks", "run", "again", "damage", "kill", "crf")
    ]
    assert list(tmp_path.iterdir()) == []


def test_a_folder_that_cannot_be_written_is_one_failure(tmp_path: Path):
    (tmp_path / "file").touch()
    (check,) = try_out(tmp_path / "file")
    assert (check.name, check.status) == ("self-test", "failed")


def test_it_ends_with_the_first_failure(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    def broken() -> str:
        raise EnvironmentFailure("it is so")

    monkeypatch.setattr(self_test, "make_self_tests", lambda folder: {"a": lambda: "well", "b": broken, "c": broken})
    assert [(check.name, check.status, check.found) for check in try_out(tmp_path)] == [
        ("a", "ok", "well"),
        ("b", "failed", "it is so"),
    ]


def test_locks_that_keep_nobody_out_are_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(ArtifactLock, "try_acquire", lambda self, *, patience_s=0.0: True)
    with pytest.raises(EnvironmentFailure, match="kept nobody out; choose another disk"):
        self_test.make_self_tests(tmp_path)["locks"]()


def test_damage_that_nobody_notices_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    folder = tmp_path / "quiet" / "train_classifier" / ("0" * 20)
    folder.mkdir(parents=True)
    (folder / "classifier.safetensors").write_bytes(b"weights")
    monkeypatch.setattr(Store, "verify", lambda *_: [])
    with pytest.raises(EnvironmentFailure, match="expected verify to find a changed byte"):
        self_test.make_self_tests(tmp_path)["damage"]()


def test_files_that_differ_are_named_and_manifests_are_not(tmp_path: Path):
    for name, data in {"one": b"1", "other": b"2"}.items():
        folder = tmp_path / name / ("a" * 20)
        folder.mkdir(parents=True)
        (folder / "weights").write_bytes(data)
        (folder / "manifest.json").write_bytes(data)
    (tmp_path / "other" / ("a" * 20) / "more").touch()
    differing = self_test._differing(tmp_path / "one", tmp_path / "other")
    assert differing == [f"{'a' * 20}/more", f"{'a' * 20}/weights"]


def test_backends_of_the_crf_that_disagree_are_told(monkeypatch: pytest.MonkeyPatch):
    pytest.importorskip("numba")
    monkeypatch.setattr(self_test, "CRF_TOLERANCE", -1.0)
    with pytest.raises(EnvironmentFailure, match="numba and torch differ by"):
        self_test._compare_crf()
