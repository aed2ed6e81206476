"""JPEG: whether all of the picture is in the file, which the decoder does not tell.

Where entropy-coded data ends early, libjpeg goes on with flat grey and reports a mere warning.
"""

from __future__ import annotations

import io
import re
from typing import IO, NamedTuple

import numpy as np
from PIL import Image

MARKER = re.compile(rb"\xff+([^\x00\xd0-\xd7\xff])")
END = b"\xff\xd9"
FILLER = b"\x35\xa7\x5b\x12\xe9\x4c\x93\x6d" * 64
BLOCK = 18  # the last unit of coding, 16 pixels, and what smoothing its colour touches
RESTARTS = tuple(bytes([0xFF, 0xD0 + n]) for n in range(8))


class Facts(NamedTuple):
    """What the markers of the first picture in a file say.

    end: where its data ends, before the end marker if there is one.
    ended: whether there is one.
    least: bytes that its size needs at the very least.
    data: bytes of coded data.
    """

    end: int
    ended: bool
    least: int
    data: int


def facts(content: bytes) -> Facts | None:
    """None where the markers are not those of a picture; the decoder has its own words for that."""
    at, begin, least = 2, 0, 0
    try:
        while True:
            match = MARKER.search(content, at)
            if match is None:
                return Facts(len(content.rstrip(b"\xff")), False, least, len(content) - begin)
            code, at = match[1][0], match.end()
            if code == 0xD9:
                return Facts(match.start(), True, least, match.start() - begin)
            if code == 0x01 or code == 0xD8:
                continue
            length = int.from_bytes(content[at : at + 2], "big")
            if 0xC0 <= code <= 0xCF and code not in (0xC4, 0xC8, 0xCC):
                height = int.from_bytes(content[at + 3 : at + 5], "big")
                width = int.from_bytes(content[at + 5 : at + 7], "big")
                # One bit at least for each block of 8x8 by Huffman's code, whichever it is.
                least = height * width // 64 // 8 if code < 0xC8 else 0
            if code == 0xDA and not begin:
                begin = at
            at += max(2, length)
    except IndexError:
        return None


def prepared(file: IO[bytes], whole: bool) -> tuple[IO[bytes], Facts | None]:
    """The file with an end, and what its markers say. OSError where most of it cannot be there."""
    file.seek(0)
    content = file.read()
    told = facts(content)
    if told is None:
        file.seek(0)
        return file, None
    if whole and told.data < told.least:
        raise OSError(
            f"the size in its header needs {told.least} bytes of data at the least, and "
            f"{told.data} are there"
        )
    if not told.ended:
        content = content[: told.end] + END
    return io.BytesIO(content), told


def expect_whole(image: Image.Image, file: IO[bytes], told: Facts) -> None:
    """OSError where the decoder made up the last part of the image, which is loaded.

    What follows the data of a whole picture changes nothing; where data is missing, it is taken for
    it. So the file is decoded once more with something else behind it.
    """
    file.seek(0)
    content = file.read()[: told.end]
    # After a restart marker too, for which the decoder may look.
    more = FILLER + b"".join(marker + FILLER for marker in RESTARTS)
    with Image.open(io.BytesIO(content + more + END)) as other:
        other.load()
        changed = np.asarray(other) != np.asarray(image)
    if changed.ndim == 3:
        changed = changed.any(-1)
    if told.ended:
        # Some encoders leave out the last bits; every decoder forgives them that.
        changed[-BLOCK:, -BLOCK:] = False
    if changed.any():
        raise OSError("the data of its last rows is missing")
