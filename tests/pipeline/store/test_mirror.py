"""A store with a mirror behind a real S3-compatible server: what is not here is found there, and nothing damaged is."""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from itertools import count
from pathlib import Path

import fsspec
import pytest

from pipeline.cli import main as cli
from pipeline.cli.doctor import check_store, run_check
from pipeline.store import mirror as mirrors
from pipeline.store.artifacts import Store, open_store
from pipeline.store.mirror import Mirror, WorkCopy
from stages.errors import DamagedFileError, EnvironmentFailure, InputError, MissingArtifactError
from tests.pipeline.store.test_store import KEY, STAGE, build

HERE = Path(__file__).parent
FOLDER = f"{STAGE}/{KEY}"
_numbers = count()


@pytest.fixture(scope="module")
def endpoint() -> Iterator[str]:
    command = [sys.executable, str(HERE / "s3_server.py")]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as server:
        assert server.stdout is not None
        try:
            yield server.stdout.readline().strip()
        finally:
            server.kill()


@pytest.fixture(autouse=True)
def _variables(endpoint: str, monkeypatch, tmp_path: Path) -> None:
    for name in list(os.environ):
        if name.startswith(("AWS_", "FSSPEC_")):
            monkeypatch.delenv(name)
    monkeypatch.setenv("AWS_ENDPOINT_URL", endpoint)
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "test")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "do-not-print-me")
    monkeypatch.setenv("AWS_DEFAULT_REGION", "us-east-1")
    monkeypatch.setenv("AWS_CONFIG_FILE", str(tmp_path / "none"))
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", str(tmp_path / "none"))
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    monkeypatch.setenv("WSSS_CACHE", str(tmp_path / "cache"))


@pytest.fixture
def url(endpoint: str) -> str:
    bucket = f"bucket-{next(_numbers)}"
    fsspec.filesystem("s3", endpoint_url=endpoint).mkdir(bucket)
    return f"s3://{bucket}/wsss/artifacts"


@pytest.fixture
def mirror(url: str) -> Mirror:
    return Mirror(url)


@pytest.fixture
def first(url: str, tmp_path: Path) -> Store:
    return Store(tmp_path / "first", Mirror(url))


@pytest.fixture
def second(url: str, tmp_path: Path) -> Store:
    """The same store on another machine."""
    return Store(tmp_path / "second", Mirror(url))


# ---------------------------------------------------------------------------------------------------------------------
# Locations
# ---------------------------------------------------------------------------------------------------------------------


def test_a_folder_is_a_store_and_a_url_one_with_a_mirror(url: str, tmp_path: Path) -> None:
    for location in (tmp_path / "a", str(tmp_path / "a"), f"file://{tmp_path}/a"):
        store = open_store(location)
        assert (store.root, store.location, store.is_mirrored) == (tmp_path / "a", str(tmp_path / "a"), False)
    store = open_store(f"{url}/")
    assert (store.location, store.is_mirrored) == (url, True)
    assert open_store(store.location).root == store.root
    assert store.root.parent == tmp_path / "cache" / "artifacts"
    assert open_store(f"{url}2").root != store.root


@pytest.mark.parametrize(
    ("location", "expected"),
    [
        ("s3:/bucket/artifacts", "lost a slash; write s3://bucket/artifacts"),
        ("sftp://host/artifacts", "use one of s3://"),
        ("s3://", "the bucket is missing"),
        ("s3://key:secret@bucket/a", "credentials do not belong in a URL"),
        ("s3:/key:secret@bucket/a", "credentials do not belong in a URL"),
        ("az://name:secret@account/a", "credentials do not belong in a URL"),
        ("az://container@account/a?sig=secret", "credentials do not belong in a URL"),
    ],
)
def test_url_that_cannot_be_a_store_is_refused(location: str, expected: str) -> None:
    with pytest.raises(InputError, match=expected) as caught:
        open_store(location)
    assert "secret" not in str(caught.value)


