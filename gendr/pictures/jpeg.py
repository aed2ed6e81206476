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
# The decoder takes bits that are missing for 0: what is to show that it asks for them begins with 1.
FILLER = b"\xca\x58\xa4\xed\x16\xb3\x6c\x92" * 64
BLOCK = 18  # the last unit of coding, 16 pixels, and what smoothing its colour touches
# Start of a frame whose scans bring coefficients, and those that bring them bit by bit; the bits that
# stay unknown of a coefficient that no scan has brought.
CODED, PROGRESSIVE, UNSEEN = (0xC0, 0xC1, 0xC2, 0xC9, 0xCA), (0xC2, 0xCA), 16
RESTARTS = tuple(bytes([0xFF, 0xD0 + n]) for n in range(8))


class Facts(NamedTuple):
    """What the markers of the first picture in a file say.

    end: where its data ends, before the end marker if there is one.
    ended: whether there is one.
    least: bytes that its size needs at the very least.
    data: bytes of coded data.
    missing: what no scan holds, in words; empty where all is there.
    """

    end: int
    ended: bool
    least: int
    data: int
    missing: str = ""


def facts(content: bytes) -> Facts | None:
    """None where the markers are not those of a picture; the decoder has its own words for that."""
    at, begin, least = 2, 0, 0
    precision: dict[int, list[int]] = {}
    progressive = False
    try:
        while True:
            match = MARKER.search(content, at)
            if match is None:
                end, missing = len(content.rstrip(b"\xff")), _missing(precision, progressive)
                return Facts(end, False, least, len(content) - begin, missing)
            code, at = match[1][0], match.end()
            if code == 0xD9:
                missing = _missing(precision, progressive)
                return Facts(match.start(), True, least, match.start() - begin, missing)
            if code == 0x01 or code == 0xD8:
                continue
            length = int.from_bytes(content[at : at + 2], "big")
            if 0xC0 <= code <= 0xCF and code not in (0xC4, 0xC8, 0xCC):
                height = int.from_bytes(content[at + 3 : at + 5], "big")
                width = int.from_bytes(content[at + 5 : at + 7], "big")
                # One bit at least for each block of 8x8 by Huffman's code, whichever it is.
                least = height * width // 64 // 8 if code < 0xC8 else 0
            if code in CODED:
                progressive = code in PROGRESSIVE
                ids = content[at + 8 : at + 8 + 3 * content[at + 7] : 3]
                precision = {number: [UNSEEN] * 64 for number in ids}
            if code == 0xDA:
                begin = begin or at
                _scan(content[at : at + length], precision, progressive)
            at += max(2, length)
    except IndexError:
        return None


def _scan(header: bytes, precision: dict[int, list[int]], progressive: bool) -> None:
    """Note which bits of which coefficients a scan brings (ITU-T T.81, B.2.3)."""
    count = header[2]
    first, last, bits = header[3 + 2 * count : 6 + 2 * count]
    band = range(first, min(last, 63) + 1) if progressive else range(64)
    for number in header[3 : 3 + 2 * count : 2]:
        for k in band:
            if number in precision:
                precision[number][k] = bits & 15 if progressive else 0


def _missing(precision: dict[int, list[int]], progressive: bool) -> str:
    unseen = sum(all(bits == UNSEEN for bits in found) for found in precision.values())
    if unseen:
        return f"{unseen} of its {len(precision)} channels have no data"
    if progressive and any(any(found) for found in precision.values()):
        return "the finer of its progressive scans are missing"
    return ""


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
    # A picture that ends so may have been saved so; one that does not end, or lacks a colour, not.
    if whole and told.missing and ("channels" in told.missing or not told.ended):
        raise OSError(told.missing)
    if not told.ended:
        content = content[: told.end] + END
    return io.BytesIO(content), told


def expect_whole(image: Image.Image, file: IO[bytes], told: Facts) -> list[str]:
    """OSError where the decoder made up the last part of the image, which is loaded; notes.

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
    notes = [f"{told.missing}; it may have been saved so"] if told.missing else []
    if told.ended and changed[-BLOCK:, -BLOCK:].any():
        # Some encoders leave out the last bits; every decoder forgives them that.
        changed[-BLOCK:, -BLOCK:] = False
        notes.append("its data ends early: the last pixels, at the lower right, may be made up")
    if changed.any():
        raise OSError("the data of its last rows is missing")
    return notes
