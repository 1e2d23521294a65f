"""Artifacts appear whole or not at all; a damaged one is named and never used."""

from __future__ import annotations

import json
import os
import shutil
import threading
from pathlib import Path

import pytest

from pipeline.store import artifacts
from pipeline.store.artifacts import Artifact, Store
from stages.errors import DamagedFileError, MissingArtifactError

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


def edit_metric(path: Path) -> None:
    manifest = json.loads((path / "manifest.json").read_text())
    manifest["run"]["metrics"]["masks.miou"] = 0.99
    (path / "manifest.json").write_text(json.dumps(manifest))


def link(path: Path) -> None:
    """A link to where the right content lies now."""
    elsewhere = path.parents[3] / f"elsewhere-{path.name}"
    shutil.move(path, elsewhere)
    path.symlink_to(elsewhere)


def pipe(path: Path) -> None:
    path.unlink()
    os.mkfifo(path)


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
        (lambda path: rewrite(path, schema=1), f"does not describe {STAGE} {KEY}"),
        (lambda path: rewrite(path, files={"../a": {"size": 2, "sha256": "0"}}), "outside of its artifact: '../a'"),
        (lambda path: rewrite(path, files={"/a": {"size": 2, "sha256": "0"}}), "outside of its artifact: '/a'"),
        (lambda path: rewrite(path, files={"a\0b": {"size": 2, "sha256": "0"}}), "outside of its artifact: 'a\\x00b'"),
        (lambda path: rewrite(path, files={"stats.json": {"size": 2, "sha256": "0"}}), "manifest.json was edited"),
        (lambda path: rewrite(path, config={"threshold": 0.5}), "manifest.json was edited"),
        (lambda path: edit_metric(path), "manifest.json was edited"),
        (lambda path: (path / "manifest.json").write_text("[" * 100_000), "not readable JSON (nested too deeply)"),
        (lambda path: (path / "manifest.json").write_text('{"run": NaN}'), "NaN is no JSON number"),
        (lambda path: (path / "manifest.json").write_text("1" * 5000), "not readable JSON (Exceeds the limit"),
        (lambda path: (path / "manifest.json").write_bytes(b"\xff{}"), "not readable JSON ('utf-8' codec"),
        (lambda path: link(path / "manifest.json"), "manifest.json is a link, not a file"),
        (lambda path: link(path / "stats.json"), "stats.json is missing"),
        (lambda path: link(path / "masks"), "masks/a.png is missing"),
        (lambda path: pipe(path / "stats.json"), "stats.json is missing"),
    ],
)
def test_damage_is_named_and_never_a_hit(store: Store, damage, expected: str) -> None:
    damage(build(store).path)
    heard: list[str] = []
    assert store.lookup(STAGE, KEY, damaged=heard.append, fresh=True) is None
    assert len(heard) == 1
    assert expected in heard[0]
    assert any(expected in problem for problem in store.verify(STAGE, KEY))
    with pytest.raises(MissingArtifactError, match="run the stage make_masks again"):
        store.require(STAGE, KEY)
    store.set_aside(STAGE, KEY)
    assert (build(store).path / "masks" / "a.png").read_text() == "mask"


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


def test_same_size_change_passes_lookup_fails_verify_and_is_set_aside_where_it_is_required(store: Store) -> None:
    artifact = build(store)
    (artifact.path / "masks" / "a.png").write_text("MASK")
    assert store.lookup(STAGE, KEY, fresh=True) is not None
    assert len(store.verify(STAGE, KEY)) == 1
    with pytest.raises(DamagedFileError) as caught:
        store.require(STAGE, KEY)
    aside = store.root / STAGE / f".damaged-{KEY}-0"
    assert caught.value.message == (
        f"{STAGE} {KEY} is damaged; set aside as {aside}. The next run that needs it builds it again"
    )
    assert caught.value.problems == (
        f"{artifact.path / 'masks' / 'a.png'}: the content differs from the manifest's sha256",
    )
    assert (aside / "masks" / "a.png").read_text() == "MASK"
    assert store.lookup(STAGE, KEY) is None
    build(store)
    assert (store.require(STAGE, KEY).path / "masks" / "a.png").read_text() == "mask"


def test_bytes_are_read_once_by_each_store_while_the_manifest_is_the_same(store: Store, monkeypatch) -> None:
    build(store)
    read: list[Path] = []
    examine = artifacts.examine
    monkeypatch.setattr(artifacts, "examine", lambda path, files: (read.append(path), examine(path, files))[1])
    for _ in range(3):
        store.require(STAGE, KEY)
    assert len(read) == 1
    build(Store(store.root), metrics={"m": 1.0})
    store.require(STAGE, KEY)
    assert len(read) == 2


def test_files_that_are_no_artifacts_own_are_named_and_nothing_is_thrown_away_for_them(store: Store) -> None:
    path = build(store).path
    (path / "masks" / ".DS_Store").write_text("")
    assert store.require(STAGE, KEY).path == path, "no stage reads it"
    assert store.verify(STAGE, KEY) == [], "a file browser left it"
    (path / "masks" / "b.png").write_text("one more")
    stranger = f"{path}/masks/b.png is no file of this artifact"
    assert store.verify(STAGE, KEY) == [stranger]
    with pytest.raises(DamagedFileError, match="has files that it was not written with; remove them") as caught:
        Store(store.root).require(STAGE, KEY)
    assert caught.value.problems == (stranger,)
    assert path.is_dir()


def test_artifact_behind_a_link_is_one_like_any_other(store: Store, tmp_path: Path) -> None:
    path, disk = build(store).path, tmp_path / "other disk"
    shutil.move(path, disk)
    path.symlink_to(disk)
    assert Store(store.root).require(STAGE, KEY).metrics == {}
    assert store.verify(STAGE, KEY) == []
    build(store, metrics={"m": 1.0})
    assert not path.is_symlink()
    assert (disk / "manifest.json").is_file(), "what a link leads to is somebody else's"
    assert sorted(found.name for found in (store.root / STAGE).iterdir()) == [KEY]
    shutil.rmtree(path)
    path.symlink_to(tmp_path / "gone")
    assert store.lookup(STAGE, KEY) is None
    build(store)
    assert store.verify(STAGE, KEY) == []


def test_an_artifact_that_is_being_replaced_is_found(store: Store) -> None:
    """Two renames replace it, and a look-up may come between them."""
    path = build(store).path
    replaced = path.rename(path.with_name(f".replaced-{KEY}"))
    threading.Timer(0.2, replaced.rename, [path]).start()
    assert Store(store.root).lookup(STAGE, KEY) is not None


@pytest.mark.parametrize("is_rebuilt", [True, False])
def test_what_goes_or_is_replaced_while_it_is_verified_is_not_damaged(
    store: Store, monkeypatch, is_rebuilt: bool
) -> None:
    path = build(store).path
    find_changes, calls = artifacts.find_changes, []

    def meanwhile(*arguments: object) -> dict[str, str]:
        calls.append(1)
        if len(calls) == 1:
            shutil.rmtree(path)
            if is_rebuilt:
                build(Store(store.root), text="another")
        return find_changes(*arguments)

    monkeypatch.setattr(artifacts, "find_changes", meanwhile)
    assert store.verify(STAGE, KEY) == []
    assert len(calls) == 1 + is_rebuilt


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
