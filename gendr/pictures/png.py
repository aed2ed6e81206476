"""PNG (ISO/IEC 15948), chunk by chunk: metadata that Pillow refuses or drops, 16 bits, whole rows."""

from __future__ import annotations

import io
import struct
import zlib
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import IO

import numpy as np

from .kinds import PictureError

SIGNATURE = b"\x89PNG\r\n\x1a\n"
# What the pixels' numbers mean; a profile (iCCP) has a place of its own.
COLOUR = (b"cICP", b"sRGB", b"gAMA", b"cHRM", b"mDCV", b"cLLI", b"mDCv", b"cLLi")
TEXT = (b"tEXt", b"zTXt", b"iTXt")
XMP_KEYWORD = b"XML:com.adobe.xmp"
# Written by ImageMagick and others where EXIF has no chunk: hexadecimal digits below three lines.
RAW_PROFILES = {b"Raw profile type exif": "exif", b"Raw profile type xmp": "xmp"}
RAW_PROFILES |= {b"Raw profile type APP1": "exif", b"Raw profile type iptc": "iptc"}
# Metadata that is unpacked may be this long; a bomb ends there.
MOST_UNPACKED = 2**26
# Text that Pillow unpacks, and what is stored as it is instead.
MOST_PACKED, MOST_PLAIN = 2**20 - 2**10, 2**24
CHANNELS = {0: 1, 2: 3, 3: 1, 4: 2, 6: 4}
ADAM7 = ((0, 0, 8, 8), (0, 4, 8, 8), (4, 0, 8, 4), (0, 2, 4, 4), (2, 0, 4, 2), (0, 1, 2, 2))
ADAM7 += ((1, 0, 2, 1),)

Chunk = tuple[bytes, bytes]


@dataclass
class Facts:
    """A PNG without its pixels: sizes, and the metadata as it is stored."""

    width: int = 0
    height: int = 0
    depth: int = 8
    colour_type: int = 2
    interlaced: bool = False
    frames: int = 1
    key: int | None = None  # the transparent grey, as 8 bits where there are fewer
    exif: bytes | None = None
    icc: bytes | None = None
    xmp: bytes | None = None
    iptc: bytes | None = None
    dpi: tuple[float, float] | None = None
    colour: list[Chunk] = field(default_factory=list)
    text: list[Chunk] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)


