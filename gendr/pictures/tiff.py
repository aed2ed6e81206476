"""TIFF 6.0 and BigTIFF: the page to read, and the layouts of samples that Pillow lacks or misreads.

Pillow reads 8-bit pictures and everything with colours to convert. Here are wider, signed and
floating-point samples, odd depths such as 12 bits, and channels that are stored one after the other.
"""

from __future__ import annotations

import contextlib
import io
import struct
import zlib
from typing import IO, Any

import numpy as np
from PIL import Image, TiffImagePlugin

from . import modes
from .kinds import PictureError
from .values import Samples, divided_by_alpha, floating, signed, unsigned

STARTS = (b"II*\0", b"MM\0*", b"II+\0", b"MM\0+")
SUBFILE, OLD_SUBFILE, SUB_DIRECTORIES = 254, 255, 330
WIDTH, HEIGHT, BITS, COMPRESSION, PHOTOMETRIC, FILL_ORDER = 256, 257, 258, 259, 262, 266
STRIPS, CHANNELS, ROWS, STRIP_BYTES, PLANAR = 273, 277, 278, 279, 284
PREDICTOR, TILE_WIDTH, TILE_HEIGHT, TILES, TILE_BYTES = 317, 322, 323, 324, 325
EXTRA, FORMAT, ICC = 338, 339, 34675
NONE, LZW, DEFLATE, OLD_DEFLATE, PACKBITS, LZMA, ZSTD = 1, 5, 8, 32946, 32773, 34925, 50000
LOSSLESS = (NONE, LZW, DEFLATE, OLD_DEFLATE, PACKBITS, LZMA, ZSTD)
MIN_IS_WHITE, MIN_IS_BLACK, RGB, CMYK = 0, 1, 2, 5
UNSIGNED, SIGNED, FLOAT, UNDEFINED = 1, 2, 3, 4
MOST_PAGES = 10_000
REVERSED = bytes(int(f"{byte:08b}"[::-1], 2) for byte in range(256))


class Page:
    """One directory of a TIFF file: its place, its tags, and what they say about the picture."""

    def __init__(self, file: IO[bytes], offset: int):
        file.seek(0)
        header = file.read(16)
        self.endian = "<" if header[:2] == b"II" else ">"
        self.big = 43 in header[2:4]
        self.tags = TiffImagePlugin.ImageFileDirectory_v2(header if self.big else header[:8])
        self.offset = offset or self.tags.next
        file.seek(self.offset)
        self.tags.load(file)
        self.next = self.tags.next

    def first(self, tag: int, default: Any = None) -> Any:
        value = self.tags.get(tag, default)
        return value[0] if isinstance(value, tuple) and value else value

    def all(self, tag: int) -> tuple[Any, ...]:
        value = self.tags.get(tag, ())
        return value if isinstance(value, tuple) else (value,)

    @property
    def aside(self) -> bool:
        """A thumbnail or a mask, not the picture."""
        return bool(self.first(SUBFILE, 0) & 0b101) or self.first(OLD_SUBFILE) == 2

    @property
    def pixels(self) -> int:
        return int(self.first(WIDTH, 0)) * int(self.first(HEIGHT, 0))


def choose(file: IO[bytes], notes: list[str]) -> tuple[Page, int]:
    """The page that holds the picture, and the number of pages that are pictures."""
    pages = [Page(file, 0)]
    seen, offset = {pages[0].offset}, pages[0].next
    while offset and offset not in seen and len(pages) < MOST_PAGES:
        seen.add(offset)
        try:
            pages.append(Page(file, offset))
        # A later page is damaged: the first one is all that is wanted.
        except Exception:
            break
        offset = pages[-1].next
    whole = [page for page in pages if not page.aside]
    if whole:
        if whole[0] is not pages[0]:
            notes.append("the picture was read, not the thumbnail that comes before it")
        return whole[0], len(whole)
    # Cameras and slide scanners: the picture lies in a directory of its own below the thumbnail.
    below = []
    for place in pages[0].all(SUB_DIRECTORIES):
        with contextlib.suppress(Exception):
            below.append(Page(file, int(place)))
    # Where every page calls itself a thumbnail, the largest is the picture.
    largest = max([*pages, *(page for page in below if not page.aside)], key=lambda p: p.pixels)
    if largest is not pages[0]:
        notes.append("the picture was read, not the thumbnail that comes before it")
    return largest, 1