def test_worker_that_cannot_see_the_store_says_so(url: str, tmp_path: Path) -> None:
    with pytest.raises(EnvironmentFailure, match=r"mnt/artifacts is not to be seen on .*; mount it here.*s3://"):
        open_store(tmp_path / "mnt" / "artifacts").check_visible()
    open_store(tmp_path).check_visible()
    open_store(url).check_visible()
    assert Mirror(url).names() == [], "the check leaves nothing behind"


def test_file_in_place_of_the_folder_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(EnvironmentFailure, match="file is no folder"):
        open_store(tmp_path / "file")


# ---------------------------------------------------------------------------------------------------------------------
# Publishing and finding
# ---------------------------------------------------------------------------------------------------------------------


def test_artifact_of_one_machine_is_found_by_another_and_comes_when_required(first: Store, second: Store) -> None:
    assert first.lookup(STAGE, KEY) is None
    with pytest.raises(MissingArtifactError, match=r"s3://.*run the stage make_masks again"):
        second.require(STAGE, KEY)
    built = build(first, metrics={"masks.coverage": 0.5})
    assert first.lookup(STAGE, KEY) == built

    found = second.lookup(STAGE, KEY)
    assert found is not None
    assert found.metrics == {"masks.coverage": 0.5}
    assert found.size_bytes == built.size_bytes
    assert list(second.artifacts()) == [found]
    assert not second.root.exists(), "looking brings nothing here"

    here = second.require(STAGE, KEY)
    assert (here.path / "masks" / "a.png").read_text() == "mask"
    assert here.manifest == built.manifest
    assert second.lookup(STAGE, KEY) == here
    assert [path.name for path in (second.root / STAGE).iterdir()] == [KEY]
    assert second.verify(STAGE, KEY) == []


def test_what_is_here_is_used_without_asking_the_mirror(first: Store, monkeypatch) -> None:
    build(first)
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:9")
    offline = Store(first.root, Mirror(first.location))
    assert offline.require(STAGE, KEY).path == first.path(STAGE, KEY)


def test_copy_of_the_bucket_is_a_local_store(first: Store, mirror: Mirror, tmp_path: Path) -> None:
    build(first)
    mirror.get("", list(mirror.sizes("")), tmp_path / "copy")
    assert [artifact.key for artifact in Store(tmp_path / "copy").artifacts()] == [KEY]
    assert Store(tmp_path / "copy").verify(STAGE, KEY) == []


def test_upload_that_was_cut_off_is_no_hit_and_is_finished_by_the_next_build(
    first: Store, second: Store, monkeypatch
) -> None:
    put = Mirror.put

    def fail(self: Mirror, folder: str, names: list[str], source: Path) -> None:
        put(self, folder, [name for name in names if name != "stats.json"], source)
        raise EnvironmentFailure("the network is gone")

    with monkeypatch.context() as patch:
        patch.setattr(Mirror, "put", fail)
        with pytest.raises(EnvironmentFailure, match="network is gone"):
            build(first)
    again = Store(first.root, Mirror(first.location))
    assert second.lookup(STAGE, KEY) is None
    assert again.lookup(STAGE, KEY) is None, "so that the next run comes to the lock"
    with again.lock(STAGE, KEY):
        assert again.lookup(STAGE, KEY) is not None
    assert second.require(STAGE, KEY).content == again.require(STAGE, KEY).content


def test_publishing_twice_is_publishing_once_and_other_files_replace(
    first: Store, second: Store, mirror: Mirror
) -> None:
    build(first)
    build(second)
    assert second.require(STAGE, KEY).size_bytes == len("mask") + len("{}")
    work, _ = first.work_dir(STAGE, KEY)
    (work / "new.json").write_text("[]")
    content = {"version": 1, "config": {}, "inputs": {}, "mask_supervision": []}
    first.publish(STAGE, KEY, content=content, run={})
    assert sorted(mirror.sizes(FOLDER)) == ["manifest.json", "new.json"]


def test_shared_file_is_seen_and_its_end_too(first: Store, mirror: Mirror) -> None:
    record = first.root / "runs" / "demo-1.json"
    record.parent.mkdir(parents=True)
    record.write_text("{}")
    first.share(record)
    assert mirror.read("runs/demo-1.json") == b"{}"
    assert list(first.folders()) == []
    record.unlink()
    first.share(record)
    assert mirror.read("runs/demo-1.json") is None


