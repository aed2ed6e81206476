"""Tensors to files: atomically, with 16 bits, alpha, EXIF and ICC."""

from __future__ import annotations

import os
from collections.abc import Callable
from numbers import Real
from pathlib import Path
from typing import IO, Any

import numpy as np
import torch
from PIL import Image, TiffImagePlugin
from torch import Tensor

from . import metadata, png
from .kinds import (
    EXIF_IFD,
    FORMATS,
    GPS_IFD,
    INTEROP_IFD,
    Picture,
    PictureError,
    os_reason,
    profile_fits,
)
from .metadata import Extras
from .placing import replacing
from .tiff import ICC


def write(
    path: str | os.PathLike[str],
    pixels: Tensor,
    like: Picture | None = None,
    *,
    format: str | None = None,
    quality: int = 95,
    overwrite: bool = False,
    keep_metadata: bool = True,
    before: Callable[[Path], None] | None = None,
) -> Path:
    """Write pixels, (1) c h w in [0, 1] with c 1 to 4, and return where.

    Values are rounded half up to 255ths, or to 65535ths where `like` had 16 bits and the format has
    them (PNG, TIFF). EXIF, XMP, IPTC, text, resolution and a fitting ICC profile come from `like`;
    a warning names what the format has no place for. The format is the name's, or `format`: PNG,
    JPEG, WebP, TIFF, BMP. 16-bit TIFF with grey and alpha is written as RGBA, which more programs
    read.

    quality: of JPEG and WebP, 1 to 100; WebP at 100 is lossless.
    keep_metadata: False writes nothing but the pixels and what their colours are.
    before: called with the path of the finished file just before it takes its place.
    The file appears whole or not at all: it is written beside its place and moved there.
    Raises PictureError; what would be lost without a word (alpha in a JPEG) is refused.
    """
    path = Path(path)
    name = _format(path, format)
    if not isinstance(quality, Real) or not 1 <= quality <= 100:
        raise PictureError(f"quality must be between 1 and 100, got {quality}")
    bits = 16 if like is not None and like.bits == 16 and FORMATS[name].bits == 16 else 8
    samples = _quantised(path, pixels, bits)
    samples = _shaped(path, samples, name)
    height, width, channels = samples.shape
    profile = like.icc if like is not None and profile_fits(like.icc, channels) else None

    try:
        target = Path(os.path.realpath(path))
        _expect_place(path, target, overwrite)
        extras = metadata.extras(path, like, (width, height), name, profile, keep_metadata)
        with replacing(target, before) as file:
            _encode(file, samples, name, quality, extras)
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
    if not isinstance(pixels, Tensor) or pixels.is_meta:
        raise PictureError(f"{path}: a tensor 1 c h w is needed, got {type(pixels).__name__}")
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
    if samples.nbytes > known.size:
        raise PictureError(f"{path}: {name} ends at 4 GB; write PNG")
    return samples


def _expect_place(path: Path, target: Path, overwrite: bool) -> None:
    if target.is_dir():
        raise PictureError(f"{path}: is a folder; give the name of a file")
    if not target.parent.is_dir():
        raise PictureError(f"{path}: there is no folder {target.parent}; make it first")
    if target.exists() and not overwrite:
        raise PictureError(f"{path}: exists already; choose another name, or allow overwriting it")


def _encode(file: IO[bytes], samples: np.ndarray, name: str, quality: int, extras: Extras) -> None:
    if name == "TIFF":
        _encode_tiff(file, samples, extras)
        return
    exif = extras.exif_bytes()
    if name == "PNG":
        chunks = png.metadata(
            icc=extras.icc, exif=exif, xmp=extras.xmp, dpi=extras.dpi, more=extras.chunks
        )
        if samples.dtype == np.uint16:
            png.encode_wide(file, samples, chunks)
        else:
            _image(samples).save(png.Inserting(file, chunks), "PNG")
        return
    options: dict[str, Any] = {}
    if name == "JPEG":
        # Halved colour resolution is for small files, which nobody asks for at 90.
        options = {"quality": quality, "subsampling": 0 if quality >= 90 else 2}
        options["extra"] = metadata.jpeg_segments(extras)
        if extras.comment:
            options["comment"] = extras.comment
    elif name == "WEBP":
        options = {"quality": quality, "lossless": quality == 100, "exact": True}
        if extras.xmp:
            options["xmp"] = extras.xmp
    if extras.dpi and name in ("JPEG", "BMP"):
        options["dpi"] = extras.dpi
    if exif and name != "BMP":
        options["exif"] = exif
    if extras.icc:
        options["icc_profile"] = extras.icc
    _image(samples).save(file, name, **options)


def _image(samples: np.ndarray) -> Image.Image:
    single = samples[..., 0] if samples.shape[-1] == 1 else samples
    return Image.fromarray(np.ascontiguousarray(single))


def _encode_tiff(file: IO[bytes], samples: np.ndarray, extras: Extras) -> None:
    """Uncompressed TIFF in one strip, of 8 or 16 bits: Pillow has no 16-bit colour to write."""
    height, width, channels = samples.shape
    directory = TiffImagePlugin.ImageFileDirectory_v2(prefix=b"II")
    exif = extras.exif
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
    profile = (ICC, extras.icc), (metadata.XMP, extras.xmp), (metadata.IPTC, extras.iptc)
    for tag, data in profile:
        if data:
            directory[tag] = data
            directory.tagtype[tag] = 7
    directory.save(file)
    little = samples.astype(samples.dtype.newbyteorder("<"), copy=False)
    file.write(memoryview(np.ascontiguousarray(little)).cast("B"))
