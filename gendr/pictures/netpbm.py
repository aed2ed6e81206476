"""Netpbm's PGM, PPM and PAM of any depth, and PFM (floating point). Bitmaps are left to Pillow."""

from __future__ import annotations

import re
from typing import IO

import numpy as np

from .values import Samples, floating

KINDS = (b"P2", b"P3", b"P5", b"P6", b"P7", b"Pf", b"PF")
MOST_HEADER = 2**16
SPACE = b" \t\n\v\f\r"


def is_ours(start: bytes) -> bool:
    return start[:2] in KINDS and start[2:3] in tuple(bytes([s]) for s in SPACE + b"#")


def size(file: IO[bytes]) -> tuple[int, int]:
    """Height and width. ValueError where the header is none."""
    return _header(file)[1:3]


def decode(file: IO[bytes], notes: list[str], whole: bool = True) -> Samples:
    """The first picture of the file."""
    kind, height, width, channels, top, begin = _header(file)
    file.seek(begin)
    count = height * width * channels
    if kind in (b"P2", b"P3"):
        words = re.sub(rb"#[^\r\n]*", b"", file.read()).split()[:count]
        values = np.array([int(word) for word in words], np.int64)
        kind_of = np.dtype(np.int64)
    else:
        if kind in (b"Pf", b"PF"):
            kind_of = np.dtype("<f4" if top < 0 else ">f4")
        else:
            kind_of = np.dtype("u1" if top < 256 else ">u2")
        data = file.read(count * kind_of.itemsize)
        values = np.frombuffer(data[: len(data) // kind_of.itemsize * kind_of.itemsize], kind_of)
    if len(values) < count:
        if whole:
            raise OSError(f"{len(values)} of {count} values are there")
        values = np.pad(values, (0, count - len(values)))
    values = values.reshape(height, width, channels)
    if kind_of.kind == "f":
        # Rows go from the bottom up.
        return Samples(*floating(values[::-1].astype(np.float32), notes), 32)
    if values.max() > top or values.min() < 0:
        notes.append(f"values outside 0 to {top:g} were clipped")
        values = np.clip(values, 0, top)
    bits = 8 if top < 256 else 16
    return Samples(values.astype(np.uint8 if bits == 8 else np.uint16), top, bits)


def _header(file: IO[bytes]) -> tuple[bytes, int, int, int, float, int]:
    """Kind, height, width, channels, white (the scale of PFM), and where the values begin."""
    file.seek(0)
    head = file.read(MOST_HEADER)
    kind = head[:2]
    if kind == b"P7":
        return _pam(head)
    words, at = [], 2
    while len(words) < 3:
        match = re.compile(rb"(?:[ \t\n\v\f\r]+|#[^\r\n]*)*([^ \t\n\v\f\r#]+)").match(head, at)
        if match is None:
            raise ValueError("its header is cut short")
        words.append(match[1])
        at = match.end()
    width, height = int(words[0]), int(words[1])
    channels = 3 if kind in (b"P3", b"P6", b"PF") else 1
    top = float(words[2])
    whole = kind not in (b"Pf", b"PF")
    _expect(width, height, channels, top if whole else 1)
    return kind, height, width, channels, top, at + 1


def _pam(head: bytes) -> tuple[bytes, int, int, int, float, int]:
    match = re.search(rb"^ENDHDR[ \t]*\n", head, re.MULTILINE)
    if match is None:
        raise ValueError("its header is cut short")
    facts: dict[bytes, int] = {}
    for line in head[: match.start()].splitlines():
        name, _, value = line.strip().partition(b" ")
        if name in (b"WIDTH", b"HEIGHT", b"DEPTH", b"MAXVAL"):
            facts[name] = int(value)
    try:
        width, height, channels = facts[b"WIDTH"], facts[b"HEIGHT"], facts[b"DEPTH"]
        top = float(facts[b"MAXVAL"])
    except KeyError as error:
        raise ValueError(f"its header lacks {error.args[0].decode()}") from error
    _expect(width, height, channels, top)
    return b"P7", height, width, channels, top, match.end()


def _expect(width: int, height: int, channels: int, top: float) -> None:
    if width < 1 or height < 1 or not 1 <= channels <= 4 or not 1 <= top <= 65535:
        raise ValueError(f"its header says {width}x{height}, {channels} channels, white at {top:g}")
