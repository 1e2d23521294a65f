"""Carry an error from the child process to the command: its kind, its text, all its problems.

Reads the variables whose values are kept secret.  What the machine did wrong (disk, memory, permission) becomes an
EnvironmentFailure; whatever else is not deliberate becomes an InternalFailure with its traceback.
"""

from __future__ import annotations

import errno
import os
import re
import traceback
from collections.abc import Mapping
from typing import Any

from stages import errors
from stages.errors import EnvironmentFailure, WsssError

_REMEDIES: Mapping[int, str] = {
    errno.ENOSPC: "the disk is full; free some space, then run the same command again: it continues",
    errno.EDQUOT: "the disk quota is used up; free some space, then run the same command again: it continues",
    errno.EACCES: "permission denied; change the permission or choose another folder with --artifacts DIR",
    errno.EPERM: "not permitted; change the permission or choose another folder with --artifacts DIR",
    errno.EROFS: "the file system is read-only; choose another folder with --artifacts DIR",
    errno.EMFILE: "too many open files; raise ulimit -n or lower runtime.workers and runtime.processes",
    errno.ENFILE: "too many open files on this machine; close other programs",
    errno.ENOMEM: "out of memory; lower runtime.processes, runtime.workers or the batch size",
    errno.EEXIST: "a file stands where a folder is needed; choose another path",
    errno.ENOTDIR: "a file stands where a folder is needed; choose another path",
    errno.EISDIR: "a folder stands where a file is needed; choose another path",
    errno.ENAMETOOLONG: "the path is too long; choose a shorter one",
    errno.EIO: "the disk failed; check it",
    errno.EAGAIN: "no more processes or memory; lower runtime.processes and runtime.workers",
}


class InternalFailure(WsssError):
    """A fault of ours: an exception that nobody foresaw.  Exit 1."""

    exit_code = 1

    def __init__(self, message: str, problems: tuple[str, ...] = (), *, trace: str = "") -> None:
        """Keep ``trace``, the traceback in the process where it happened."""
        super().__init__(message, problems)
        self.trace = trace


_SECRET_NAMES = re.compile(r"AUTH_STRING|PASSWORD|SECRET|TOKEN|_KEY$|CONNECTION_URL", re.IGNORECASE)
_HIDDEN = "***"


def hide_secrets(text: str) -> str:
    """Words of others (a library's error, a log) without the passwords in them.

    These are what a URL carries before its host, and the values of variables that are named like a secret.
    """
    text = re.sub(r"(\w://)[^/@\s'\"]*:[^@\s'\"]*@", rf"\1{_HIDDEN}@", text)
    for name, value in os.environ.items():
        if _SECRET_NAMES.search(name):
            words = value.partition("://")[2].rpartition("@")[0] if "://" in value else value
            user, _, password = words.partition(":")
            for secret in (f"{user}:{password}", password or user):
                if len(secret) >= 4:  # a shorter one stands in any text
                    text = text.replace(secret, _HIDDEN)
    return text


def deliberate(error: BaseException, doing: str) -> WsssError:
    """``error`` as one of the project's errors.

    Args:
        error: Anything that escaped.
        doing: What was being done, for the message ("make_masks").
    """
    if isinstance(error, WsssError):
        return error
    if errors.is_out_of_memory(error):
        where = f" ({error})" if str(error) else ""
        return EnvironmentFailure(
            f"{doing}: out of memory{where}; lower the batch size, runtime.processes or runtime.workers"
        )
    remedy = _REMEDIES.get(error.errno or 0) if isinstance(error, OSError) else None
    if remedy is not None and isinstance(error, OSError):
        path = error.filename2 or error.filename  # of a rename: the name that was wanted
        name = f"{path}: " if path else ""
        return EnvironmentFailure(f"{doing}: {name}{remedy}")
    text = "".join(traceback.format_exception(error))
    return InternalFailure(hide_secrets(f"{doing} failed: {type(error).__name__}: {error}"), trace=hide_secrets(text))


def to_message(error: WsssError) -> dict[str, Any]:
    """``error`` as JSON."""
    trace = error.trace if isinstance(error, InternalFailure) else ""
    return {"kind": type(error).__name__, "message": error.message, "problems": list(error.problems), "trace": trace}


def from_message(message: Mapping[str, Any]) -> WsssError:
    """The error that ``to_message`` described."""
    if message["kind"] == InternalFailure.__name__:
        return InternalFailure(message["message"], tuple(message["problems"]), trace=message["trace"])
    kind = getattr(errors, message["kind"], WsssError)
    return kind(message["message"], message["problems"])
