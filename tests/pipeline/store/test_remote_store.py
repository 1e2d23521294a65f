"""A store behind a real S3-compatible server: what is there decides, what is here is used, nothing damaged is."""

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
from pipeline.store import object_store, work_mirror
from pipeline.store.artifacts import Store, open_store
from pipeline.store.object_store import ObjectFolder
from pipeline.store.remote_store import RemoteStore, cache_folder
from stages.errors import DamagedFileError, EnvironmentFailure, InputError, MissingArtifactError
from tests.pipeline.store.test_store import KEY, STAGE, build

HERE = Path(__file__).parent
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


@pytest.fixture
def url(endpoint: str) -> str:
    bucket = f"bucket-{next(_numbers)}"
    fsspec.filesystem("s3", endpoint_url=endpoint).mkdir(bucket)
    return f"s3://{bucket}/wsss/artifacts"


@pytest.fixture
def first(url: str, tmp_path: Path) -> RemoteStore:
    return RemoteStore(url, tmp_path / "first")


@pytest.fixture
def second(url: str, tmp_path: Path) -> RemoteStore:
    """The same store on another machine."""
    return RemoteStore(url, tmp_path / "second")


@pytest.fixture
def objects(url: str) -> ObjectFolder:
    return ObjectFolder(url)


# ---------------------------------------------------------------------------------------------------------------------
# Locations
# ---------------------------------------------------------------------------------------------------------------------