def at(file: IO[bytes], page: Page) -> IO[bytes]:
    """The file as if it began with this page."""
    kind, place = page.endian + ("Q" if page.big else "I"), 8 if page.big else 4
    file.seek(0)
    if struct.unpack_from(kind, file.read(16), place)[0] == page.offset:
        return file
    file.seek(0)
    data = bytearray(file.read())
    struct.pack_into(kind, data, place, page.offset)
    return io.BytesIO(bytes(data))


def readable(page: Page) -> bool:
    """Whether `decode` is for this page; everything else is Pillow's."""
    return _Layout(page).ours


def left_out(count: int, notes: list[str]) -> None:
    """A note about channels that are neither colours nor alpha."""
    if count > 0:
        notes.append(f"{count} further channel{'s' * (count > 1)} of the file left out")


def unread(page: Page, channels: int) -> int:
    """How many channels of grey or RGB Pillow left out, which gave so many."""
    plain = page.first(PHOTOMETRIC, 0) in (MIN_IS_WHITE, MIN_IS_BLACK, RGB)
    return int(page.first(CHANNELS, 1)) - channels if plain else 0


def decode(file: IO[bytes], page: Page, notes: list[str], whole: bool = True) -> Samples:
    """The page's samples.

    whole: a strip that is cut short is an error; otherwise what is missing is 0.
    """
    layout = _Layout(page)
    layout.check()
    values = layout.read(file, whole)
    bits, sort = layout.bits, layout.format
    colours = layout.colours
    extra = page.all(EXTRA)
    kept = list(range(colours))
    alpha = next((n for n, kind in enumerate(extra) if kind in (1, 2, 999)), None)
    if not extra and layout.channels == colours + 1 and layout.photometric != CMYK:
        alpha = 0
    if alpha is not None and colours + alpha < layout.channels:
        kept.append(colours + alpha)
    left_out(layout.channels - len(kept), notes)
    values = values[..., kept]

    if layout.photometric == CMYK:
        return _from_cmyk(page, values, bits, notes)
    if sort == FLOAT:
        values, white = floating(values, notes, colours)
    elif sort == SIGNED:
        values, white = signed(values, bits, notes)
    else:
        values, white = unsigned(values, bits, notes)
    if layout.photometric == MIN_IS_WHITE:
        values = values.copy()
        values[..., :colours] = white - values[..., :colours].astype(np.float64)
    if alpha is not None and extra and extra[alpha] == 1:
        values = divided_by_alpha(values, white)
    return Samples(values, white, bits)


def _from_cmyk(page: Page, values: np.ndarray, bits: int, notes: list[str]) -> Samples:
    if bits == 16:
        values = (values >> 8).astype(np.uint8)
        notes.append("16 bits per channel were read as 8")
    image = Image.fromarray(np.ascontiguousarray(values), "CMYK")
    image.info["icc_profile"] = profile(page)
    return Samples(np.asarray(modes.managed(image, notes)), 255, 8, converted=True)