# ---------------------------------------------------------------------------------------------------------------------
# Damage
# ---------------------------------------------------------------------------------------------------------------------


def test_file_damaged_on_its_way_is_fetched_again(first: Store, second: Store, monkeypatch) -> None:
    build(first)
    get, calls = Mirror.get, []

    def flip_once(self: Mirror, folder: str, names: list[str], into: Path) -> None:
        get(self, folder, names, into)
        calls.append(sorted(names))
        if len(calls) == 1:
            (into / "masks" / "a.png").write_text("MASK")

    monkeypatch.setattr(Mirror, "get", flip_once)
    assert (second.require(STAGE, KEY).path / "masks" / "a.png").read_text() == "mask"
    assert calls == [["masks/a.png", "stats.json"], ["masks/a.png"]], "what is whole is not fetched twice"


def test_file_damaged_in_the_mirror_is_named_never_used_and_healed_by_building_again(
    first: Store, second: Store, mirror: Mirror
) -> None:
    build(first)
    mirror.write(f"{FOLDER}/masks/a.png", b"MASK")
    mirror.write(f"{FOLDER}/masks/[a]?.png", b"a stranger")
    problem = f"{mirror.url}/{FOLDER}/masks/a.png: the content differs from the manifest's sha256"
    assert second.verify(STAGE, KEY) == [problem]
    with pytest.raises(DamagedFileError, match="Run the same command again: it rebuilds make_masks") as caught:
        second.require(STAGE, KEY)
    assert caught.value.problems == (problem,)
    assert not list(second.root.rglob("a.png"))
    assert second.lookup(STAGE, KEY) is None
    build(second)
    third = Store(second.root.with_name("third"), mirror)
    assert (third.require(STAGE, KEY).path / "masks" / "a.png").read_text() == "mask"


def escape(mirror: Mirror, folder: str) -> None:
    manifest = json.loads(mirror.read(f"{folder}/manifest.json") or b"")
    manifest["content"]["files"]["../../x"] = {"size": 0, "sha256": "0"}
    mirror.write(f"{folder}/manifest.json", json.dumps(manifest).encode())


@pytest.mark.parametrize(
    ("damage", "expected"),
    [
        (lambda m, f: m.remove(f"{f}/masks/a.png"), "masks/a.png is missing"),
        (lambda m, f: m.write(f"{f}/masks/a.png", b"ma"), "masks/a.png has 2 bytes instead of 4"),
        (lambda m, f: m.write(f"{f}/manifest.json", b"{"), "manifest.json is not readable JSON"),
        (lambda m, f: m.write(f"{f}/manifest.json", b"{}"), f"does not describe {STAGE} {KEY}"),
        (lambda m, f: m.write(f"{f}/manifest.json", b"[]"), f"does not describe {STAGE} {KEY}"),
        (escape, "names a file outside of its artifact: '../../x'"),
    ],
)
def test_damage_that_shows_is_no_hit_and_is_set_aside_and_built_again(
    first: Store, second: Store, mirror: Mirror, damage, expected: str
) -> None:
    build(first)
    damage(mirror, FOLDER)
    heard: list[str] = []
    assert second.lookup(STAGE, KEY, damaged=heard.append) is None
    assert len(heard) == 1
    assert expected in heard[0]
    assert expected in second.verify(STAGE, KEY)[0]
    with second.lock(STAGE, KEY):
        assert second.set_aside(STAGE, KEY) == f"{mirror.url}/{STAGE}/.damaged-{KEY}.json"
        build(second)
    assert (
        Store(second.root.with_name("third"), mirror).require(STAGE, KEY).manifest
        == second.require(STAGE, KEY).manifest
    )


def test_damaged_cache_is_filled_again(first: Store) -> None:
    path = build(first).path
    (path / "masks" / "a.png").unlink()
    again = Store(first.root, Mirror(first.location))
    assert (again.require(STAGE, KEY).path / "masks" / "a.png").read_text() == "mask"
    (path / "stats.json").write_text("[]")
    assert again.verify(STAGE, KEY) == [f"{path / 'stats.json'}: the content differs from the manifest's sha256"]
    fresh = Store(first.root, Mirror(first.location))
    assert (fresh.require(STAGE, KEY).path / "stats.json").read_text() == "{}"
    assert fresh.verify(STAGE, KEY) == []


