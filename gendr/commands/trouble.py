"""What goes wrong with a picture, in one line for people."""

from __future__ import annotations

import errno
import unicodedata
from typing import Any

from .. import devices
from ..files.shapes import CheckpointError
from ..pictures import CutShortError, TooLargeError
from ..pictures.kinds import os_reason
from ..restoration import NotFinite

FULL = (errno.ENOSPC, getattr(errno, "EDQUOT", errno.ENOSPC))
FULL_DISK = "the disk is full; free some space, then --resume goes on"


def reason(error: Exception) -> str:
    """One line for people: what is wrong and, where it is known, what to do."""
    if isinstance(error, CheckpointError):  # says what to do itself, and `fold` has no --resume
        return str(error)
    if disk_full(error):
        return FULL_DISK
    if devices.is_oom(error):
        return "out of memory: choose a smaller --tile or --scale, or close other programs"
    if isinstance(error, CutShortError):
        return f"{error.problem}, or take what is there with --truncated"
    if isinstance(error, TooLargeError):
        return f"{error.problem}, or raise --max-pixels for a file that can be trusted"
    if isinstance(error, (ValueError, NotFinite)):
        return str(error)
    if isinstance(error, OSError):
        if error.errno == errno.ENAMETOOLONG:
            return f"the result's name is too long; choose a shorter --suffix or name: {error.filename}"
        if error.errno in (errno.EEXIST, errno.ENOTDIR):
            return f"a file is where a folder is needed: {error.filename}; choose another --output"
        return os_reason(error) + (f": {error.filename}" if error.filename else "")
    return f"unexpected {type(error).__name__}: {error}"


def plain(text: object) -> str:
    """Text on one line for a terminal: what would steer it is shown as an escape, `\\x1b`."""
    return "".join(c if _harmless(c) else repr(c)[1:-1] for c in str(text))


def _harmless(character: str) -> bool:
    # Joiners build letters and emoji; other formats turn the direction of what follows.
    kind = unicodedata.category(character)
    return kind[0] not in "CZ" or kind == "Zs" or kind == "Co" or character in "\u200c\u200d"


def blame(entry: dict[str, Any]) -> str:
    """The picture and the reason, the name once."""
    source, why = entry["input"], entry["reason"]
    return why if why.startswith(source) else f"{source}: {why}"


def unexpected(error: Exception) -> bool:
    return not (isinstance(error, (ValueError, OSError, NotFinite)) or devices.is_oom(error))


def disk_full(error: BaseException | None) -> bool:
    while error is not None:
        if isinstance(error, OSError) and error.errno in FULL:
            return True
        error = error.__cause__ or error.__context__
    return False
