"""Files that appear whole or not at all."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def replacing(path: Path, *, flush: bool = False) -> Iterator[Path]:
    """A path to write to, which takes the place of `path` once the block has ended without an error.

    After an error nothing is left of it, and `path` is as it was. The file gets the mode that new
    files get here, whatever its writer gave it. flush: have it on the disk first, for files that
    must outlive a loss of power.
    """
    path = Path(path)
    part = path.with_name(f"{path.name}.part")
    try:
        yield part
        os.chmod(part, 0o666 & ~_mask())
        if flush:
            with part.open("rb") as file:
                os.fsync(file.fileno())
        os.replace(part, path)
    except BaseException:
        part.unlink(missing_ok=True)
        raise


def write_text(path: Path, text: str) -> None:
    """A text file in UTF-8."""
    with replacing(path) as part:
        part.write_text(text, encoding="utf-8")


def _mask() -> int:
    # There is no way to ask for it but to set it.
    mask = os.umask(0)
    os.umask(mask)
    return mask
