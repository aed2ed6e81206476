"""Tensors to files: atomically, with 16 bits, alpha, EXIF and ICC."""

from __future__ import annotations

import contextlib
import os
import secrets
import struct
import warnings
import zlib
from pathlib import Path
from typing import IO, Any

import numpy as np
import torch
from PIL import Image, TiffImagePlugin
from torch import Tensor

from .kinds import (
    EXIF_IFD,
    FORMATS,
    GPS_IFD,
    INTEROP_IFD,
    JPEG_EXIF_LIMIT,
    MAKER_NOTE,
    PIXEL_HEIGHT,
    PIXEL_WIDTH,
    Picture,
    PictureError,
    os_reason,
    profile_fits,
    strip_tags,
)


def write(
    path: str | os.PathLike[str],
    pixels: Tensor,
    like: Picture | None = None,
    *,
    format: str | None = None,
    quality: int = 95,
    overwrite: bool = False,
) -> Path:
    """Write pixels, (1) c h w in [0, 1] with c 1 to 4, and return where.

    Values are rounded half up to 255ths, or to 65535ths where `like` had 16 bits and the format has
    them (PNG, TIFF). EXIF and a fitting ICC profile come from `like`. The format is the name's, or
    `format`: PNG, JPEG, WebP, TIFF, BMP. 16-bit TIFF with grey and alpha is written as RGBA, which
    more programs read.

    quality: of JPEG and WebP, 1 to 100; WebP at 100 is lossless.
    The file appears whole or not at all: it is written beside its place and moved there.
    Raises PictureError; what would be lost without a word (alpha in a JPEG) is refused.
    """
    path = Path(path)
    name = _format(path, format)
    if not 1 <= quality <= 100:
        raise PictureError(f"quality must be between 1 and 100, got {quality}")
    bits = 16 if like is not None and like.bits == 16 and FORMATS[name].bits == 16 else 8
    samples = _quantised(path, pixels, bits)
    samples = _shaped(path, samples, name)
    height, width, channels = samples.shape
    profile = like.icc if like is not None and profile_fits(like.icc, channels) else None

    try:
        target = Path(os.path.realpath(path))
        _expect_place(path, target, overwrite)
        extras = {"exif": _exif_for(path, like, width, height, name), "icc": profile}
        temporary = target.with_name(f".gendr-{secrets.token_hex(8)}.part")
        try:
            with temporary.open("xb") as file:
                _encode(file, samples, name, quality, extras)
                file.flush()
                os.fsync(file.fileno())
            os.replace(temporary, target)
        finally:
            with contextlib.suppress(OSError):
                temporary.unlink(missing_ok=True)
    except PictureError:
        raise
    except OSError as error:
        raise PictureError(f"{path}: cannot be written: {os_reason(error)}") from error
    # Encoders raise as freely as decoders do.
    except Exception as error:
        text = str(error) or type(error).__name__
        raise PictureError(f"{path}: cannot be written as {name}: {text}") from error
    return path


def _format(path: Path, format: str | None) -> str:
    wanted = (f".{format.lower().lstrip('.')}" if format else path.suffix).lower()
    for name, known in FORMATS.items():
        if wanted in known.suffixes:
            return name
    endings = ", ".join(suffix for known in FORMATS.values() for suffix in known.suffixes)
    what = f"the format {format!r}" if format else f"the ending {path.suffix!r}"
    raise PictureError(f"{path}: {what} cannot be written; choose one of {endings}")


