"""A bar with the time left, for commands that work in this process."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

from pipeline.cli.output import Output

if TYPE_CHECKING:
    from pipeline.cli.console import ConsoleProgress


@contextmanager
def shown_progress(output: Output, name: str) -> Iterator[ConsoleProgress]:
    """Progress on the console under ``name``; the bar is gone when ``with`` ends."""
    from pipeline.cli.console import ConsoleListener, ConsoleProgress, make_console

    listener = ConsoleListener(make_console(is_json=output.is_json), ())
    try:
        yield ConsoleProgress(listener, name)
    finally:
        listener.close()
