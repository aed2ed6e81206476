"""What a file knows beside its pixels: EXIF, XMP, IPTC, text, resolution, and each format's place for it."""

from __future__ import annotations

import re
import struct
import warnings
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from PIL import Image

from . import png, tiff
from .kinds import (
    EXIF_IFD,
    JPEG_EXIF_LIMIT,
    MAKER_NOTE,
    PIXEL_HEIGHT,
    PIXEL_WIDTH,
    Picture,
    strip_tags,
)

X_RESOLUTION, Y_RESOLUTION, RESOLUTION_UNIT, XMP, IPTC, COMMENT = 282, 283, 296, 700, 33723, 0x9286
INCH, CENTIMETRE = 2, 3
SEGMENT = 65533  # bytes that a segment of a JPEG holds
XMP_SEGMENT = b"http://ns.adobe.com/xap/1.0/\0"
IPTC_RESOURCE = 0x0404


def exif_of(read: Callable[[], Image.Exif]) -> tuple[bytes | None, tuple[float, float] | None]:
    """EXIF without what describes the stored pixels, and dots per inch."""
    try:
        tags = read()
        dpi = dots_per_inch(tags)
        strip_tags(tags)
        return (tags.tobytes() if len(tags) else None), dpi
    # Cameras and editors write all kinds of broken tags; the picture is worth more than they are.
    except Exception:
        return None, None


def dots_per_inch(tags: Any) -> tuple[float, float] | None:
    """From the tags of a TIFF or of EXIF."""
    try:
        x, y = float(tags[X_RESOLUTION]), float(tags[Y_RESOLUTION])
    except (KeyError, TypeError, ValueError, ZeroDivisionError):
        return None
    unit = {INCH: 1.0, CENTIMETRE: 2.54}.get(tags.get(RESOLUTION_UNIT, INCH))
    return (x * unit, y * unit) if unit and x > 0 and y > 0 else None


def beside(info: dict[str, Any], tags: Any, kind: str) -> dict[str, Any]:
    """XMP, IPTC, comment and dots per inch as fields of `Picture`.

    info: what Pillow says about the file. tags: of a TIFF.
    """
    found: dict[str, Any] = {}
    xmp = tiff.bytes_of(tags, XMP) or info.get("xmp")
    found["xmp"] = xmp if isinstance(xmp, bytes) else xmp.encode() if xmp else None
    iptc = tiff.bytes_of(tags, IPTC) or (info.get("photoshop") or {}).get(IPTC_RESOURCE)
    found["iptc"] = iptc if isinstance(iptc, bytes) and iptc else None
    comment = info.get("comment") if kind in ("JPEG", "GIF") else None
    if comment:
        if isinstance(comment, bytes):
            try:
                comment = comment.decode()
            except UnicodeDecodeError:
                comment = comment.decode("latin-1")
        found["text"] = (png.text_chunk("Comment", comment.rstrip("\0")),)
    if kind == "JPEG" and info.get("jfif_unit") in (1, 2):
        unit = 1 if info["jfif_unit"] == 1 else 2.54
        x, y = info.get("jfif_density", (0, 0))
        found["dpi"] = (x * unit, y * unit) if x > 1 and y > 1 else None
    elif kind in ("BMP", "PCX", "PSD") and isinstance(info.get("dpi"), tuple):
        x, y = (float(value) for value in info["dpi"])
        found["dpi"] = (x, y) if x > 0 and y > 0 else None
    return found


def xmp_of_segments(segments: list[tuple[str, bytes]]) -> bytes | None:
    """The XMP among a JPEG's application segments, (marker, content)."""
    for _, content in segments:
        if content.startswith(XMP_SEGMENT):
            return content[len(XMP_SEGMENT) :]
    return None


def upright_xmp(xmp: bytes | None) -> bytes | None:
    """XMP repeats the orientation, which has been applied."""
    if not xmp:
        return None
    return re.sub(rb"(tiff:Orientation(?:=[\"']|>)\s*)[0-9]", rb"\g<1>1", xmp)


def xmp_orientation(xmp: bytes | None) -> int:
    match = re.search(rb"tiff:Orientation(?:=[\"']|>)\s*([1-8])", xmp or b"")
    return int(match[1]) if match else 1


@dataclass
class Extras:
    """What is written beside the pixels, each where the format has a place for it."""

    exif: Image.Exif = field(default_factory=Image.Exif)
    icc: bytes | None = None
    xmp: bytes | None = None
    iptc: bytes | None = None
    dpi: tuple[float, float] | None = None
    comment: bytes | None = None
    chunks: list[png.Chunk] = field(default_factory=list)  # of a PNG: colour and text

    def exif_bytes(self) -> bytes | None:
        return self.exif.tobytes() if len(self.exif) else None


