"""The journal vouches for what was written through it, whole, under this name; for nothing else."""

import hashlib
import os
from pathlib import Path

import pytest

from stages.contracts import JOURNAL, is_journalled, note_files, open_journal, read_journal, write_atomic, write_json


def sha(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def test_every_file_written_below_is_noted_with_its_name_and_digest(tmp_path: Path) -> None:
    open_journal(tmp_path)
    write_atomic(tmp_path / "masks" / "a b.png", b"one", b"two")
    write_json(tmp_path / "stats.json", {})
    assert read_journal(tmp_path) == {("masks/a b.png", sha(b"onetwo")), ("stats.json", sha(b"{}\n"))}
    assert is_journalled(tmp_path / "new" / "folder")


def test_a_folder_without_a_journal_gets_none(tmp_path: Path) -> None:
    write_atomic(tmp_path / "a", b"1")
    assert read_journal(tmp_path) is None
    assert not is_journalled(tmp_path / "a")
    assert [path.name for path in tmp_path.iterdir()] == ["a"]


def test_names_are_relative_to_the_journal_wherever_the_process_stands(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    open_journal(tmp_path)
    (tmp_path / "sub").mkdir()
    monkeypatch.chdir(tmp_path / "sub")
    write_atomic(Path("x\nü\udcff"), b"")
    write_atomic(Path("../y"), b"")
    assert {name for name, _ in read_journal(tmp_path) or ()} == {"sub/x\nü\udcff", "y"}


def test_a_torn_line_vouches_for_nothing_and_spoils_no_other(tmp_path: Path) -> None:
    open_journal(tmp_path)
    write_atomic(tmp_path / "a", b"1")
    (file,) = (tmp_path / JOURNAL).iterdir()
    with file.open("ab") as stream:
        stream.write(f'\n{sha(b"2")} "b'.encode())
    write_atomic(tmp_path / "c", b"3")
    file.with_name("odd").write_bytes(b"\xff\xfe [1] x\nd [1]\n\n" + b"0" * 64)
    assert read_journal(tmp_path) == {("a", sha(b"1")), ("c", sha(b"3"))}


def test_each_process_has_its_own_file(tmp_path: Path) -> None:
    open_journal(tmp_path)
    write_atomic(tmp_path / "a", b"1")
    if (child := os.fork()) == 0:
        write_atomic(tmp_path / "b", b"2")
        os._exit(0)
    os.waitpid(child, 0)
    assert len(list((tmp_path / JOURNAL).iterdir())) == 2
    assert {name for name, _ in read_journal(tmp_path) or ()} == {"a", "b"}


def test_several_files_are_noted_at_once(tmp_path: Path) -> None:
    open_journal(tmp_path)
    note_files({tmp_path / "a": [b"1"], tmp_path / "b" / "c": [b"2", memoryview(b"3")]})
    assert read_journal(tmp_path) == {("a", sha(b"1")), ("b/c", sha(b"23"))}