def test_what_rotted_before_it_was_sent_is_not_sent(first: Store, mirror: Mirror) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Mirror, "put", lambda *_: (_ for _ in ()).throw(EnvironmentFailure("away")))
        with pytest.raises(EnvironmentFailure, match="away"):
            build(first)
    (first.path(STAGE, KEY) / "stats.json").write_text("[]")
    again, heard = Store(first.root, Mirror(first.location)), list[str]()
    with again.lock(STAGE, KEY):
        assert again.lookup(STAGE, KEY, damaged=heard.append) is None
        assert "stats.json: the content differs" in heard[0]
        assert mirror.sizes(FOLDER) == {}
        again.set_aside(STAGE, KEY)
        build(again)
    assert mirror.read(f"{FOLDER}/stats.json") == b"{}"


# ---------------------------------------------------------------------------------------------------------------------
# Mirrors that cannot be used
# ---------------------------------------------------------------------------------------------------------------------


def status(url: str, **variables: str) -> str:
    """What ``wsss artifacts list`` with these variables says; it ends with exit code 4 and one line."""
    environment = {name: value for name, value in (os.environ | variables).items() if value}
    command = [sys.executable, "-m", "pipeline.cli.main", "artifacts", "list", "--artifacts", url]
    answer = subprocess.run(command, capture_output=True, text=True, env=environment, cwd=Path.cwd(), check=False)
    said = answer.stdout + answer.stderr
    assert answer.returncode == 4, said
    assert "do-not-print-me" not in said
    assert said.strip().count("\n") == 0, said
    return said


def test_bucket_that_does_not_exist_is_named(tmp_path: Path) -> None:
    store = Store(tmp_path, Mirror("s3://no-such-bucket/a"))
    for ask in (lambda: store.lookup(STAGE, KEY), store.check_visible, lambda: list(store.folders())):
        with pytest.raises(EnvironmentFailure, match=r"s3://no-such-bucket/a.*: the bucket does not exist; make it"):
            ask()


def test_missing_credentials_are_named(url: str) -> None:
    said = status(url, AWS_ACCESS_KEY_ID="", AWS_SECRET_ACCESS_KEY="")
    assert "no credentials were found; set AWS_ACCESS_KEY_ID" in said


@pytest.mark.slow
def test_endpoint_that_is_down_is_named(url: str) -> None:
    said = status(url, AWS_ENDPOINT_URL="http://127.0.0.1:9")
    assert "the store does not answer" in said
    assert "check the network and the endpoint (AWS_ENDPOINT_URL)" in said


def test_missing_driver_says_what_to_install(url: str, tmp_path: Path) -> None:
    (tmp_path / "s3fs.py").write_text("raise ImportError")
    path = os.pathsep.join([str(tmp_path), str(Path.cwd())])
    assert "the driver is not installed; pip install 'wsss-pipeline[s3]'" in status(url, PYTHONPATH=path)


def test_mirror_that_cannot_be_written_is_named_before_the_work(first: Store, monkeypatch) -> None:
    def deny(*arguments: object, **options: object) -> None:
        raise PermissionError("Access Denied")

    monkeypatch.setattr(first._mirror._access[0], "pipe_file", deny)
    with pytest.raises(EnvironmentFailure, match=r"access was denied \(Access Denied\); check which credentials"):
        first.work_dir(STAGE, KEY)


def test_words_of_a_driver_lose_what_stands_before_a_host(mirror: Mirror) -> None:
    error = ValueError("Could not connect to\nhttps://user:do-not-print-me@host/x")
    assert "ValueError: Could not connect to https://host/x" in mirror._explain(error)


