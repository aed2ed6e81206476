"""A file that appears whole or not at all: written beside its place, then moved there."""

from __future__ import annotations

import contextlib
import errno
import os
import platform
import re
import secrets
import time
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO

# File systems that have no way to flush; what was written is as safe there as anything is.
NO_FLUSH = {errno.EINVAL, errno.ENOSYS, errno.EOPNOTSUPP, errno.ENOTSUP}
DAY, HOUR = 86400.0, 3600.0
PART = re.compile(r"\.gendr-(?:([0-9a-f]{8})-(\d+)-)?[0-9a-f]{16}\.part")


@contextlib.contextmanager
def replacing(target: Path, before: Callable[[Path], None] | None = None) -> Iterator[IO[bytes]]:
    """A file to write; when the block ends without an error it takes the place of `target`.

    before: called with the finished file's path just before it is moved.
    """
    # The process is named, so that what it leaves when it is killed can be told from work.
    name = f".gendr-{_machine()}-{os.getpid()}-{secrets.token_hex(8)}.part"
    temporary = target.with_name(name)
    try:
        with temporary.open("xb") as file:
            yield file
            file.flush()
            flush_to_disk(file.fileno())
        if before is not None:
            before(temporary)
        os.replace(temporary, target)
    finally:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)


def flush_to_disk(descriptor: int) -> None:
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno not in NO_FLUSH:
            raise


def sweep(folder: Path) -> int:
    """Remove what killed processes left half written in `folder`; how many there were."""
    removed = 0
    try:
        names = [name for name in os.listdir(folder) if PART.fullmatch(name)]
    except OSError:
        return 0
    for name in names:
        path = folder / name
        with contextlib.suppress(OSError):
            if _abandoned(path):
                path.unlink()
                removed += 1
    return removed


def _abandoned(path: Path) -> bool:
    machine, process = PART.fullmatch(path.name).groups()
    idle = time.time() - path.stat().st_mtime
    if process is None:  # of a version that did not name its process
        return idle > HOUR
    if machine != _machine():
        return idle > DAY
    if int(process) == os.getpid():
        return False
    if os.name == "nt":  # where an open file cannot be removed, and signal 0 is no question
        return True
    try:
        os.kill(int(process), 0)
    except ProcessLookupError:
        return True
    except OSError:
        return idle > DAY
    return idle > DAY  # the number may have been given to another process since


def _machine() -> str:
    return f"{zlib.crc32(platform.node().encode()):08x}"
