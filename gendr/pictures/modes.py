"""What Pillow decoded, in any of its modes, to samples; 16-bit colour without loss."""

from __future__ import annotations

import io
import re
import sys
from typing import IO, Any

import numpy as np
from PIL import Image, ImageCms

from .kinds import BLACK_POINT_COMPENSATION
from .values import Samples, divided_by_alpha, floating, keyed, signed

# Kinds whose writers often leave alpha at 0 everywhere, meaning none.
UNUSED_ALPHA = frozenset({"BMP", "DIB", "TGA", "ICO", "CUR"})


def samples(image: Image.Image, kind: str, bits: int, notes: list[str]) -> Samples:
    """The samples of an image that is loaded.

    kind: the format's name. bits: per channel in the file, more than Pillow may have kept.
    """
    mode, key = image.mode, image.info.get("transparency")
    if mode.startswith("I;16"):
        return Samples(keyed(np.asarray(image).astype(np.uint16)[..., None], key), 65535, 16)
    if mode == "I" and kind in ("PNG", "PPM"):
        return Samples(keyed(np.asarray(image).astype(np.uint16)[..., None], key), 65535, 16)
    if mode == "I":
        return Samples(*signed(np.asarray(image)[..., None], 32, notes), 32)
    if mode == "F":
        return Samples(*floating(np.asarray(image)[..., None], notes), 32)
    if mode in ("CMYK", "LAB"):
        values, converted = np.asarray(managed(image, notes)), True
    else:
        values, converted = _eight_bits(image, key), False
    if bits > 8:
        notes.append(f"{bits} bits per channel were read as 8")
    if kind in UNUSED_ALPHA and values.shape[-1] == 4 and not values[..., 3].any():
        notes.append("alpha is 0 everywhere, which means that there is none: read as opaque")
        values = values[..., :3]
    return Samples(values, 255, 8, converted)


def _eight_bits(image: Image.Image, key: Any) -> np.ndarray:
    mode = image.mode
    if mode in ("1", "L"):
        return keyed(np.asarray(image.convert("L"))[..., None], key)
    if mode in ("P", "PA"):
        see_through = mode == "PA" or key is not None
        return np.asarray(image.convert("RGBA" if see_through else "RGB"))
    if mode == "RGB":
        return keyed(np.asarray(image), key)
    target = {"La": "LA", "LA": "LA", "RGBA": "RGBA", "RGBa": "RGBA"}.get(mode, "RGB")
    return np.asarray(image.convert(target))


def managed(image: Image.Image, notes: list[str]) -> Image.Image:
    """CMYK by its profile, or Lab, to sRGB."""
    profile = image.info.get("icc_profile")
    try:
        if image.mode == "LAB":
            source = ImageCms.createProfile("LAB")
        elif profile and profile[16:20] == b"CMYK":
            source = ImageCms.ImageCmsProfile(io.BytesIO(profile))
        else:
            source = None
        if source is not None:
            return ImageCms.profileToProfile(
                image,
                source,
                ImageCms.createProfile("sRGB"),
                renderingIntent=ImageCms.Intent.RELATIVE_COLORIMETRIC,
                outputMode="RGB",
                flags=BLACK_POINT_COMPENSATION,
            )
    # Built without LittleCMS, or the profile is broken.
    except (ImportError, OSError, ImageCms.PyCMSError):
        if image.mode == "LAB":
            raise
    notes.append("CMYK without a usable profile: its colours are an approximation")
    return image.convert("RGB")


def sixteen_bits(image: Image.Image, file: IO[bytes]) -> Samples | None:
    """RGB(A) or grey and alpha of 16 bits, of an image that is not loaded yet.

    Pillow has no mode for these and keeps every other byte. Which one is a matter of the byte order
    that its decoder is told, so the file is decoded twice. None for anything else, and `image` is
    then as it was.
    """
    raw = {raw_mode(tile) for tile in getattr(image, "tile", None) or ()}
    match = re.fullmatch(r"(RGB|RGBA|RGBa|RGBX|LA);16([BLN])", raw.pop() if len(raw) == 1 else "")
    if match is None:
        return None
    layout, order = match.groups()
    try:
        if layout == "LA":
            # Four bytes a pixel, as 8-bit RGBA has.
            loaded = np.asarray(_reopened(file, "RGBA"))
            first, second = loaded[..., 0::2], loaded[..., 1::2]
        else:
            # RGBa: as it is, because Pillow would divide by alpha with 8 bits.
            plain = "RGBA" if layout == "RGBa" else layout
            first = np.asarray(_reopened(file, f"{plain};16B"))
            second = np.asarray(_reopened(file, f"{plain};16L"))
    except ValueError:  # a Pillow that lacks one of these
        return None
    little = order == "L" or (order == "N" and sys.byteorder == "little")
    high, low = (second, first) if little else (first, second)
    values = high.astype(np.uint16)
    values <<= 8
    values |= low
    if layout == "RGBX":
        values = values[..., :3]
    if layout == "RGBa":
        values = divided_by_alpha(values, 65535)
    return Samples(keyed(values, image.info.get("transparency")), 65535, 16)


def raw_mode(tile: Any) -> str:
    """The raw mode of one of an image's `tile` entries."""
    args = tile[3]
    return args if isinstance(args, str) else str(args[0]) if args else ""


def _reopened(file: IO[bytes], rawmode: str) -> Image.Image:
    """The file's picture, loaded as if its samples were stored in another raw mode."""
    file.seek(0)
    image = Image.open(file)
    tiles = []
    for tile in image.tile:
        args = rawmode if isinstance(tile[3], str) else (rawmode, *tile[3][1:])
        changed = (*tile[:3], args)
        tiles.append(type(tile)(*changed) if hasattr(tile, "_fields") else changed)
    image.tile = tiles
    image.load()
    return image


def file_bits(image: Image.Image, kind: str, file: IO[bytes]) -> int:
    """Bits per channel of the file, where it says so; 8 otherwise. The image is not loaded yet."""
    if any(";16" in raw_mode(tile) for tile in getattr(image, "tile", None) or ()):
        return 16
    if kind == "TIFF":
        bits = image.tag_v2.get(258, 8)
        return max(bits) if isinstance(bits, tuple) else int(bits)
    if kind not in ("SGI", "PSD", "JPEG2000", "AVIF"):
        return 8
    place = file.tell()  # where the decoder will go on
    file.seek(0)
    head = file.read(2**16)
    file.seek(place)
    if kind == "SGI":
        return 8 * head[3]
    if kind == "PSD":
        return int.from_bytes(head[22:24], "big")
    if kind == "JPEG2000":
        # SIZ of the codestream: two bytes after 38 of sizes comes the first component's depth.
        at = head.find(b"\xff\x4f\xff\x51")
        return (head[at + 42] & 0x7F) + 1 if 0 <= at < len(head) - 42 else 8
    # AVIF: high_bitdepth and twelve_bit of the AV1 configuration.
    at = head.find(b"av1C")
    flags = head[at + 6] if 0 <= at < len(head) - 6 else 0
    return 8 if not flags & 0x40 else 12 if flags & 0x20 else 10