def test_cache_that_cannot_be_made_is_named(url: str, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(EnvironmentFailure, match=r"cannot be opened and locked .*WSSS_CACHE"):
        Store(tmp_path / "file" / "cache", Mirror(url)).lock(STAGE, KEY).try_acquire()


# ---------------------------------------------------------------------------------------------------------------------
# The command line
# ---------------------------------------------------------------------------------------------------------------------


@pytest.fixture
def wsss_json(url: str, capsys):
    def call(*words: str, code: int = 0) -> dict:
        found = cli.main([*words, "--artifacts", url, "--json"])
        captured = capsys.readouterr()
        assert found == code, captured
        return json.loads(captured.out)

    return call


def test_artifacts_are_listed_shown_and_verified_where_they_are(first: Store, mirror: Mirror, wsss_json) -> None:
    build(first, "a" * 20)
    build(first, "b" * 20)
    listed = wsss_json("artifacts", "list")["artifacts"]
    assert [entry["key"] for entry in listed] == ["a" * 20, "b" * 20]
    shown = wsss_json("artifacts", "show", "aaa")
    assert sorted(shown["manifest"]["content"]["files"]) == ["masks/a.png", "stats.json"]
    assert not Path(shown["path"]).exists(), "to show an artifact brings nothing here"
    assert wsss_json("artifacts", "verify")["verified"] == 2
    mirror.write(f"{STAGE}/{'b' * 20}/masks/a.png", b"MASK")
    (problem,) = wsss_json("artifacts", "verify", code=4)["error"]["problems"]
    assert problem == f"{mirror.url}/{STAGE}/{'b' * 20}/masks/a.png: the content differs from the manifest's sha256"
    mirror.remove(f"{STAGE}/{'a' * 20}/stats.json")
    assert "stats.json is missing; run the stage" in wsss_json("artifacts", "show", "aaa", code=3)["error"]["message"]


def test_prune_is_refused_with_what_to_do_instead(first: Store, second: Store, wsss_json) -> None:
    build(first)
    error = wsss_json("artifacts", "prune", "--yes", code=2)["error"]
    assert "prune works on folders only" in error["message"]
    assert second.lookup(STAGE, KEY) is not None


def test_doctor_tries_the_store(url: str, tmp_path: Path) -> None:
    assert check_store(url).found.startswith(f"{url}: locked by flock under {tmp_path}")
    failed = run_check("store", lambda: check_store("s3://no-such-bucket/a"))
    assert failed.status == "failed"
    assert "the bucket does not exist; make it" in failed.found
    assert "is made with the first artifact" in check_store(tmp_path / "new").found
    assert not (tmp_path / "new").exists()
    assert check_store(tmp_path).found.startswith(f"{tmp_path}: locked by flock, ")


# ---------------------------------------------------------------------------------------------------------------------
# Unfinished work
# ---------------------------------------------------------------------------------------------------------------------

TRAIN = """
import sys, time
from pathlib import Path
from pipeline.store import mirror
from pipeline.store.artifacts import Store
from stages.contracts import write_atomic
mirror.MIRROR_EVERY_S = 0.1
url, cache, stop_at = sys.argv[1], Path(sys.argv[2]), int(sys.argv[3])
store, key = Store(cache, mirror.Mirror(url)), "0123456789abcdef0123"
with store.lock("train", key):
    work, is_resumed = store.work_dir("train", key)
    checkpoint = work / "checkpoint.txt"
    with store.mirror("train", key):
        steps = checkpoint.read_text().split() if is_resumed else []
        while len(steps) < 5:
            steps.append(cache.name)
            write_atomic(checkpoint, " ".join(steps).encode())
            while len(steps) == stop_at:
                time.sleep(0.05)
    content = {"version": 1, "config": {}, "inputs": {}, "mask_supervision": []}
    store.publish("train", key, content=content, run={})
"""


def test_training_killed_on_one_machine_goes_on_on_another(url: str, tmp_path: Path, mirror: Mirror) -> None:
    def train(machine: str, stop_at: int) -> subprocess.Popen[str]:
        command = [sys.executable, "-c", TRAIN, url, str(tmp_path / machine), str(stop_at)]
        return subprocess.Popen(command, stdout=subprocess.PIPE, text=True, cwd=Path.cwd())

    with train("a", 3) as process:
        while not any(mirror.read(f"train/{n}") == b"a a a" for n in mirror.sizes("train") if n.endswith(".txt")):
            assert process.poll() is None
            time.sleep(0.05)
        time.sleep(0.5)  # its index
        process.kill()
    with train("b", 0) as process:
        assert process.wait() == 0
    artifact = Store(tmp_path / "c", mirror).require("train", KEY)
    assert (artifact.path / "checkpoint.txt").read_text() == "a a a b b"
    assert [name for name in mirror.sizes("train") if ".work" in name] == []


def copy_of(store: Store) -> WorkCopy:
    copy = store.mirror(STAGE, KEY)
    assert isinstance(copy, WorkCopy)
    return copy


def work_until_a_mishap(store: Store, **files: str) -> None:
    work, _ = store.work_dir(STAGE, KEY)
    with contextlib.suppress(KeyError), store.mirror(STAGE, KEY):
        for name, text in files.items():
            (work / name).write_text(text)
        raise KeyError


def texts(folder: Path) -> dict[str, str]:
    return {path.name: path.read_text() for path in folder.iterdir()}


def test_work_goes_to_and_fro_and_the_later_one_counts(first: Store, second: Store, mirror: Mirror) -> None:
    work_until_a_mishap(first, a="1")
    assert second.has_work(STAGE, KEY)
    assert second.work_dir(STAGE, KEY) == (second.work_path(STAGE, KEY), True)
    assert texts(second.work_path(STAGE, KEY)) == {"a": "1"}
    work_until_a_mishap(second, a="2", b="2")
    (first.work_path(STAGE, KEY) / "mine").write_text("outdated")
    assert texts(first.work_dir(STAGE, KEY)[0]) == {"a": "2", "b": "2"}
    (first.work_path(STAGE, KEY) / "later").write_text("not mirrored yet")
    assert texts(first.work_dir(STAGE, KEY)[0]) == {"a": "2", "b": "2", "later": "not mirrored yet"}
    build(first)
    assert not second.has_work("elsewhere", KEY)
    assert [name for name in mirror.sizes(STAGE) if ".work" in name] == [], "published work is not kept twice"


def test_copy_sends_what_changed_and_leaves_out_what_is_half_written(
    first: Store, second: Store, mirror: Mirror
) -> None:
    work, _ = first.work_dir(STAGE, KEY)
    copy = copy_of(first)
    for name in ("a", ".tmp-x"):
        (work / name).write_text("1")
    copy.copy()
    assert sorted(name.rpartition("/")[2] for name in mirror.sizes(f"{STAGE}/.work-{KEY}")) == ["a", "index.json"]
    (work / "sub").mkdir()
    (work / "a").rename(work / "sub" / "b")
    copy.copy()
    assert texts(second.work_dir(STAGE, KEY)[0] / "sub") == {"b": "1"}
    assert not (second.work_path(STAGE, KEY) / "a").exists()


def test_force_throws_the_work_of_other_machines_away_too(first: Store, second: Store) -> None:
    work_until_a_mishap(first, a="1")
    work, is_resumed = second.work_dir(STAGE, KEY, fresh=True)
    assert not is_resumed
    assert texts(work) == {}
    assert not Store(second.root, Mirror(second.location)).has_work(STAGE, KEY)


def test_index_that_names_a_file_outside_is_not_followed(first: Store, mirror: Mirror) -> None:
    index = {"id": "1", "copier": "x", "files": ["../../x"]}
    mirror.write(f"{STAGE}/.work-{KEY}/index.json", json.dumps(index).encode())
    assert first.work_dir(STAGE, KEY) == (first.work_path(STAGE, KEY), False)


def test_mirror_that_fails_while_a_stage_works_does_not_end_it(first: Store, monkeypatch) -> None:
    monkeypatch.setattr(mirrors, "MIRROR_EVERY_S", 0.02)
    work, _ = first.work_dir(STAGE, KEY)
    calls = []
    monkeypatch.setattr(Mirror, "put", lambda *arguments: calls.append(1) or 1 / 0)
    with first.mirror(STAGE, KEY):
        (work / "checkpoint.pt").write_text("step 100")
        while len(calls) < 2:
            time.sleep(0.02)