def parse(file: IO[bytes], pixels: bool = True) -> tuple[IO[bytes], Facts]:
    """The file with nothing but its pixels, for Pillow, and everything else.

    pixels: False leaves them out, to learn the facts alone.
    A chunk of metadata whose checksum is wrong is left out, and a note says so.
    """
    facts = Facts()
    clean = io.BytesIO()
    clean.write(SIGNATURE)
    file.seek(len(SIGNATURE))
    animated, begun, controls = 0, False, 0
    while True:
        head = file.read(8)
        if len(head) < 8:
            break
        length, kind = struct.unpack(">I4s", head)
        if kind == b"CgBI":
            raise PictureError(
                "is a PNG for iOS apps, which other programs cannot read; save it with Apple's Preview, or "
                "`pngcrush -revert-iphone-optimizations`"
            )
        if kind == b"IDAT" and not pixels:
            file.seek(length + 4, io.SEEK_CUR)
            continue
        data = file.read(length)
        check = file.read(4)
        ancillary = bool(kind[0] & 0x20)
        if not ancillary:
            begun |= kind == b"IDAT"
            if kind == b"IHDR" and len(data) == 13:
                facts.width, facts.height, facts.depth, facts.colour_type = struct.unpack(
                    ">IIBB", data[:10]
                )
                facts.interlaced = bool(data[12])
            clean.write(head + data + check)
            if kind == b"IEND":
                break
            continue
        if len(data) < length or len(check) < 4:
            break
        # Whatever is packed proves itself by a checksum of its own.
        if kind != b"iCCP" and struct.unpack(">I", check)[0] != zlib.crc32(data, zlib.crc32(kind)):
            facts.notes.append(f"{kind.decode('latin-1')} left out: its checksum is wrong")
            continue
        if kind == b"tRNS":
            clean.write(head + data + check)
            if facts.colour_type == 0 and facts.depth < 8 and len(data) >= 2:
                most = 2**facts.depth - 1
                facts.key = (struct.unpack(">H", data[:2])[0] & most) * (255 // most)
        elif kind == b"acTL" and len(data) == 8:
            animated = struct.unpack(">I", data[:4])[0]
        elif kind == b"fcTL":
            controls += not begun
        else:
            _metadata(facts, kind, data)
    # A picture that is shown only where animations are not comes before the frames.
    facts.frames = max(1, animated + (animated > 0 and not controls))
    clean.seek(0)
    return clean, facts


def _metadata(facts: Facts, kind: bytes, data: bytes) -> None:
    if kind in COLOUR:
        facts.colour.append((kind, data))
    elif kind == b"pHYs" and len(data) == 9:
        x, y, unit = struct.unpack(">IIB", data)
        if unit == 1 and x and y:
            facts.dpi = x * 0.0254, y * 0.0254
        elif unit == 0 and x != y:  # the shape of a pixel, without its size
            facts.colour.append((kind, data))
    elif kind == b"eXIf":
        facts.exif = data
    elif kind == b"iCCP":
        name, _, packed = data.partition(b"\0")
        facts.icc = _unpacked(packed[1:]) if packed[:1] == b"\0" else None
        if facts.icc is not None and len(facts.icc) >= 128:
            # What follows the length in its header is no part of it.
            facts.icc = facts.icc[: max(128, int.from_bytes(facts.icc[:4], "big"))]
        if facts.icc is None:
            facts.notes.append("its colour profile is damaged and was left out")
    elif kind in TEXT:
        keyword = data.partition(b"\0")[0]
        if keyword == XMP_KEYWORD and kind == b"iTXt":
            facts.xmp = text_bytes(kind, data)
            if facts.xmp is None:
                facts.notes.append("its XMP is damaged and was left out")
        elif keyword in RAW_PROFILES and (profile := _raw_profile(text_bytes(kind, data))):
            name = RAW_PROFILES[keyword]
            if getattr(facts, name) is None:
                setattr(facts, name, profile)
        else:
            facts.text.append((kind, data))


def _unpacked(data: bytes) -> bytes | None:
    """None where that fails, or what comes out is absurd."""
    try:
        unpacker = zlib.decompressobj()
        out = unpacker.decompress(data, MOST_UNPACKED)
    except zlib.error:
        return None
    return out if unpacker.eof else None


def text_bytes(kind: bytes, data: bytes) -> bytes | None:
    """What a text chunk says: Latin-1, or UTF-8 of an iTXt. None where it cannot be unpacked."""
    _, _, rest = data.partition(b"\0")
    if kind == b"tEXt":
        return rest
    if kind == b"zTXt":
        return _unpacked(rest[1:])
    packed, rest = rest[:1] == b"\1", rest[2:]
    _, _, rest = rest.partition(b"\0")  # the language
    _, _, rest = rest.partition(b"\0")  # the keyword in it
    return _unpacked(rest) if packed else rest


def text_of(chunk: Chunk) -> tuple[str, str]:
    """Keyword and text."""
    kind, data = chunk
    said = text_bytes(kind, data) or b""
    keyword = data.partition(b"\0")[0].decode("latin-1")
    return keyword, said.decode("utf-8" if kind == b"iTXt" else "latin-1", "replace")


def text_chunk(keyword: str, text: str) -> Chunk:
    """The chunk that says this."""
    name = keyword.encode("latin-1", "replace") + b"\0"
    try:
        return b"tEXt", name + text.encode("latin-1")
    except UnicodeEncodeError:
        return b"iTXt", name + b"\0\0\0\0" + text.encode()


def read_widely(chunk: Chunk) -> Chunk:
    """The same text without packing where it is long: some readers take that for a bomb."""
    kind, data = chunk
    if kind == b"tEXt":
        return chunk
    text = text_bytes(kind, data)
    if text is None or not MOST_PACKED < len(text) <= MOST_PLAIN:
        return chunk
    keyword, _, rest = data.partition(b"\0")
    if kind == b"zTXt":
        return b"tEXt", keyword + b"\0" + text
    language, translated, _ = rest[2:].split(b"\0", 2)
    return kind, b"\0".join([keyword, b"\0" + language, translated, text])


def _raw_profile(said: bytes | None) -> bytes | None:
    try:
        return bytes.fromhex("".join((said or b"").decode("ascii").strip("\n").split("\n")[2:]))
    except ValueError:
        return None


def expect_rows(facts: Facts, clean: IO[bytes]) -> None:
    """OSError where fewer rows are stored than the header says: Pillow leaves them black."""
    bits = facts.depth * CHANNELS.get(facts.colour_type, 1)
    passes = ADAM7 if facts.interlaced else ((0, 0, 1, 1),)
    expected = 0
    for top, left, down, across in passes:
        rows = -(-(facts.height - top) // down) if facts.height > top else 0
        columns = -(-(facts.width - left) // across) if facts.width > left else 0
        expected += rows * (1 + -(-columns * bits // 8)) if columns else 0
    unpacker, found = zlib.decompressobj(), 0
    clean.seek(len(SIGNATURE))
    try:
        while found < expected and len(head := clean.read(8)) == 8:
            length, kind = struct.unpack(">I4s", head)
            data = clean.read(length)
            clean.seek(4, io.SEEK_CUR)
            while kind == b"IDAT" and data and found < expected and not unpacker.eof:
                found += len(unpacker.decompress(data, 2**22))
                data = unpacker.unconsumed_tail
            # What is still inside comes without more input.
            while (
                kind == b"IDAT" and found < expected and (more := unpacker.decompress(b"", 2**22))
            ):
                found += len(more)
    except zlib.error:
        pass
    if found < expected:
        raise OSError(f"{found} of {expected} bytes of its rows are there")


# Writing


def pack(kind: bytes, data: bytes) -> bytes:
    check = zlib.crc32(data, zlib.crc32(kind))
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", check)


def metadata(
    *,
    icc: bytes | None = None,
    exif: bytes | None = None,
    xmp: bytes | None = None,
    dpi: tuple[float, float] | None = None,
    more: Iterable[Chunk] = (),
) -> list[Chunk]:
    """The chunks between the header and the pixels; more: those that are stored as they are."""
    chunks = list(more)
    if icc:
        chunks.append((b"iCCP", b"ICC profile\0\0" + zlib.compress(icc)))
    if dpi:
        x, y = (max(1, min(2**31 - 1, round(value / 0.0254))) for value in dpi)
        chunks.append((b"pHYs", struct.pack(">IIB", x, y, 1)))
    if exif:
        chunks.append((b"eXIf", exif.removeprefix(b"Exif\0\0")))
    if xmp:
        chunks.append((b"iTXt", XMP_KEYWORD + b"\0\0\0\0\0" + xmp))
    return chunks


class Inserting(io.RawIOBase):
    """Hands a PNG on to `file` and puts chunks behind its header, whoever encodes it."""

    HEADER = len(SIGNATURE) + 4 + 4 + 13 + 4

    def __init__(self, file: IO[bytes], chunks: Iterable[Chunk]):
        self.file, self.chunks, self.written = file, list(chunks), 0

    def writable(self) -> bool:
        return True

    def write(self, data: bytes) -> int:
        data = bytes(data)
        before = max(0, self.HEADER - self.written)
        self.file.write(data[:before])
        self.written += len(data)
        if self.written >= self.HEADER and self.chunks:
            for kind, content in self.chunks:
                self.file.write(pack(kind, content))
            self.chunks = []
        self.file.write(data[before:])
        return len(data)


def encode_wide(file: IO[bytes], values: np.ndarray, chunks: Iterable[Chunk]) -> None:
    """PNG of 16 bits, h w c uint16: Pillow writes 16 bits of grey alone."""
    height, width, channels = values.shape
    file.write(SIGNATURE)
    colour_type = {1: 0, 2: 4, 3: 2, 4: 6}[channels]
    file.write(pack(b"IHDR", struct.pack(">IIBBBBB", width, height, 16, colour_type, 0, 0, 0)))
    for kind, data in chunks:
        file.write(pack(kind, data))
    packer = zlib.compressobj(6)
    pixel = 2 * channels
    above = np.zeros(width * pixel, np.uint8)
    rows = max(1, 2**20 // (width * pixel))
    for top in range(0, height, rows):
        big = values[top : top + rows].astype(">u2")
        band = big.view(np.uint8).reshape(len(big), width * pixel)
        data = packer.compress(filtered(band, above, pixel).tobytes())
        above = band[-1]
        if data:
            file.write(pack(b"IDAT", data))
    file.write(pack(b"IDAT", packer.flush()))
    file.write(pack(b"IEND", b""))


def filtered(rows: np.ndarray, above: np.ndarray, pixel: int) -> np.ndarray:
    """PNG rows with their filter byte: of the five filters the one with the smallest differences.

    rows: n m uint8; above: the row before them, m; pixel: bytes of a pixel.
    """
    up = np.vstack([above[None], rows[:-1]])
    left, corner = np.zeros_like(rows), np.zeros_like(rows)
    left[:, pixel:], corner[:, pixel:] = rows[:, :-pixel], up[:, :-pixel]
    a, b, c = (plane.astype(np.int16) for plane in (left, up, corner))
    to_a, to_b, to_c = np.abs(b - c), np.abs(a - c), np.abs(a + b - 2 * c)
    nearest = np.where((to_a <= to_b) & (to_a <= to_c), left, np.where(to_b <= to_c, up, corner))
    guesses = (np.zeros_like(rows), left, up, ((a + b) >> 1).astype(np.uint8), nearest)
    out = np.empty((len(rows), rows.shape[1] + 1), np.uint8)
    least = np.full(len(rows), np.iinfo(np.int64).max)
    for number, guess in enumerate(guesses):
        difference = rows - guess
        # Bytes as signed numbers: 255 is a difference of one.
        cost = np.abs(difference.view(np.int8).astype(np.int16)).sum(1, dtype=np.int64)
        better = cost < least
        out[better, 0], out[better, 1:] = number, difference[better]
        least = np.minimum(least, cost)
    return out