def extras(
    path: Path,
    like: Picture | None,
    size: tuple[int, int],
    name: str,
    icc: bytes | None,
    keep: bool,
) -> Extras:
    """The metadata of `like` for a picture of this size (width, height) in the format `name`.

    A warning names what the format has no place for. keep: False leaves out everything that does
    not say what the colours are.
    """
    made = Extras(icc=icc if name != "BMP" else None)
    if like is None:
        return made
    lost = ["the colour profile"] if icc and name == "BMP" else []
    if name == "PNG":
        made.chunks += like.colour
    else:
        meaning = [kind.decode() for kind, data in like.colour if not standard(kind, data)]
        if meaning and not icc:
            lost.append(f"what its numbers mean as colours ({', '.join(meaning)})")
    if keep:
        made.exif = _exif_for(path, like, size, name)
        made.dpi = like.dpi
        made.xmp, made.iptc = _resized_xmp(like.xmp, size), like.iptc
        lost += _text_for(made, like, name)
        if name == "BMP":
            kept = (("EXIF", like.exif), ("XMP", made.xmp), ("IPTC", made.iptc))
            lost += [what for what, value in kept if value]
            made.xmp = made.iptc = None
        elif made.iptc and name in ("PNG", "WEBP"):
            lost.append("IPTC")
        if name == "JPEG" and made.xmp and len(XMP_SEGMENT + made.xmp) > SEGMENT:
            lost.append(f"XMP ({len(made.xmp)} bytes, a segment holds {SEGMENT})")
            made.xmp = None
        if name == "JPEG" and made.iptc and len(_photoshop(made.iptc)) > SEGMENT:
            lost.append("IPTC (too long)")
            made.iptc = None
        if made.dpi and name in ("WEBP", "TIFF", "JPEG"):
            _say_dpi(made.exif, made.dpi, always=name != "JPEG")
    if lost:
        better = "" if name == "PNG" else "; PNG keeps text and colour"
        warnings.warn(f"{path}: {name} has no place for {', '.join(lost)}{better}", stacklevel=3)
    return made


def standard(kind: bytes, data: bytes) -> bool:
    """Whether a chunk says no more than that the colours are sRGB's, as they are without it."""
    if kind == b"gAMA":
        return abs(int.from_bytes(data, "big") - 45455) < 100
    if kind == b"cHRM" and len(data) == 32:
        values = struct.unpack(">8I", data)
        srgb = (31270, 32900, 64000, 33000, 30000, 60000, 15000, 6000)
        return all(abs(a - b) < 100 for a, b in zip(values, srgb, strict=True))
    if kind == b"cICP":
        return data[:2] in (b"\1\x0d", b"\1\1", b"\1\6")
    return kind in (b"sRGB", b"pHYs")


def _text_for(made: Extras, like: Picture, name: str) -> list[str]:
    """Text to where the format has it; the keywords of what it has no place for."""
    if name == "PNG":
        made.chunks += map(png.read_widely, like.text)
        return []
    lost = []
    for keyword, text in map(png.text_of, like.text):
        details = made.exif.get_ifd(EXIF_IFD)
        if keyword == "Comment" and name == "JPEG" and not made.comment and len(text) < 2**14:
            made.comment = text.encode()
        elif keyword == "parameters" and COMMENT not in details and name != "BMP":
            # Where image generators put it in files that are not PNG, and look for it.
            details[COMMENT] = b"UNICODE\0" + text.encode("utf-16-be")
            made.exif._ifds[EXIF_IFD] = details
            made.exif[EXIF_IFD] = details
            if name == "JPEG" and len(made.exif.tobytes()) > JPEG_EXIF_LIMIT:
                del details[COMMENT]
                lost.append(f"the text {keyword!r}")
        else:
            lost.append(f"the text {keyword!r}")
    return lost


def _resized_xmp(xmp: bytes | None, size: tuple[int, int]) -> bytes | None:
    if not xmp:
        return None
    names = (
        (rb"exif:PixelXDimension", rb"tiff:ImageWidth"),
        (rb"exif:PixelYDimension", rb"tiff:ImageLength"),
    )
    for side, pair in zip(size, names, strict=True):
        for tag in pair:
            xmp = re.sub(rb"(" + tag + rb"(?:=[\"']|>)\s*)[0-9]+", b"\\g<1>%d" % side, xmp)
    return xmp


def _say_dpi(tags: Image.Exif, dpi: tuple[float, float], always: bool) -> None:
    if (always or len(tags)) and X_RESOLUTION not in tags:
        tags[X_RESOLUTION], tags[Y_RESOLUTION] = (round(value, 4) for value in dpi)
        tags[RESOLUTION_UNIT] = INCH


def _exif_for(path: Path, like: Picture, size: tuple[int, int], name: str) -> Image.Exif:
    """The tags of `like` for a picture of this size; none of what the format cannot hold."""
    tags = Image.Exif()
    if like.exif is None or name == "BMP":
        return tags
    try:
        tags.load(like.exif)
        strip_tags(tags)
        details = tags.get_ifd(EXIF_IFD) if EXIF_IFD in tags else {}
        for tag, value in zip((PIXEL_WIDTH, PIXEL_HEIGHT), size, strict=True):
            if tag in details:
                details[tag] = value
        # The maker's own block is the large one, and has lost its meaning with its place.
        if name == "JPEG" and len(tags.tobytes()) > JPEG_EXIF_LIMIT:
            details.pop(MAKER_NOTE, None)
        length = len(tags.tobytes())
        if name == "JPEG" and length > JPEG_EXIF_LIMIT:
            raise ValueError(f"{length} bytes, JPEG holds {JPEG_EXIF_LIMIT}")
    except Exception as error:
        warnings.warn(f"{path}: written without EXIF, which is broken ({error})", stacklevel=4)
        return Image.Exif()
    return tags


def jpeg_segments(made: Extras) -> bytes:
    """XMP and IPTC as application segments."""
    out = b""
    if made.xmp:
        out += _segment(0xE1, XMP_SEGMENT + made.xmp)
    if made.iptc:
        out += _segment(0xED, _photoshop(made.iptc))
    return out


def _segment(code: int, data: bytes) -> bytes:
    return struct.pack(">BBH", 0xFF, code, len(data) + 2) + data


def _photoshop(iptc: bytes) -> bytes:
    resource = b"8BIM" + struct.pack(">HHI", IPTC_RESOURCE, 0, len(iptc)) + iptc
    return b"Photoshop 3.0\0" + resource + b"\0" * (len(iptc) % 2)
