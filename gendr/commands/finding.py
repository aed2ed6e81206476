"""Words of a command line to files: folders, patterns, names with `~`, and what is passed over."""

from __future__ import annotations

import fnmatch
import functools
import os
import re
import unicodedata
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path

from PIL import Image

from ..pictures.kinds import CAMERA_RAW, os_reason
from . import video

# What a folder or a pattern is searched for; a file named by itself is tried whatever it is called.
PICTURES = (
    *(".png", ".jpg", ".jpeg", ".jpe", ".jfif", ".webp", ".tif", ".tiff", ".bmp", ".gif"),
    *(".ppm", ".pgm", ".pnm", ".pam", ".pfm", ".tga", ".avif", ".jp2"),
)
# Pictures and videos as well, which are not looked for: counted, so that nobody misses them in silence.
OTHERS = CAMERA_RAW | {
    *(".heic", ".heif", ".hif", ".jxl", ".exr", ".hdr", ".svg", ".ai", ".xcf", ".kra", ".raw"),
    *(".jxr", ".wdp", ".jpm", ".jpx", ".cr3", ".raf", ".apng", ".psb"),
}
MAGIC = re.compile(r"[*?\[]")


@dataclass
class Found:
    """What a word stands for.

    files: in a natural order. skipped: pictures of kinds that are not looked for, by ending.
    unread: folders that could not be read, and why.
    """

    files: list[Path] = field(default_factory=list)
    skipped: Counter = field(default_factory=Counter)
    unread: list[tuple[Path, str]] = field(default_factory=list)

    def consider(self, path: Path, wanted: bool = False) -> None:
        """A file that was come across; `wanted`: its ending was asked for."""
        ending = path.suffix.lower()
        if wanted or ending in PICTURES:
            # A pipe or a device is no picture; a broken link is told of when its turn comes.
            if os.path.isfile(path) or os.path.islink(path):
                self.files.append(path)
        elif ending in other_endings():
            self.skipped[ending] += 1


@functools.lru_cache
def other_endings() -> frozenset[str]:
    Image.init()
    return OTHERS | frozenset(video.SUFFIXES) | {e for e in Image.EXTENSION if e not in PICTURES}


def expand(text: str | os.PathLike[str]) -> Path:
    """A path with `~` for the home folder, unless there is something of that very name."""
    text = os.fspath(text)
    if text.startswith("~") and not os.path.lexists(text):
        return Path(os.path.expanduser(text))  # as it is where there is no such user
    return Path(text)


def in_folder(folder: Path, recursive: bool) -> Found:
    """The pictures of a folder; hidden ones are left out, links to folders are not followed."""
    found = Found()

    def note(error: OSError) -> None:
        found.unread.append((Path(error.filename or folder), os_reason(error)))

    for top, folders, names in os.walk(folder, onerror=note):
        folders[:] = sorted((f for f in folders if not f.startswith(".")), key=natural)
        for name in sorted((n for n in names if not n.startswith(".")), key=natural):
            found.consider(Path(top, name))
        if not recursive:
            break
    return found


def by_pattern(path: Path) -> Found:
    """The pictures that a pattern means: `*`, `?`, `[...]` in a name, `**` for folders at any depth.

    A part of the path that exists as it is written is that folder, whatever brackets it has. An
    ending that is written out is looked for even where folders are not searched for it.
    """
    found = Found()
    wanted = not MAGIC.search(path.suffix) and bool(path.suffix)
    parts = path.parts[len(Path(path.anchor).parts) :] if path.anchor else path.parts
    _descend(Path(path.anchor), list(parts), found, wanted)
    found.files = sorted(dict.fromkeys(found.files), key=natural)
    return found


def _descend(base: Path, parts: list[str], found: Found, wanted: bool) -> None:
    if not parts:
        if not os.path.isdir(base):
            found.consider(base, wanted)
        return
    part, rest = parts[0], parts[1:]
    if not MAGIC.search(part) or os.path.lexists(base / part):
        if os.path.lexists(base / part):
            _descend(base / part, rest, found, wanted)
        return
    try:
        entries = sorted(os.scandir(base), key=lambda entry: natural(entry.name))
    except OSError as error:
        if not isinstance(error, (FileNotFoundError, NotADirectoryError)):
            found.unread.append((base, os_reason(error)))
        return
    if part == "**":
        # Links are not followed: two that point up would never end.
        folders = [e for e in entries if e.is_dir(follow_symlinks=False)]
        _descend(base, rest or ["*"], found, wanted)
        for entry in folders:
            if not entry.name.startswith("."):
                _descend(base / entry.name, parts, found, wanted)
        return
    for entry in entries:
        hidden = entry.name.startswith(".") and not part.startswith(".")
        if not hidden and fnmatch.fnmatch(entry.name, part):
            _descend(base / entry.name, rest, found, wanted)


def identity(path: Path) -> object:
    """Equal for paths that are one and the same file: links resolved, and capitals where they do
    not count; two names of one content (hard links) are two."""
    real = os.path.realpath(path)
    try:
        status = os.stat(real)
    except OSError:
        return real
    return (status.st_dev, status.st_ino, folded(real)) if status.st_ino else real


def folded(path: str | os.PathLike[str]) -> str:
    """Equal for paths that some file system takes for one: capitals, and ways to write accents."""
    text = unicodedata.normalize("NFC", os.fspath(path)).casefold()
    return unicodedata.normalize("NFC", text)


def natural(path: str | os.PathLike[str]) -> list:
    """Sorting key that puts page 9 before page 10. Only 0 to 9 are digits: there is no number ②."""
    parts = re.split(r"([0-9]+)", os.fspath(path))
    return [
        (1, int(part), "") if index % 2 else (0, 0, part.casefold())
        for index, part in enumerate(parts)
    ]
