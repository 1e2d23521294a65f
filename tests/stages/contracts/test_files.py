"""Paths as people write them, and files that stand in the place of others."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from stages.contracts import expand_path
from stages.errors import InputError


@pytest.mark.parametrize(
    ("written", "meant"),
    [
        ("a/b", "a/b"),
        ("~", "/home/me"),
        ("~/a b/$DISK", "/home/me/a b/disk1"),
        ("$DISK/${DISK}x", "disk1/disk1x"),
        ("a~/b", "a~/b"),
        ("5$", "5$"),
    ],
)
def test_home_and_variables(monkeypatch: pytest.MonkeyPatch, written: str, meant: str) -> None:
    monkeypatch.setenv("HOME", "/home/me")
    monkeypatch.setenv("DISK", "disk1")
    assert expand_path(written) == expand_path(Path(written)) == Path(meant)
    assert expand_path(expand_path("./~")) == Path.cwd() / "~"


@pytest.mark.parametrize(
    ("written", "message"),
    [
        ("~no-such-user/a", "~no-such-user/a: there is no user 'no-such-user' on this machine; write the path in full"),
        ("$NONE/a", "$NONE/a: $NONE is not set; write the path in full"),
        ("${NONE}/$EMPTY", "${NONE}/$EMPTY: $NONE and $EMPTY are not set; write the path in full"),
        ("a\0b", "expected a path, found 'a\\x00b'; write the path of a file or a folder"),
        ("\ud800", "expected a path, found '\\ud800'; write the path of a file or a folder"),
        ("", "expected a path, found ''; write the path of a file or a folder"),
    ],
)
def test_what_means_no_path(monkeypatch: pytest.MonkeyPatch, written: str, message: str) -> None:
    monkeypatch.delenv("NONE", raising=False)
    monkeypatch.setenv("EMPTY", "")
    with pytest.raises(InputError) as caught:
        expand_path(written)
    assert caught.value.message == message


def test_a_file_that_is_there_under_such_a_name_is_that_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("price$NONE.jpg", "~no-such-user", os.fsdecode(b"caf\xe9")):
        Path(name).touch()
        assert expand_path(name).samefile(name)
