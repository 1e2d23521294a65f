"""Artifacts appear whole or not at all; a damaged one is named and never used."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from pipeline.store.artifacts import Artifact, Store
from stages.errors import MissingArtifactError

STAGE, KEY = "make_masks", "0123456789abcdef0123"


def build(store: Store, key: str = KEY, *, text: str = "mask", metrics: dict[str, float] | None = None) -> Artifact:
    work, _ = store.work_dir(STAGE, key)
    (work / "masks").mkdir(exist_ok=True)
    (work / "masks" / "a.png").write_text(text)
    (work / "stats.json").write_text("{}")
    content = {"version": 1, "config": {}, "inputs": {"prepare_data": "f" * 20}, "mask_supervision": ["b", "c"]}
    return store.publish(STAGE, key, content=content, run={"metrics": metrics or {}, "warnings": ["w"]})


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return Store(tmp_path / "artifacts")


def test_published_artifact_is_found_with_its_manifest(store: Store) -> None:
    assert store.lookup(STAGE, KEY) is None
    built = build(store, metrics={"masks.coverage": 0.5})
    found = store.lookup(STAGE, KEY)
    assert found == built
    assert found.path == store.root / STAGE / KEY
    assert found.metrics == {"masks.coverage": 0.5}
    assert found.warnings == ("w",)
    assert found.mask_supervision == {"b", "c"}
    assert found.size_bytes == len("mask") + len("{}")
    assert found.content["schema"] == 2
    digest = "48bf9b4f142ab45cac6f33cf99415bca6ca8e07608a031237aa76560fec2204b"  # sha256sum of "mask"
    assert found.content["files"]["masks/a.png"] == {"size": 4, "sha256": digest}
    assert not store.work_path(STAGE, KEY).exists()


def test_equal_results_have_equal_content_whatever_the_run(tmp_path: Path) -> None:
    first = build(Store(tmp_path / "a"), metrics={"m": 1.0})
    second = build(Store(tmp_path / "b"), metrics={"m": 2.0})
    assert json.dumps(first.content) == json.dumps(second.content)
    assert first.run != second.run


def test_unfinished_work_is_no_hit_and_is_continued(store: Store) -> None:
    work, is_resumed = store.work_dir(STAGE, KEY)
    assert not is_resumed
    (work / ".tmp-half").write_text("half a file of a killed process")
    assert store.work_dir(STAGE, KEY) == (work, False)
    (work / "shard.npz").write_text("x")
    assert store.lookup(STAGE, KEY) is None
    assert store.has_work(STAGE, KEY)
    assert store.work_dir(STAGE, KEY) == (work, True)
    assert store.work_dir(STAGE, KEY, fresh=True) == (work, False)


def test_temporary_files_are_not_published(store: Store) -> None:
    work, _ = store.work_dir(STAGE, KEY)
    (work / ".tmp-half").write_text("x")
    artifact = build(store)
    assert sorted(artifact.content["files"]) == ["masks/a.png", "stats.json"]
    assert not (artifact.path / ".tmp-half").exists()


def rewrite(path: Path, **content: object) -> None:
    """Replace parts of a manifest's content."""
    manifest = json.loads((path / "manifest.json").read_text())
    manifest["content"] |= content
    (path / "manifest.json").write_text(json.dumps(manifest))


