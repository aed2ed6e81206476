"""Files that appear whole or not at all, and a sentence where they can't."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from safetensors import SafetensorError

# What torch says where a file of its own can't be written to its end; it gives no number.
TORCH_WRITER = ("PytorchStreamWriter", "inline_container", "unexpected pos")


class NotWritten(OSError, ValueError):
    """A file that can't be written: a full disk, a closed folder. The message says which and what to do."""


@contextmanager
def writing(path: Path) -> Iterator[None]:
    """Whatever keeps this file from being written becomes `NotWritten`."""
    try:
        yield
    except (NotWritten, BrokenPipeError):
        raise
    except (OSError, RuntimeError, SafetensorError) as error:
        if type(error) is RuntimeError and not any(word in str(error) for word in TORCH_WRITER):
            raise
        told = str(error).strip().splitlines() or [type(error).__name__]
        raise NotWritten(
            f"{path} can't be written ({getattr(error, 'strerror', None) or told[0]}): make room or "
            "choose another folder; what was saved before is as it was, and the same command goes on "
            "from there"
        ) from error


@contextmanager
def replacing(path: Path, *, flush: bool = False) -> Iterator[Path]:
    """A path to write to, which takes the place of `path` once the block has ended without an error.

    After an error nothing is left of it, and `path` is as it was; `NotWritten` where it was the disk.
    The file gets the mode that new files get here, whatever its writer gave it. flush: have it on
    the disk first, for files that must outlive a loss of power.
    """
    path = Path(path)
    part = path.with_name(f"{path.name}.part")
    try:
        with writing(path):
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


def program(name: str, main: Callable[[], int | None]) -> int:
    """A program's exit code; where something can't be written or read, its sentence and 1."""
    try:
        return main() or 0
    except OSError as error:
        if isinstance(error, BrokenPipeError):
            raise
        where = f": {error.filename}" if error.filename else ""
        print(f"{name}: {f'{error.strerror}{where}' if error.strerror else error}", file=sys.stderr)
        return 1


def _mask() -> int:
    # There is no way to ask for it but to set it.
    mask = os.umask(0)
    os.umask(mask)
    return mask
