"""What a message can carry: control characters spelled out, long lines cut in their middle."""

from __future__ import annotations

import pickle

from stages.errors import DataError, printable


def test_what_a_terminal_would_obey_is_spelled_out() -> None:
    error = DataError("a \x1b[2Jname", ["caf\udce9.jpg", "a\rb\x07", "9.41\u202fAM", "\u202etxt.exe", "Bär 🐻"])
    assert str(error) == (
        "a \\x1b[2Jname\n  - caf\\udce9.jpg\n  - a\\rb\\x07\n  - 9.41\\u202fAM\n  - \\u202etxt.exe\n  - Bär 🐻"
    )
    assert pickle.loads(pickle.dumps(error)).problems == error.problems  # noqa: S301 - made one line above
    assert printable("two\nlines\tand a tab") == "two\nlines\tand a tab"


def test_a_long_line_keeps_its_beginning_and_its_remedy() -> None:
    line = printable("labels.csv line 3: found " + "x" * 10_000_000 + "; correct the line")
    assert len(line) < 2_000
    assert line.startswith("labels.csv line 3: found xxx")
    assert line.endswith("xxx; correct the line")
    assert " … 9,998,143 characters left out … " in line
    assert printable(line) == line
    many = "\n".join(["short"] * 1_000)
    assert printable(many) == many, "lines are cut, not texts"