class _Layout:
    """How the samples of a page are stored."""

    def __init__(self, page: Page):
        self.page = page
        self.width, self.height = int(page.first(WIDTH, 0)), int(page.first(HEIGHT, 0))
        self.channels = int(page.first(CHANNELS, 1))
        self.depths = page.all(BITS) or (1,)
        self.bits = int(self.depths[0])
        self.formats = page.all(FORMAT) or (UNSIGNED,)
        self.format = int(self.formats[0])
        self.photometric = int(page.first(PHOTOMETRIC, MIN_IS_WHITE))
        self.compression = int(page.first(COMPRESSION, NONE))
        self.planar = int(page.first(PLANAR, 1)) == 2 and self.channels > 1
        self.order = page.endian
        self.colours = {RGB: 3, CMYK: 4}.get(self.photometric, 1)

    @property
    def ours(self) -> bool:
        if self.compression not in LOSSLESS or self.width < 1 or self.height < 1:
            return False
        plain = self.format in (UNSIGNED, UNDEFINED) and not self.planar
        if self.photometric == CMYK:
            return (self.planar or self.bits == 16) and self.bits in (8, 16)
        if self.photometric not in (MIN_IS_WHITE, MIN_IS_BLACK, RGB):
            return False
        if self.photometric != RGB and self.channels == 1 and self.bits in (1, 2, 4, 8):
            return not plain
        # Two or more extra channels, or of meanings that Pillow has no word for.
        simple = self.channels - self.colours <= 1
        return not (plain and self.bits == 8 and simple)

    def check(self) -> None:
        """PictureError for what no rule of this file covers."""
        if len(set(self.depths)) > 1:
            depths = ", ".join(map(str, self.depths))
            raise PictureError(
                f"is a TIFF whose channels differ in depth ({depths} bits); save it with 8 or 16 "
                "bits per channel"
            )
        known = {
            UNSIGNED: range(1, 33),
            UNDEFINED: range(1, 33),
            SIGNED: (8, 16, 32),
            FLOAT: (16, 32, 64),
        }
        if len(set(self.formats)) > 1 or self.bits not in known.get(self.format, ()):
            raise PictureError(
                f"is a TIFF of {self.bits}-bit samples of a format that is not read (SampleFormat "
                f"{self.format}); save it with 8 or 16 bits per channel"
            )
        if self.channels < self.colours or self.channels > 64:
            raise PictureError(f"is a TIFF with {self.channels} channels, which is no picture")

    def read(self, file: IO[bytes], whole: bool) -> np.ndarray:
        """All strips or tiles: h w c."""
        page = self.page
        tiled = TILES in page.tags
        offsets = page.all(TILES if tiled else STRIPS)
        counts = page.all(TILE_BYTES if tiled else STRIP_BYTES)
        across = int(page.first(TILE_WIDTH)) if tiled else self.width
        down = int(page.first(TILE_HEIGHT) if tiled else page.first(ROWS, self.height))
        if not tiled:
            down = min(down, self.height)
        if across < 1 or down < 1:
            raise OSError("its strips or tiles have no size")
        columns, rows = -(-self.width // across), -(-self.height // down)
        planes, depth = (self.channels, 1) if self.planar else (1, self.channels)
        if len(offsets) < columns * rows * planes and whole:
            raise OSError(f"{len(offsets)} of {columns * rows * planes} parts are there")
        out = np.zeros((self.height, self.width, self.channels), self.dtype)
        for number, offset in enumerate(offsets[: columns * rows * planes]):
            plane, rest = divmod(number, columns * rows)
            top, left = rest // columns * down, rest % columns * across
            # Only a strip is shorter at the lower edge; tiles are stored whole.
            height = down if tiled else min(down, self.height - top)
            file.seek(int(offset))
            raw = file.read(int(counts[number])) if number < len(counts) else file.read()
            part = self.part(raw, height, across, depth, whole)
            part = part[: self.height - top, : self.width - left]
            channel = slice(plane, plane + 1) if self.planar else slice(None)
            out[top : top + part.shape[0], left : left + part.shape[1], channel] = part
        return out

    @property
    def dtype(self) -> np.dtype:
        """Of the samples in memory."""
        if self.format == FLOAT:
            return np.dtype(f"f{self.bits // 8}")
        size = next(size for size in (1, 2, 4) if self.bits <= 8 * size)
        return np.dtype(f"{'i' if self.format == SIGNED else 'u'}{size}")

    def part(self, raw: bytes, height: int, width: int, depth: int, whole: bool) -> np.ndarray:
        """A strip or tile: height width depth."""
        line = -(-width * depth * self.bits // 8)
        size = line * height
        data = self.unpacked(raw, line, height)
        if len(data) < size:
            if whole:
                raise OSError(f"a part has {len(data)} of {size} bytes")
            data = data.ljust(size, b"\0")
        data = data[:size]
        predictor = int(self.page.first(PREDICTOR, 1)) if self.compression != PACKBITS else 1
        if predictor == 3:
            return self.from_float_predictor(data, height, width, depth)
        values = self.numbers(data, height, width * depth).reshape(height, width, depth)
        if predictor == 2:
            # Differences modulo the sample's size, of floats too, whose bits are meant.
            whole_numbers = np.dtype(f"u{values.dtype.itemsize}")
            sums = np.cumsum(values.view(whole_numbers), axis=1, dtype=whole_numbers)
            values = sums.view(values.dtype)
        return values

    def unpacked(self, raw: bytes, line: int, height: int) -> bytes:
        if int(self.page.first(FILL_ORDER, 1)) == 2:
            raw = raw.translate(REVERSED)
        if self.compression == NONE:
            return raw
        if self.compression in (DEFLATE, OLD_DEFLATE):
            try:
                return zlib.decompressobj().decompress(raw, line * height)
            except zlib.error as error:
                raise OSError(f"a part cannot be unpacked: {error}") from error
        return _by_libtiff(raw, self.compression, line, height)

    def numbers(self, data: bytes, height: int, row: int) -> np.ndarray:
        """height row, in this machine's byte order."""
        if self.bits in (8, 16, 32, 64):
            stored = self.dtype.newbyteorder(self.order)
            return np.frombuffer(data, stored).reshape(height, row).astype(self.dtype)
        lines = np.frombuffer(data, np.uint8).reshape(height, -1)
        if self.bits == 24:
            weights = np.array([1, 2**8, 2**16], np.uint32)
            weights = weights if self.order == "<" else weights[::-1]
            return (lines.reshape(height, row, 3) * weights).sum(-1, dtype=np.uint32)
        # Depths that are no bytes: bit by bit from the highest, a few rows at a time.
        out = np.empty((height, row), self.dtype)
        step = max(1, 2**22 // max(1, row * self.bits))
        weights = (1 << np.arange(self.bits - 1, -1, -1, dtype=np.uint32)).astype(np.uint32)
        for top in range(0, height, step):
            bits = np.unpackbits(lines[top : top + step], axis=1)[:, : row * self.bits]
            out[top : top + step] = bits.reshape(-1, row, self.bits) @ weights
        return out

    def from_float_predictor(self, data: bytes, height: int, width: int, depth: int) -> np.ndarray:
        """TIFF Technical Note 3: differences of bytes, all highest bytes of a row first."""
        size = self.bits // 8
        rows = np.frombuffer(data, np.uint8).reshape(height, -1, depth)
        planes = np.cumsum(rows, axis=1, dtype=np.uint8).reshape(height, size, width * depth)
        values = np.ascontiguousarray(planes.transpose(0, 2, 1)).view(f">f{size}")
        return values.reshape(height, width, depth).astype(self.dtype)


def _by_libtiff(raw: bytes, compression: int, line: int, height: int) -> bytes:
    """Unpack by the library behind Pillow: as a picture of one grey byte per byte."""
    tags = {WIDTH: line, HEIGHT: height, BITS: 8, COMPRESSION: compression, PHOTOMETRIC: 1}
    tags |= {STRIPS: 0, CHANNELS: 1, ROWS: height, STRIP_BYTES: len(raw)}
    tags[STRIPS] = 8 + 2 + 12 * len(tags) + 4
    entries = b"".join(struct.pack("<HHII", tag, 4, 1, tags[tag]) for tag in sorted(tags))
    head = b"II*\0" + struct.pack("<IH", 8, len(tags)) + entries + bytes(4)
    with Image.open(io.BytesIO(head + raw)) as image:
        image.load()
        return image.tobytes()


def profile(page: Page) -> bytes | None:
    """The ICC profile."""
    return bytes_of(page.tags, ICC)


def bytes_of(tags: Any, tag: int) -> bytes | None:
    """A tag that holds bytes, of whichever type it is stored as."""
    found = tags.get(tag)
    if isinstance(found, tuple):
        found = b"".join(found) if isinstance(found[0], bytes) else bytes(found)
    return found if isinstance(found, bytes) and found else None
