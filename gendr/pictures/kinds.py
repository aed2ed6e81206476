"""What a picture is in memory, what files can hold, and what both directions need to know."""

from __future__ import annotations

import errno
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from PIL import Image
from torch import Tensor

# As a picture in memory takes 12 bytes a pixel and its restoration at 4x sixteen times that, a
# file that claims more is a mistake or an attack.
MAX_PIXELS = 200_000_000
ORIENTATION, EXIF_IFD, GPS_IFD, INTEROP_IFD = 0x0112, 0x8769, 0x8825, 0xA005
MAKER_NOTE, PIXEL_WIDTH, PIXEL_HEIGHT = 0x927C, 0xA002, 0xA003
# How the pixels of one file are stored (TIFF keeps that among the EXIF tags), never those of the
# next; XMP and IPTC, which have fields of their own; Photoshop's blocks; and raw development.
STORAGE_TAGS = frozenset(
    {
        *range(254, 267),
        *(273, ORIENTATION, 277, 278, 279, 280, 281, 284, 297, 301),
        *range(288, 294),
        *range(317, 348),
        *range(512, 533),
        *(700, 33723, 34377, 34675, 37724),
        *range(50706, 51200),
    }
)
# TIFF inside, and Pillow would give the preview that they begin with.
CAMERA_RAW = frozenset(
    {".3fr", ".arw", ".cr2", ".dng", ".erf", ".iiq", ".nef", ".nrw", ".orf", ".pef", ".rw2", ".srw"}
)
ANIMATED = frozenset({"GIF", "WEBP", "AVIF", "FLI", "DCX"})
# Drawings, which Pillow hands to other programs or to the system.
VECTOR = frozenset({"EPS", "WMF", "PDF"})
BLACK_POINT_COMPENSATION = 0x2000  # LittleCMS's flag; older Pillows have no name for it
JPEG_EXIF_LIMIT = 65533 - 2


class PictureError(ValueError):
    """A file that cannot be read or written, and what to do about it."""


class CutShortError(PictureError):
    """A file of which a part is missing or damaged; `problem` is the message without the remedy."""

    def __init__(self, problem: str):
        self.problem = f"{problem}; get the file again"
        super().__init__(f"{self.problem}, or take what is there with truncated=True")


class TooLargeError(PictureError):
    """More pixels than the limit; `problem` is the message without the remedy."""

    def __init__(self, problem: str):
        self.problem = f"{problem}; reduce it first"
        super().__init__(f"{self.problem}, or raise max_pixels for a file that can be trusted")


@dataclass
class Picture:
    """A decoded file.

    pixels: 1 c h w float32 in [0, 1], upright; c is 1 grey, 2 grey and alpha, 3 RGB, 4 RGBA.
    bits: 8 per channel in the file, or 16 for anything deeper.
    exif, icc: as bytes, without orientation and thumbnail; an ICC profile of these pixels' colour
        space only.
    xmp, iptc: as bytes; an orientation in XMP is reset as well.
    dpi: pixels per inch, across and down.
    colour: chunks of a PNG that say what its numbers mean (gAMA, cHRM, sRGB, cICP): kind and data.
    text: text chunks as a PNG has them; a comment of another format is one with the keyword
        "Comment".
    frames: of the file; the pixels are the first one's.
    notes: what differs from the file, in sentences for a person.
    """

    pixels: Tensor
    bits: int = 8
    grey: bool = False
    exif: bytes | None = None
    icc: bytes | None = None
    xmp: bytes | None = None
    iptc: bytes | None = None
    dpi: tuple[float, float] | None = None
    colour: tuple[tuple[bytes, bytes], ...] = ()
    text: tuple[tuple[bytes, bytes], ...] = ()
    format: str = ""
    frames: int = 1
    path: Path | None = None
    notes: tuple[str, ...] = ()


class Format(NamedTuple):
    """What a kind of file can hold. size: bytes of samples."""

    suffixes: tuple[str, ...]
    alpha: bool
    bits: int
    side: int
    size: float = math.inf


# Sizes and places in a file are 32 bits in some formats; a little is left for what lies around.
FOUR_GB = 2**32 - 2**20
FORMATS = {
    "PNG": Format((".png",), alpha=True, bits=16, side=2**31 - 1),
    # The format has 16 bits for a side; the library behind Pillow stops a little earlier.
    "JPEG": Format((".jpg", ".jpeg", ".jpe", ".jfif"), alpha=False, bits=8, side=65500),
    "WEBP": Format((".webp",), alpha=True, bits=8, side=16383),
    "TIFF": Format((".tif", ".tiff"), alpha=True, bits=16, side=2**31 - 1, size=FOUR_GB),
    "BMP": Format((".bmp",), alpha=False, bits=8, side=2**31 - 1, size=FOUR_GB),
}


def strip_tags(tags: Image.Exif) -> None:
    for tag in STORAGE_TAGS.intersection(tags):
        del tags[tag]


def profile_fits(profile: Any, channels: int) -> bool:
    """Whether an ICC profile is one, and for this many channels."""
    if not isinstance(profile, bytes) or len(profile) < 128 or profile[36:40] != b"acsp":
        return False
    return profile[16:20] == (b"GRAY" if channels < 3 else b"RGB ")


def os_reason(error: OSError) -> str:
    known = {
        errno.EACCES: "permission denied",
        errno.EPERM: "permission denied",
        errno.EROFS: "it lies on a read-only disk",
        errno.ENOSPC: "the disk is full; free some space",
        errno.EDQUOT: "your share of the disk is full; free some space",
        errno.EFBIG: "it is larger than that disk allows files to be; choose another place",
        errno.EIO: "the disk reports a fault (input/output error); check it",
        errno.EMFILE: "too many files are open; allow more with `ulimit -n`",
        errno.ENAMETOOLONG: "the name is too long; shorten it",
    }
    return known.get(error.errno, error.strerror or str(error))