def test_a_folder_is_a_store_and_a_url_is_a_remote_one(url: str, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setenv("WSSS_CACHE", str(tmp_path / "cache"))
    for location in (tmp_path / "a", str(tmp_path / "a"), f"file://{tmp_path}/a"):
        store = open_store(location)
        assert type(store) is Store
        assert (store.root, store.location) == (tmp_path / "a", str(tmp_path / "a"))
    remote = open_store(f"{url}/")
    assert isinstance(remote, RemoteStore)
    assert remote.location == url
    assert open_store(remote.location).root == remote.root
    assert remote.root.parent == tmp_path / "cache" / "artifacts"
    assert cache_folder(url) != cache_folder(f"{url}2")


@pytest.mark.parametrize(
    ("location", "expected"),
    [
        ("s3:/bucket/artifacts", "lost a slash; write s3://bucket/artifacts"),
        ("sftp://host/artifacts", "no exclusive create for the locks; use one of s3://"),
        ("s3://", "the bucket is missing"),
        ("s3://key:secret@bucket/a", "credentials do not belong into a URL"),
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
    RemoteStore(url, tmp_path / "not yet").check_visible()
    with pytest.raises(EnvironmentFailure, match="the bucket does not exist"):
        RemoteStore("s3://no-such-bucket/a", tmp_path).check_visible()


def test_file_in_place_of_the_folder_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(EnvironmentFailure, match="file is no folder"):
        open_store(tmp_path / "file")


def failing_on(end: str, transfer):
    """A transfer that fails for the file whose name ends so."""

    def fail(self: ObjectFolder, *arguments) -> None:
        if any(str(argument).endswith(end) for argument in arguments):
            time.sleep(0.2)  # the other files have come by then
            raise EnvironmentFailure("the network is gone")
        transfer(self, *arguments)

    return fail


# ---------------------------------------------------------------------------------------------------------------------
# Publishing and finding
# ---------------------------------------------------------------------------------------------------------------------


def test_artifact_of_one_machine_is_found_by_another_and_comes_when_required(first, second) -> None:
    assert first.lookup(STAGE, KEY) is None
    with pytest.raises(MissingArtifactError, match=r"s3://.*run the stage make_masks again"):
        second.require(STAGE, KEY)
    built = build(first, metrics={"masks.coverage": 0.5})
    assert built.is_local
    assert first.lookup(STAGE, KEY) == built

    found = second.lookup(STAGE, KEY)
    assert found is not None
    assert not found.is_local
    assert found.metrics == {"masks.coverage": 0.5}
    assert found.size_bytes == built.size_bytes
    assert not second.root.exists(), "looking brings nothing here"

    here = second.require(STAGE, KEY)
    assert here.is_local
    assert (here.path / "masks" / "a.png").read_text() == "mask"
    assert here.manifest == built.manifest
    assert second.lookup(STAGE, KEY) == here
    assert [path.name for path in (second.root / STAGE).iterdir()] == [KEY]


def test_layout_in_the_bucket_is_that_of_a_local_store(first, objects, tmp_path: Path) -> None:
    build(first)
    for name in objects.sizes(""):
        objects.fetch(name, tmp_path / "copy" / name)
    assert Store(tmp_path / "copy").verify(STAGE, KEY) == []
    assert [artifact.key for artifact in Store(tmp_path / "copy").artifacts()] == [KEY]


def test_upload_that_was_cut_off_is_no_hit_and_is_finished_by_the_next_build(first, second, monkeypatch) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(ObjectFolder, "send", failing_on("stats.json", ObjectFolder.send))
        with pytest.raises(EnvironmentFailure, match="network is gone"):
            build(first)
    assert second.lookup(STAGE, KEY) is None
    assert first.lookup(STAGE, KEY) is None, "looking sends nothing"
    with first.lock(STAGE, KEY):
        found = first.lookup(STAGE, KEY)
    assert found is not None
    assert found.is_local
    assert second.require(STAGE, KEY).content == found.content


def test_artifact_that_was_removed_there_comes_back_from_a_cache_that_has_it(first, second, objects) -> None:
    build(first)
    objects.remove_folder(f"{STAGE}/{KEY}")
    assert first.lookup(STAGE, KEY) is None
    with first.lock(STAGE, KEY):
        assert first.lookup(STAGE, KEY) is not None
    assert second.lookup(STAGE, KEY) is not None


def test_publishing_twice_is_publishing_once_and_other_files_replace(first, second, objects) -> None:
    build(first)
    build(first)
    assert second.require(STAGE, KEY).size_bytes == len("mask") + len("{}")
    work, _ = first.work_dir(STAGE, KEY)
    (work / "new.json").write_text("[]")
    content = {"version": 1, "config": {}, "inputs": {}, "mask_supervision": []}
    first.publish(STAGE, KEY, content=content, run={})
    assert sorted(objects.sizes(f"{STAGE}/{KEY}")) == ["manifest.json", "new.json"]
    outdated = second.lookup(STAGE, KEY)
    assert outdated is not None
    assert not outdated.is_local, "the copy here is of the artifact that was replaced"
    assert sorted(path.name for path in second.require(STAGE, KEY).path.iterdir()) == ["manifest.json", "new.json"]


def test_artifacts_lists_what_is_there(first, second) -> None:
    build(first, "a" * 20)
    build(first, "b" * 20)
    first.lock(STAGE, "c" * 20).try_acquire()
    (first.root / "runs").mkdir()
    (first.root / "runs" / "demo.json").write_text("{}")
    first.share(first.root / "runs" / "demo.json")
    assert list(second.folders()) == [(STAGE, "a" * 20), (STAGE, "b" * 20)]
    assert [artifact.key for artifact in second.artifacts()] == ["a" * 20, "b" * 20]


def test_shared_file_is_seen_and_its_end_too(first, objects) -> None:
    record = first.root / "runs" / "demo-1.json"
    record.parent.mkdir(parents=True)
    record.write_text("{}")
    first.share(record)
    assert objects.read("runs/demo-1.json") == b"{}"
    record.unlink()
    first.share(record)
    assert objects.read("runs/demo-1.json") is None


def test_remove_takes_everything_of_a_key_with_it(first, second, objects) -> None:
    build(first)
    second.require(STAGE, KEY)
    second.remove(STAGE, KEY)
    assert objects.sizes(STAGE) == {}
    assert second.lookup(STAGE, KEY) is None
    assert not second.path(STAGE, KEY).exists()


# ---------------------------------------------------------------------------------------------------------------------
# Damage
# ---------------------------------------------------------------------------------------------------------------------


def test_file_damaged_on_its_way_is_fetched_again(first, second, monkeypatch) -> None:
    build(first)
    fetch, damaged = ObjectFolder.fetch, []

    def flip_once(self: ObjectFolder, name: str, file: Path) -> None:
        fetch(self, name, file)
        if name.endswith("a.png") and not damaged:
            damaged.append(name)
            file.write_text("MASK")

    monkeypatch.setattr(ObjectFolder, "fetch", flip_once)
    assert (second.require(STAGE, KEY).path / "masks" / "a.png").read_text() == "mask"
    assert damaged


def test_file_damaged_in_the_store_is_named_and_never_used(first, second, objects) -> None:
    build(first)
    objects.write(f"{STAGE}/{KEY}/masks/a.png", b"MASK")
    with pytest.raises(DamagedFileError) as caught:
        second.require(STAGE, KEY)
    message = caught.value.message
    assert f"{STAGE}/{KEY}/masks/a.png: expected 4 bytes with sha256 48bf9b4f" in message
    assert "found 4 bytes with" in message
    assert "--force make_masks" in message
    assert not second.path(STAGE, KEY).exists()
    assert not list(second.root.rglob("a.png"))
    assert [problem.rpartition("/")[2] for problem in second.verify(STAGE, KEY)] == [
        "a.png: the content differs from the manifest's sha256"
    ]
    build(first)  # as --force does; the same bytes are sent again
    assert second.require(STAGE, KEY).is_local


@pytest.mark.parametrize(
    ("damage", "expected"),
    [
        (lambda o, f: o.remove(f"{f}/masks/a.png"), "masks/a.png is missing"),
        (lambda o, f: o.write(f"{f}/masks/a.png", b"ma"), "masks/a.png has 2 bytes instead of 4"),
        (lambda o, f: o.write(f"{f}/manifest.json", b"{"), "manifest.json is not readable JSON"),
        (lambda o, f: o.write(f"{f}/manifest.json", b"{}"), f"does not describe {STAGE} {KEY}"),
        (lambda o, f: escape(o, f), "names a file outside of its artifact: ../../x"),
    ],
)
def test_damage_in_the_store_is_named_set_aside_and_built_again(first, second, objects, damage, expected: str) -> None:
    build(first)
    damage(objects, f"{STAGE}/{KEY}")
    heard: list[str] = []
    assert second.lookup(STAGE, KEY, damaged=heard.append) is None
    assert len(heard) == 1
    assert expected in heard[0]
    with second.lock(STAGE, KEY):
        assert second.set_aside(STAGE, KEY) == f"{objects}/{STAGE}/.damaged-{KEY}-0"
        build(second)
    assert RemoteStore(second.location, second.root.with_name("third")).require(STAGE, KEY).is_local


def escape(objects: ObjectFolder, folder: str) -> None:
    manifest = json.loads(objects.read(f"{folder}/manifest.json") or b"")
    manifest["content"]["files"]["../../x"] = {"size": 0, "sha256": "0"}
    objects.write(f"{folder}/manifest.json", json.dumps(manifest).encode())


def test_damaged_cache_is_filled_again(first) -> None:
    path = build(first).path
    (path / "masks" / "a.png").unlink()
    found = first.lookup(STAGE, KEY)
    assert found is not None
    assert not found.is_local
    assert (first.require(STAGE, KEY).path / "masks" / "a.png").read_text() == "mask"
    assert first.verify(STAGE, KEY) == []
    (path / "stats.json").write_text("[]")
    assert [problem.replace(f"{path}/", "") for problem in first.verify(STAGE, KEY)] == [
        "stats.json: the content differs from the manifest's sha256"
    ]


def test_fetch_that_was_cut_off_goes_on_with_what_it_has(first, second, monkeypatch) -> None:
    build(first)
    fetch, fetched = ObjectFolder.fetch, []
    with monkeypatch.context() as patch:
        patch.setattr(ObjectFolder, "fetch", failing_on("stats.json", fetch))
        with pytest.raises(EnvironmentFailure, match="network is gone"):
            second.require(STAGE, KEY)
    assert not second.path(STAGE, KEY).exists()

    def note(self: ObjectFolder, name: str, file: Path) -> None:
        fetched.append(file.name)
        fetch(self, name, file)

    monkeypatch.setattr(ObjectFolder, "fetch", note)
    assert second.require(STAGE, KEY).is_local
    assert fetched == ["stats.json"]


# ---------------------------------------------------------------------------------------------------------------------
# Stores that cannot be used
# ---------------------------------------------------------------------------------------------------------------------

LOOK = """
import sys
from pathlib import Path
from pipeline.store.remote_store import RemoteStore
from stages.errors import EnvironmentFailure
try:
    RemoteStore(sys.argv[1], Path(sys.argv[2])).lookup("make_masks", "0" * 20)
except EnvironmentFailure as error:
    print(error)
"""


def look(url: str, cache: Path, **variables: str) -> str:
    """What a process with these variables says to a look into the store."""
    environment = {name: value for name, value in (os.environ | variables).items() if value}
    command = [sys.executable, "-c", LOOK, url, str(cache)]
    answer = subprocess.run(command, capture_output=True, text=True, env=environment, cwd=Path.cwd(), check=True)
    assert "do-not-print-me" not in answer.stdout + answer.stderr
    assert answer.stdout.count("\n") <= 1
    return answer.stdout


def test_bucket_that_does_not_exist_is_named(tmp_path: Path) -> None:
    with pytest.raises(EnvironmentFailure, match=r"s3://no-such-bucket/a.*: the bucket does not exist; make it"):
        RemoteStore("s3://no-such-bucket/a", tmp_path).lookup(STAGE, KEY)
    with pytest.raises(EnvironmentFailure, match="the bucket does not exist"):
        RemoteStore("s3://no-such-bucket/a", tmp_path).lock(STAGE, KEY).try_acquire()
    with pytest.raises(EnvironmentFailure, match="the bucket does not exist"):
        list(RemoteStore("s3://no-such-bucket/a", tmp_path).folders())


def test_missing_credentials_are_named(url: str, tmp_path: Path) -> None:
    said = look(url, tmp_path, AWS_ACCESS_KEY_ID="", AWS_SECRET_ACCESS_KEY="")
    assert "no credentials were found; set AWS_ACCESS_KEY_ID" in said


@pytest.mark.slow
def test_endpoint_that_is_down_is_named(url: str, tmp_path: Path) -> None:
    said = look(url, tmp_path, AWS_ENDPOINT_URL="http://127.0.0.1:9")
    assert "the store does not answer" in said
    assert "check the network and the endpoint (AWS_ENDPOINT_URL)" in said


def test_denied_access_is_named(first, monkeypatch) -> None:
    def deny(*arguments: object, **options: object) -> None:
        raise PermissionError("Access Denied")

    monkeypatch.setattr(first._objects._access[0], "cat_file", deny)
    with pytest.raises(EnvironmentFailure, match=r"access was denied \(Access Denied\); check which credentials"):
        first.lookup(STAGE, KEY)


def test_missing_driver_says_what_to_install(url: str, tmp_path: Path) -> None:
    (tmp_path / "s3fs.py").write_text("raise ImportError")
    path = os.pathsep.join([str(tmp_path), str(Path.cwd())])
    assert "the driver is not installed; pip install 'wsss-pipeline[s3]'" in look(url, tmp_path, PYTHONPATH=path)


def test_words_of_a_driver_lose_what_stands_before_a_host() -> None:
    error = ValueError("Could not connect to\nhttps://user:do-not-print-me@host/x")
    assert object_store._words(error) == "Could not connect to https://host/x"


def test_store_that_ignores_conditional_creates_is_refused(first, monkeypatch) -> None:
    write = ObjectFolder.write
    monkeypatch.setattr(ObjectFolder, "create", lambda self, name, data: write(self, name, data) or True)
    monkeypatch.setattr("pipeline.store.lease_places._proven", set())
    with pytest.raises(EnvironmentFailure, match="ignored a conditional create"):
        first.lock(STAGE, KEY).try_acquire()


# ---------------------------------------------------------------------------------------------------------------------
# The command line
# ---------------------------------------------------------------------------------------------------------------------


@pytest.fixture
def wsss_json(url: str, tmp_path: Path, monkeypatch, capsys):
    monkeypatch.setenv("WSSS_CACHE", str(tmp_path / "cache"))

    def call(*words: str, code: int = 0) -> dict:
        found = cli.main([*words, "--artifacts", url, "--json"])
        captured = capsys.readouterr()
        assert found == code, captured
        return json.loads(captured.out)

    return call


def test_artifacts_are_listed_shown_and_verified_where_they_are(first, objects, wsss_json) -> None:
    build(first, "a" * 20)
    build(first, "b" * 20)
    listed = wsss_json("artifacts", "list")["artifacts"]
    assert [entry["key"] for entry in listed] == ["a" * 20, "b" * 20]
    shown = wsss_json("artifacts", "show", "aaa")
    assert sorted(shown["manifest"]["content"]["files"]) == ["masks/a.png", "stats.json"]
    assert not Path(shown["path"]).exists(), "to show an artifact brings nothing here"
    assert wsss_json("artifacts", "verify")["verified"] == 2
    objects.write(f"{STAGE}/{'b' * 20}/masks/a.png", b"MASK")
    (problem,) = wsss_json("artifacts", "verify", code=4)["error"]["problems"]
    assert problem == f"{objects}/{STAGE}/{'b' * 20}/masks/a.png: the content differs from the manifest's sha256"
    objects.remove(f"{STAGE}/{'a' * 20}/stats.json")
    assert "stats.json is missing; run the stage" in wsss_json("artifacts", "show", "aaa", code=3)["error"]["message"]


def test_prune_is_refused_with_what_to_do_instead(first, second, wsss_json) -> None:
    build(first)
    error = wsss_json("artifacts", "prune", "--yes", code=2)["error"]
    assert "prune works on folders only" in error["message"]
    assert second.lookup(STAGE, KEY) is not None


def test_doctor_tries_the_store(url: str, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setenv("WSSS_CACHE", str(tmp_path / "cache"))
    found = check_store(url).found
    assert found.startswith(f"{url}: locked by leases, ")
    assert f" GB free under {tmp_path}" in found
    failed = run_check("store", lambda: check_store("s3://no-such-bucket/a"))
    assert failed.status == "failed"
    assert "the bucket does not exist; make it" in failed.found
    assert "is made with the first artifact" in check_store(tmp_path / "new").found
    assert not (tmp_path / "new").exists()
    assert check_store(tmp_path).found.startswith(f"{tmp_path}: locked by flock, ")


def test_cache_that_cannot_be_made_is_named(url: str, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(EnvironmentFailure, match=r"cannot be made .*; set WSSS_CACHE"):
        RemoteStore(url, tmp_path / "file" / "cache").lock(STAGE, KEY)


# ---------------------------------------------------------------------------------------------------------------------
# Locks
# ---------------------------------------------------------------------------------------------------------------------


def test_lock_excludes_across_machines(first, second) -> None:
    lock = first.lock(STAGE, KEY)
    with lock:
        other = second.lock(STAGE, KEY)
        assert not other.try_acquire()
        assert f"process {os.getpid()} on " in other.holder()
        lock.check_held()
    assert other.try_acquire()
    other.release()


def test_nothing_is_published_under_a_lock_that_was_taken_over(first, second, objects) -> None:
    with first.lock(STAGE, KEY):
        assert objects.create(f".locks/{STAGE}-{KEY}/2", b"{}")
        with pytest.raises(EnvironmentFailure, match="another worker has taken over"):
            build(first)
    assert second.lookup(STAGE, KEY) is None


def test_create_whose_answer_was_lost_is_a_win(objects, monkeypatch) -> None:
    system = objects._access[0]
    pipe_file = system.pipe_file

    def lose_answer(path: str, data: bytes, **options: object) -> None:
        pipe_file(path, data, **options)
        raise FileExistsError("sent twice")

    monkeypatch.setattr(system, "pipe_file", lose_answer)
    assert objects.create("a", b"mine")
    assert not objects.create("a", b"another's")


RACE = """
import sys
from pathlib import Path
from pipeline.store.remote_store import RemoteStore
store = RemoteStore(sys.argv[1], Path(sys.argv[2]))
locks = []
for line in sys.stdin:
    locks.append(store.lock("collect", line.strip()))
    print(int(locks[-1].try_acquire()), flush=True)
"""


def test_of_processes_that_race_for_an_object_exactly_one_wins(url: str, tmp_path: Path) -> None:
    racers = [
        subprocess.Popen(
            [sys.executable, "-c", RACE, url, str(tmp_path / name)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            cwd=Path.cwd(),
        )
        for name in "abc"
    ]
    try:
        for number in range(15):
            for racer in racers:
                assert racer.stdin is not None
                racer.stdin.write(f"{number}\n")
                racer.stdin.flush()
            won = [racer.stdout.readline().strip() for racer in racers if racer.stdout is not None]
            assert sorted(won) == ["0", "0", "1"], number
    finally:
        for racer in racers:
            racer.kill()
            racer.communicate()


# ---------------------------------------------------------------------------------------------------------------------
# Two machines, one key
# ---------------------------------------------------------------------------------------------------------------------

WORK = """
import os, sys, time
from pathlib import Path
from pipeline.store import leases
from pipeline.store import work_mirror
from pipeline.store.remote_store import RemoteStore
from stages.contracts import write_atomic
leases._machine = lambda: sys.argv[2]  # its processes are not to be seen by the others
work_mirror.MIRROR_EVERY_S = 0.2
store, key, stop_after, gate = RemoteStore(sys.argv[1], Path(sys.argv[2])), "0123456789abcdef0123", *sys.argv[3:]

def say(*words):
    print(*words, flush=True)

with store.lock("collect", key, waiting=lambda holder: say("waiting", holder)):
    if (artifact := store.lookup("collect", key)) is not None:
        store.require("collect", key)
        say("cached")
        sys.exit()
    work, is_resumed = store.work_dir("collect", key)
    say("resumed" if is_resumed else "fresh", len(list(work.glob("*.txt"))))
    with store.mirror("collect", key):
        for number in range(5):
            if not (work / f"{number}.txt").exists():
                write_atomic(work / f"{number}.txt", b"by %s" % Path(sys.argv[2]).name.encode())
                say("wrote", number)
            while number == int(stop_after) and not Path(gate).exists():
                time.sleep(0.05)
    content = {"version": 1, "config": {}, "inputs": {}, "mask_supervision": []}
    store.publish("collect", key, content=content, run={})
    say("built")
"""


@contextlib.contextmanager
def machine(
    url: str, cache: Path, *, stop_after: int = -1, gate: Path = Path("none")
) -> Iterator[subprocess.Popen[str]]:
    """A worker with a cache of its own; it waits for the file ``gate`` when it has written so far."""
    command = [sys.executable, "-c", WORK, url, str(cache), str(stop_after), str(gate)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, cwd=Path.cwd()) as process:
        try:
            yield process
        finally:
            process.kill()


def heard(process: subprocess.Popen[str], end: str) -> list[str]:
    """What it says up to the line that begins so."""
    assert process.stdout is not None
    lines: list[str] = []
    while not lines or not lines[-1].startswith(end):
        lines.append(process.stdout.readline().strip())
        assert lines[-1], lines
    return lines


def test_of_two_machines_one_builds_and_the_other_reuses(url: str, tmp_path: Path) -> None:
    with machine(url, tmp_path / "a", stop_after=1, gate=tmp_path / "go") as builder:
        heard(builder, "wrote 1")
        with machine(url, tmp_path / "b") as waiter:
            assert heard(waiter, "waiting")[0].startswith(f"waiting process {builder.pid} on ")
            (tmp_path / "go").touch()
            assert heard(waiter, "cached") == ["cached"]
        assert heard(builder, "built")
    other = RemoteStore(url, tmp_path / "b").lookup("collect", KEY)
    assert other is not None
    assert other.is_local
    assert {path.read_text() for path in other.path.glob("*.txt")} == {"by a"}


@pytest.mark.slow
def test_work_of_a_machine_that_died_is_continued_within_ten_seconds(url: str, tmp_path: Path, objects) -> None:
    with machine(url, tmp_path / "a", stop_after=2) as builder:
        heard(builder, "wrote 2")
        while f".work-{KEY}/2.txt" not in objects.sizes("collect"):
            time.sleep(0.05)
        time.sleep(0.3)  # its index
        with machine(url, tmp_path / "b") as waiter:
            heard(waiter, "waiting")
            builder.kill()
            died = time.monotonic()
            assert heard(waiter, "resumed")[-1] == "resumed 3"
            assert time.monotonic() - died < 10
            assert heard(waiter, "built") == ["wrote 3", "wrote 4", "built"]
    artifact = RemoteStore(url, tmp_path / "c").require("collect", KEY)
    assert [(artifact.path / f"{n}.txt").read_text() for n in range(5)] == ["by a"] * 3 + ["by b"] * 2
    assert not [name for name in objects.sizes("collect") if name.startswith(".work")]


# ---------------------------------------------------------------------------------------------------------------------
# Unfinished work
# ---------------------------------------------------------------------------------------------------------------------


def mirrored(store: RemoteStore, **files: str) -> None:
    """Work on these files until a mishap."""
    work, _ = store.work_dir(STAGE, KEY)
    with contextlib.suppress(KeyError), store.mirror(STAGE, KEY):
        for name, text in files.items():
            (work / name).write_text(text)
        raise KeyError


def texts(folder: Path) -> dict[str, str]:
    return {path.name: path.read_text() for path in folder.iterdir()}


def test_work_goes_to_and_fro_and_the_later_one_counts(first, second) -> None:
    mirrored(first, a="1")
    assert second.has_work(STAGE, KEY)
    assert second.work_dir(STAGE, KEY)[1]
    assert texts(second.work_path(STAGE, KEY)) == {"a": "1"}
    mirrored(second, a="2", b="2")
    (first.work_path(STAGE, KEY) / "mine").write_text("outdated")
    assert texts(first.work_dir(STAGE, KEY)[0]) == {"a": "2", "b": "2"}
    (first.work_path(STAGE, KEY) / "later").write_text("not mirrored yet")
    assert texts(first.work_dir(STAGE, KEY)[0]) == {"a": "2", "b": "2", "later": "not mirrored yet"}


def test_mirror_copies_what_changed_and_leaves_out_what_is_half_written(first, objects) -> None:
    work, _ = first.work_dir(STAGE, KEY)
    mirror = first.mirror(STAGE, KEY)
    for name in ("a", ".tmp-x", "checkpoint.pt.part"):
        (work / name).write_text("1")
    folder = f"{STAGE}/.work-{KEY}"
    mirror.copy()
    assert sorted(objects.sizes(folder)) == [".mirror.json", "a"]
    objects.remove(f"{folder}/a")
    mirror.copy()
    assert sorted(objects.sizes(folder)) == [".mirror.json"], "what has not changed is not sent again"
    (work / "sub").mkdir()
    (work / "a").rename(work / "sub" / "b")
    mirror.copy()
    assert sorted(objects.sizes(folder)) == [".mirror.json", "sub/b"]
    index = json.loads(objects.read(f"{folder}/.mirror.json") or b"")
    assert index == {"files": ["sub/b"], "number": 2}


def test_mirror_is_silent_about_a_store_that_fails_and_stops_when_the_lock_is_lost(first, objects) -> None:
    with first.lock(STAGE, KEY):
        work, _ = first.work_dir(STAGE, KEY)
        (work / "a").write_text("1")
        assert objects.create(f".locks/{STAGE}-{KEY}/2", b"{}")
        with pytest.raises(EnvironmentFailure, match="another worker has taken over"):
            first.mirror(STAGE, KEY).copy()
        mirrored(first, b="2")
    assert objects.sizes(f"{STAGE}/.work-{KEY}") == {}


def test_force_throws_the_work_of_other_machines_away_too(first, second) -> None:
    mirrored(first, a="1")
    work, is_resumed = second.work_dir(STAGE, KEY, fresh=True)
    assert not is_resumed
    assert texts(work) == {}
    assert not second.has_work(STAGE, KEY)


def test_work_is_copied_while_a_build_goes_on(first, second, monkeypatch) -> None:
    monkeypatch.setattr(work_mirror, "MIRROR_EVERY_S", 0.05)
    work, _ = first.work_dir(STAGE, KEY)
    with first.mirror(STAGE, KEY):
        (work / "checkpoint.pt").write_text("step 100")
        end = time.monotonic() + 10
        while not second.has_work(STAGE, KEY) and time.monotonic() < end:
            time.sleep(0.05)
        assert texts(second.work_dir(STAGE, KEY)[0]) == {"checkpoint.pt": "step 100"}


def test_index_that_names_a_file_outside_is_not_followed(first, objects) -> None:
    objects.write(f"{STAGE}/.work-{KEY}/.mirror.json", json.dumps({"number": 9, "files": ["../../x"]}).encode())
    assert first.work_dir(STAGE, KEY) == (first.work_path(STAGE, KEY), False)
