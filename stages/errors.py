"""Every error that wsss raises on purpose.

    WsssError                     problems: one line each
    ├── InputError                the user's input is wrong                       exit 2
    │   ├── ConfigError           a key, type, range or name in a config
    │   ├── DataError             an image, label, list or mask of the data set
    │   └── WeightsError          a weight file that does not fit
    ├── MissingArtifactError      an input artifact is not in the store           exit 3
    ├── EnvironmentFailure        disk full, memory, server away, permission      exit 4
    └── DamagedFileError          a file of ours that does not read back          exit 4

Anything else that escapes is a fault of ours: exit 1.  An interrupt is exit 130.
A message says what was expected, what was found and what to do.
"""

from __future__ import annotations

from collections.abc import Iterable

_LONGEST_LINE = 2_000
"""Characters of a line of a message; what stands in the middle of a longer one is left out."""


def printable(text: str) -> str:
    r"""``text`` as a terminal can show it: ESC as ``\x1b``, bytes that are no text as ``\udce9``, no endless line.

    Names and contents of the user's files stand in messages, and a terminal obeys what it is sent.  Line ends and
    tabs stay.
    """
    text = "\n".join(map(_shortened, text.split("\n"))) if len(text) > _LONGEST_LINE else text
    if text.isprintable():
        return text
    return "".join(c if c.isprintable() or c in "\n\t" else c.encode("unicode_escape").decode() for c in text)


def _shortened(line: str) -> str:
    if len(line) <= _LONGEST_LINE:
        return line
    kept = _LONGEST_LINE // 2 - 50
    return f"{line[:kept]} … {len(line) - 2 * kept:,} characters left out … {line[-kept:]}"


class WsssError(Exception):
    """Base of all deliberate errors; carries every problem that was found, not only the first."""

    exit_code = 1

    def __init__(self, message: str, problems: Iterable[str] = ()) -> None:
        """Keep ``message`` as the headline and ``problems`` as one line each."""
        self.message = printable(message)
        self.problems: tuple[str, ...] = tuple(map(printable, problems))
        super().__init__(self.message)

    def __str__(self) -> str:
        """Headline, then the problems as a list."""
        return "\n".join([self.message, *(f"  - {problem}" for problem in self.problems)])

    def __reduce__(self) -> tuple[type[WsssError], tuple[str, tuple[str, ...]]]:
        """Survive the trip out of a worker process with all problems."""
        return type(self), (self.message, self.problems)


class InputError(WsssError):
    """The user's input is wrong; retrying without a change cannot help."""

    exit_code = 2


class ConfigError(InputError):
    """A key, type, range or name in a config is wrong."""


class DataError(InputError):
    """An image, label, list or mask of the data set is wrong."""


class WeightsError(InputError):
    """A weight file is missing or does not fit the network."""


class MissingArtifactError(WsssError):
    """A stage was asked for alone and an input of it is not in the store."""

    exit_code = 3


class EnvironmentFailure(WsssError):
    """The machine failed, not the input: disk, memory, permission, server."""

    exit_code = 4


class DamagedFileError(EnvironmentFailure):
    """A file that wsss wrote does not read back as it was written."""


_MEMORY_MARKS = (
    "DefaultCPUAllocator: ",  # torch on the CPU: a plain RuntimeError
    "(-4:Insufficient memory)",  # OpenCV: cv2.error
    ") is killed by signal: Killed",  # torch's DataLoader: the kernel ended a loading process
    ") is killed by signal: Bus error",  # the same: /dev/shm is full
)


def is_out_of_memory(error: BaseException) -> bool:
    """Whether Python, a CUDA device, torch or OpenCV on the CPU, or a loading process failed for want of memory.

    One of the project's own errors names its cause already, whatever it quotes.
    """
    if isinstance(error, WsssError):
        return False
    if isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError":
        return True
    return any(mark in str(error) for mark in _MEMORY_MARKS)