def _quantised(path: Path, pixels: Tensor, bits: int) -> np.ndarray:
    """(1) c h w in [0, 1] -> h w c uint8 or uint16, rounded half up, in bands of rows."""
    if pixels.ndim == 4 and pixels.shape[0] == 1:
        pixels = pixels[0]
    if pixels.ndim != 3 or not 1 <= pixels.shape[0] <= 4 or 0 in pixels.shape:
        raise PictureError(
            f"{path}: one picture of 1 c h w with 1 to 4 channels is needed, "
            f"got {tuple(pixels.shape)}"
        )
    if not pixels.is_floating_point():
        raise PictureError(
            f"{path}: floating-point values in [0, 1] are needed, got {pixels.dtype}"
        )
    channels, height, width = pixels.shape
    white = 2**bits - 1
    samples = np.empty((height, width, channels), np.uint8 if bits == 8 else np.uint16)
    rows = max(1, 2**22 // (width * channels))
    for top in range(0, height, rows):
        band = pixels[:, top : top + rows].detach().to("cpu", torch.float32)
        if not band.isfinite().all():
            raise PictureError(f"{path}: not written, the picture contains NaN or infinite values")
        band = (band * white + 0.5).clamp_(0, white)
        samples[top : top + rows] = band.permute(1, 2, 0).numpy()
    return samples


def _shaped(path: Path, samples: np.ndarray, name: str) -> np.ndarray:
    """The samples with the channels that the format stores; PictureError where it cannot hold them."""
    known = FORMATS[name]
    height, width, channels = samples.shape
    if max(height, width) > known.side:
        raise PictureError(
            f"{path}: {name} ends at {known.side} pixels a side, this picture has {width}x{height}; "
            "write PNG or TIFF"
        )
    if channels in (2, 4) and not known.alpha:
        if (samples[..., -1] != np.iinfo(samples.dtype).max).any():
            raise PictureError(
                f"{path}: {name} has no transparency and this picture has; write PNG or WebP"
            )
        samples = samples[..., :-1]
    if name == "WEBP" or (name == "TIFF" and samples.dtype == np.uint16 and channels == 2):
        grey = {1: [0, 0, 0], 2: [0, 0, 0, 1]}.get(samples.shape[-1])
        samples = samples[..., grey] if grey else samples
    if name == "TIFF" and samples.nbytes > 2**32 - 2**20:
        raise PictureError(f"{path}: TIFF ends at 4 GB; write PNG")
    return samples


def _expect_place(path: Path, target: Path, overwrite: bool) -> None:
    if target.is_dir():
        raise PictureError(f"{path}: is a folder; give the name of a file")
    if not target.parent.is_dir():
        raise PictureError(f"{path}: there is no folder {target.parent}; make it first")
    if target.exists() and not overwrite:
        raise PictureError(f"{path}: exists already; choose another name, or allow overwriting it")


def _exif_for(path: Path, like: Picture | None, width: int, height: int, name: str) -> Image.Exif:
    """The tags of `like` for a picture of this size; none of what the format cannot hold."""
    tags = Image.Exif()
    if like is None or like.exif is None or name == "BMP":
        return tags
    try:
        tags.load(like.exif)
        strip_tags(tags)
        details = tags.get_ifd(EXIF_IFD) if EXIF_IFD in tags else {}
        for tag, value in ((PIXEL_WIDTH, width), (PIXEL_HEIGHT, height)):
            if tag in details:
                details[tag] = value
        # The maker's own block is the large one, and has lost its meaning with its place.
        if name == "JPEG" and len(tags.tobytes()) > JPEG_EXIF_LIMIT:
            details.pop(MAKER_NOTE, None)
        size = len(tags.tobytes())
        if name == "JPEG" and size > JPEG_EXIF_LIMIT:
            raise ValueError(f"{size} bytes, JPEG holds {JPEG_EXIF_LIMIT}")
    except Exception as error:
        warnings.warn(f"{path}: written without EXIF, which is broken ({error})", stacklevel=3)
        return Image.Exif()
    return tags


def _encode(
    file: IO[bytes], samples: np.ndarray, name: str, quality: int, extras: dict[str, Any]
) -> None:
    if name == "TIFF":
        _encode_tiff(file, samples, **extras)
        return
    if samples.dtype == np.uint16:
        _encode_png(file, samples, **extras)
        return
    options: dict[str, Any] = {}
    if name == "JPEG":
        # Halved colour resolution is for small files, which nobody asks for at 90.
        options = {"quality": quality, "subsampling": 0 if quality >= 90 else 2}
    elif name == "WEBP":
        options = {"quality": quality, "lossless": quality == 100, "exact": True}
    if len(extras["exif"]):
        options["exif"] = extras["exif"].tobytes()
    if extras["icc"]:
        options["icc_profile"] = extras["icc"]
    single = samples[..., 0] if samples.shape[-1] == 1 else samples
    Image.fromarray(np.ascontiguousarray(single)).save(file, name, **options)


def _encode_tiff(file: IO[bytes], samples: np.ndarray, exif: Image.Exif, icc: bytes | None) -> None:
    """Uncompressed TIFF in one strip, of 8 or 16 bits: Pillow has no 16-bit colour to write."""
    height, width, channels = samples.shape
    directory = TiffImagePlugin.ImageFileDirectory_v2(prefix=b"II")
    for tag in exif:
        inner = exif.get_ifd(tag) if tag in (EXIF_IFD, GPS_IFD) else None
        # An offset in the file that it comes from.
        directory[tag] = (
            exif[tag] if inner is None else {k: v for k, v in inner.items() if k != INTEROP_IFD}
        )
    directory[256], directory[257] = width, height
    directory[258] = (8 * samples.itemsize,) * channels
    directory[259] = 1  # not compressed
    directory[262] = 1 if channels < 3 else 2  # black is zero, or RGB
    directory[273] = 0  # behind the directory, which moves it there itself
    directory[277] = channels
    directory[278], directory[279] = height, samples.nbytes
    directory[284] = 1  # channels side by side
    if channels in (2, 4):
        directory[338] = 2  # alpha that is not multiplied in
    if icc:
        directory[34675] = icc
        directory.tagtype[34675] = 7
    directory.save(file)
    little = samples.astype(samples.dtype.newbyteorder("<"), copy=False)
    file.write(memoryview(np.ascontiguousarray(little)).cast("B"))


def _encode_png(file: IO[bytes], samples: np.ndarray, exif: Image.Exif, icc: bytes | None) -> None:
    """PNG of 16 bits (ISO/IEC 15948): Pillow writes 16 bits of grey alone."""
    height, width, channels = samples.shape

    def chunk(kind: bytes, data: bytes) -> None:
        file.write(struct.pack(">I", len(data)) + kind + data)
        file.write(struct.pack(">I", zlib.crc32(data, zlib.crc32(kind))))

    file.write(b"\x89PNG\r\n\x1a\n")
    colour_type = {1: 0, 2: 4, 3: 2, 4: 6}[channels]
    chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 16, colour_type, 0, 0, 0))
    if icc:
        chunk(b"iCCP", b"ICC profile\0\0" + zlib.compress(icc))
    if len(exif):
        chunk(b"eXIf", exif.tobytes().removeprefix(b"Exif\0\0"))
    packer = zlib.compressobj(6)
    pixel = 2 * channels
    above = np.zeros(width * pixel, np.uint8)
    rows = max(1, 2**20 // (width * pixel))
    for top in range(0, height, rows):
        big = samples[top : top + rows].astype(">u2")
        band = big.view(np.uint8).reshape(len(big), width * pixel)
        data = packer.compress(_filtered(band, above, pixel).tobytes())
        above = band[-1]
        if data:
            chunk(b"IDAT", data)
    chunk(b"IDAT", packer.flush())
    chunk(b"IEND", b"")


def _filtered(rows: np.ndarray, above: np.ndarray, pixel: int) -> np.ndarray:
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