@pytest.mark.parametrize(
    ("damage", "expected"),
    [
        (lambda path: (path / "masks" / "a.png").unlink(), "masks/a.png is missing"),
        (lambda path: (path / "masks" / "a.png").write_text("ma"), "masks/a.png has 2 bytes instead of 4"),
        (lambda path: (path / "manifest.json").unlink(), "manifest.json is not readable JSON"),
        (lambda path: (path / "manifest.json").write_text("{"), "manifest.json is not readable JSON"),
        (lambda path: (path / "manifest.json").write_text("{}"), f"does not describe {STAGE} {KEY}"),
        (lambda path: (path / "manifest.json").write_text("[]"), f"does not describe {STAGE} {KEY}"),
        (lambda path: rewrite(path, files=[]), f"does not describe {STAGE} {KEY}"),
        (lambda path: rewrite(path, files={"stats.json": {"size": 2}}), f"does not describe {STAGE} {KEY}"),
        (lambda path: rewrite(path, files={"stats.json": 2}), f"does not describe {STAGE} {KEY}"),
        (lambda path: rewrite(path, mask_supervision=None), f"does not describe {STAGE} {KEY}"),
    ],
)
def test_damage_is_named_and_never_a_hit(store: Store, damage, expected: str) -> None:
    damage(build(store).path)
    heard: list[str] = []
    assert store.lookup(STAGE, KEY, damaged=heard.append, fresh=True) is None
    assert len(heard) == 1
    assert expected in heard[0]
    with pytest.raises(MissingArtifactError, match="run the stage make_masks again"):
        store.require(STAGE, KEY)


def test_another_artifacts_manifest_is_no_hit(store: Store) -> None:
    build(store).path.rename(store.path(STAGE, "f" * 20))
    assert store.lookup(STAGE, "f" * 20) is None


def test_set_aside_keeps_every_damaged_copy(store: Store) -> None:
    build(store)
    first = store.set_aside(STAGE, KEY)
    build(store)
    second = store.set_aside(STAGE, KEY)
    assert (first.name, second.name) == (f".damaged-{KEY}-0", f".damaged-{KEY}-1")
    assert store.lookup(STAGE, KEY) is None


def test_publishing_again_replaces(store: Store) -> None:
    build(store, text="old")
    assert (build(store, text="new").path / "masks" / "a.png").read_text() == "new"
    assert sorted(path.name for path in (store.root / STAGE).iterdir()) == [KEY]


def test_verify_reads_every_byte(store: Store) -> None:
    artifact = build(store)
    assert store.verify(STAGE, KEY) == []
    (artifact.path / "masks" / "a.png").write_text("MASK")
    (artifact.path / "stats.json").unlink()
    assert store.lookup(STAGE, KEY, fresh=True) is None
    problems = [problem.replace(f"{artifact.path}/", "") for problem in store.verify(STAGE, KEY)]
    assert problems == ["masks/a.png: the content differs from the manifest's sha256", "stats.json is missing"]


def test_same_size_change_passes_lookup_and_fails_verify(store: Store) -> None:
    artifact = build(store)
    (artifact.path / "masks" / "a.png").write_text("MASK")
    assert store.lookup(STAGE, KEY, fresh=True) is not None
    assert len(store.verify(STAGE, KEY)) == 1


def test_artifacts_lists_whole_ones_and_folders_all(store: Store) -> None:
    build(store, "a" * 20)
    build(store, "b" * 20)
    (store.path(STAGE, "a" * 20) / "stats.json").unlink()
    store = Store(store.root)
    store.work_dir(STAGE, "c" * 20)
    (store.root / "reports" / "demo").mkdir(parents=True)
    assert [artifact.key for artifact in store.artifacts()] == ["b" * 20]
    assert list(store.folders()) == [(STAGE, "a" * 20), (STAGE, "b" * 20)]
    assert store.verify(STAGE, "a" * 20) == [f"{store.path(STAGE, 'a' * 20) / 'stats.json'} is missing"]


def test_whole_artifact_is_looked_at_once_until_it_is_another_or_a_fresh_look_is_asked_for(store: Store) -> None:
    (build(store).path / "stats.json").unlink()
    assert store.lookup(STAGE, KEY) is not None, "its files were all there"
    assert store.lookup(STAGE, KEY, fresh=True) is None
    assert store.lookup(STAGE, KEY) is None
    other = Store(store.root)
    build(other, metrics={"m": 1.0})
    assert store.lookup(STAGE, KEY).metrics == {"m": 1.0}
    build(other, metrics={"m": 2.0})
    assert store.lookup(STAGE, KEY).metrics == {"m": 2.0}
    other.set_aside(STAGE, KEY)
    assert store.lookup(STAGE, KEY) is None
