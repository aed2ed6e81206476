"""Files to tensors and back, without losing what a file knows: 16 bits, alpha, grey, EXIF, ICC."""

from __future__ import annotations

import contextlib
import errno
import io
import os
import re
import secrets
import struct
import sys
import threading
import warnings
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, NamedTuple

import numpy as np
import torch
from PIL import Image, ImageCms, ImageFile, TiffImagePlugin, UnidentifiedImageError
from torch import Tensor

# As a picture in memory takes 12 bytes a pixel and its restoration at 4x sixteen times that, a
# file that claims more is a mistake or an attack.
MAX_PIXELS = 200_000_000
ORIENTATION, EXIF_IFD, GPS_IFD, INTEROP_IFD = 0x0112, 0x8769, 0x8825, 0xA005
PLANAR, MAKER_NOTE, PIXEL_WIDTH, PIXEL_HEIGHT = 0x011C, 0x927C, 0xA002, 0xA003
# How the pixels of one file are stored (TIFF keeps that among the EXIF tags), never those of the
# next; XMP, IPTC and Photoshop's blocks, which repeat the orientation; and raw development.
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
ANIMATED = frozenset({"GIF", "PNG", "WEBP", "TIFF", "AVIF", "FLI", "DCX"})
# Drawings, which Pillow hands to other programs or to the system.
VECTOR = frozenset({"EPS", "WMF", "PDF"})
BLACK_POINT_COMPENSATION = 0x2000  # LittleCMS's flag; older Pillows have no name for it
JPEG_EXIF_LIMIT = 65533 - 2


class PictureError(ValueError):
    """A file that cannot be read or written, and what to do about it."""


@dataclass
class Picture:
    """A decoded file.

    pixels: 1 c h w float32 in [0, 1], upright; c is 1 grey, 2 grey and alpha, 3 RGB, 4 RGBA.
    bits: 8 or 16 per channel in the file.
    exif, icc: as bytes, without orientation and thumbnail; an ICC profile of these pixels' colour
        space only.
    frames: of the file; the pixels are the first one's.
    notes: what differs from the file, in sentences for a person.
    """

    pixels: Tensor
    bits: int = 8
    grey: bool = False
    exif: bytes | None = None
    icc: bytes | None = None
    format: str = ""
    frames: int = 1
    path: Path | None = None
    notes: tuple[str, ...] = ()


class Format(NamedTuple):
    """What a kind of file can hold."""

    suffixes: tuple[str, ...]
    alpha: bool
    bits: int
    side: int


FORMATS = {
    "PNG": Format((".png",), alpha=True, bits=16, side=2**31 - 1),
    # The format has 16 bits for a side; the library behind Pillow stops a little earlier.
    "JPEG": Format((".jpg", ".jpeg", ".jpe", ".jfif"), alpha=False, bits=8, side=65500),
    "WEBP": Format((".webp",), alpha=True, bits=8, side=16383),
    "TIFF": Format((".tif", ".tiff"), alpha=True, bits=16, side=2**31 - 1),
    "BMP": Format((".bmp",), alpha=False, bits=8, side=2**31 - 1),
}


# Reading


def read(
    path: str | os.PathLike[str], *, truncated: bool = False, max_pixels: int | None = MAX_PIXELS
) -> Picture:
    """Decode a file of any kind and mode that Pillow knows.

    EXIF orientation is applied; palettes, CMYK (through its ICC profile), Lab, HSV and YCbCr become
    RGB; of an animation comes the first frame. 16-bit channels keep their 16 bits. 32-bit ones
    are divided by what fits their values, and a note says by what.

    truncated: take what can be decoded of a file that is cut short, instead of an error.
    max_pixels: refuse larger pictures before decoding them; None = no limit.
    Raises PictureError.
    """
    path = Path(path)
    try:
        _expect_file(path)
        with _pillow() as settings, path.open("rb") as file:
            try:
                return _decode(file, path, max_pixels)
            except (PictureError, UnidentifiedImageError, MemoryError):
                raise
            except Exception:
                if not truncated:
                    raise
                settings(truncated=True)
                picture = _decode(file, path, max_pixels)
                picture.notes += ("the file is cut short or damaged; what is missing is grey",)
                return picture
    except PictureError:
        raise
    except UnidentifiedImageError as error:
        raise PictureError(f"{path}: {_what_is(path)}") from error
    except MemoryError as error:
        raise PictureError(f"{path}: too large for the memory that is free") from error
    except OSError as error:
        if error.errno is not None:
            raise PictureError(f"{path}: cannot be read: {_reason(error)}") from error
        raise PictureError(_damaged(path, error)) from error
    # Whatever a decoder makes of damaged bytes: struct, zlib, index and key errors among others.
    except Exception as error:
        raise PictureError(_damaged(path, error)) from error


def _expect_file(path: Path) -> None:
    if path.is_dir():
        raise PictureError(f"{path}: is a folder, a picture file was expected")
    if not path.exists():
        raise PictureError(f"{path}: there is no such file; check the name and the folder")
    if not path.is_file():
        raise PictureError(f"{path}: is not a regular file; copy the picture to one first")
    if path.stat().st_size == 0:
        raise PictureError(f"{path}: is empty (0 bytes); the copy or download failed, repeat it")


_LOCK = threading.Lock()


@contextlib.contextmanager
def _pillow() -> Iterator[Callable[..., None]]:
    """Pillow's global switches for the time of one file: a host may have set them otherwise."""
    with _LOCK, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        before = ImageFile.LOAD_TRUNCATED_IMAGES, Image.MAX_IMAGE_PIXELS

        def settings(truncated: bool) -> None:
            ImageFile.LOAD_TRUNCATED_IMAGES = truncated

        try:
            settings(truncated=False)
            # `read` has a limit of its own, with a message and a way out.
            Image.MAX_IMAGE_PIXELS = None
            yield settings
        finally:
            ImageFile.LOAD_TRUNCATED_IMAGES, Image.MAX_IMAGE_PIXELS = before


def _decode(file: IO[bytes], path: Path, max_pixels: int | None) -> Picture:
    file.seek(0)
    image = Image.open(file)
    kind = "JPEG" if image.format == "MPO" else image.format or ""
    _expect_decodable(image, kind, path, max_pixels)
    notes = []
    frames = 1
    if kind in ANIMATED:
        frames = _frames(image)
        # Counting moves through the file, and stays where a damaged frame ends it.
        file.seek(0)
        image = Image.open(file)
    if frames > 1:
        notes.append(f"the first of {frames} frames; the others are left out")

    file_bits = _file_bits(image)
    planes = file_bits > 8 and getattr(image, "tag_v2", {}).get(PLANAR, 1) == 2
    if planes and image.tile[0][0] == "raw":
        raise PictureError(
            f"{path}: is a TIFF of {file_bits} bits with one plane per channel, which Pillow "
            "misreads; save it with interleaved channels, or compressed"
        )
    wide = None if planes else _sixteen_bits(image, file)
    if wide is None:
        image.load()
        samples, maximum, space = _samples(image, notes)
        if samples.dtype == np.uint8 and file_bits > 8:
            notes.append(f"{file_bits} bits per channel were read as 8")
    else:
        image, samples = wide
        maximum, space = 65535, ""
    bits = 8 if samples.dtype == np.uint8 else 16
    exif, orientation = _exif(image)
    samples = _upright(samples, orientation)

    height, width, channels = samples.shape
    pixels = np.empty((channels, height, width), np.float32)
    for channel in range(channels):
        np.divide(samples[..., channel], np.float32(maximum), out=pixels[channel])
    profile = image.info.get("icc_profile")
    return Picture(
        pixels=torch.from_numpy(pixels)[None],
        bits=bits,
        grey=channels < 3,
        exif=exif,
        # What was converted is sRGB now, whatever the file's profile says.
        icc=profile if not space and _fits(profile, channels) else None,
        format=kind,
        frames=frames,
        path=path,
        notes=tuple(notes),
    )


def _expect_decodable(image: Image.Image, kind: str, path: Path, max_pixels: int | None) -> None:
    """Refuse what would decode to something else than the picture, or to too much."""
    if kind in VECTOR:
        raise PictureError(f"{path}: is a drawing ({kind}); export it as PNG first")
    if kind == "TIFF" and path.suffix.lower() in CAMERA_RAW:
        raise PictureError(
            f"{path}: is a camera's raw file, of which only the small preview could be read; "
            "develop it to a 16-bit TIFF or PNG first"
        )
    width, height = image.size
    if max_pixels is not None and width * height > max_pixels:
        raise PictureError(
            f"{path}: {width}x{height} is {width * height / 1e6:.0f} megapixels, more than the "
            f"limit of {max_pixels / 1e6:.0f}; reduce it first, or raise max_pixels for a file "
            "that can be trusted"
        )


def _frames(image: Image.Image) -> int:
    try:
        return int(getattr(image, "n_frames", 1))
    # A later frame is damaged: the first one is all that is wanted.
    except Exception:
        return 1


def _sixteen_bits(image: Image.Image, file: IO[bytes]) -> tuple[Image.Image, np.ndarray] | None:
    """RGB(A) or grey and alpha of 16 bits: the loaded image and its samples, h w c uint16.

    Pillow has no mode for these and keeps every other byte. Which one is a matter of the byte order
    that its decoder is told, so the file is decoded twice. None for anything else, and `image` is
    then as it was.
    """
    raw = {_rawmode(tile) for tile in getattr(image, "tile", None) or ()}
    match = re.fullmatch(r"(RGB|RGBA|RGBa|RGBX|LA);16([BLN])", raw.pop() if len(raw) == 1 else "")
    if match is None:
        return None
    layout, order = match.groups()
    try:
        if layout == "LA":
            # Four bytes a pixel, as 8-bit RGBA has.
            loaded = _reopened(file, "RGBA")
            first, second = np.asarray(loaded)[..., 0::2], np.asarray(loaded)[..., 1::2]
        else:
            # RGBa: as it is, because Pillow would divide by alpha with 8 bits.
            plain = "RGBA" if layout == "RGBa" else layout
            first = np.asarray(_reopened(file, f"{plain};16B"))
            loaded = _reopened(file, f"{plain};16L")
            second = np.asarray(loaded)
    except ValueError:  # a Pillow that lacks one of these
        return None
    little = order == "L" or (order == "N" and sys.byteorder == "little")
    high, low = (second, first) if little else (first, second)
    samples = high.astype(np.uint16)
    samples <<= 8
    samples |= low
    if layout == "RGBX":
        samples = samples[..., :3]
    if layout == "RGBa":
        alpha = samples[..., 3:].astype(np.float32)
        colour = samples[..., :3] * (65535 / np.maximum(alpha, 1))
        samples[..., :3] = np.minimum(colour + 0.5, 65535)
    return loaded, _keyed(samples, image.info.get("transparency"))


def _rawmode(tile: Any) -> str:
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


def _samples(image: Image.Image, notes: list[str]) -> tuple[np.ndarray, float, str]:
    """Samples h w c, the value of white, and the colour space that they were converted from, if any."""
    mode = image.mode
    key = image.info.get("transparency")
    if mode.startswith("I;16"):
        return _keyed(np.asarray(image).astype(np.uint16)[..., None], key), 65535, ""
    if mode in ("I", "F"):
        values = np.asarray(image)[..., None]
        if not np.isfinite(values).all():
            notes.append("values that are no numbers were read as 0")
            values = np.nan_to_num(values, nan=0.0, posinf=0.0, neginf=0.0)
        scales = (1, 255, 65535) if mode == "F" else (65535,)
        if mode == "I" and image.format == "PNG":
            return _keyed(values.astype(np.uint16), key), 65535, ""
        peak = float(values.max())
        maximum = next((scale for scale in scales if peak <= scale), 2**31 - 1)
        if maximum != 1:
            notes.append(f"32-bit values, of up to {peak:g}, were divided by {maximum}")
        return np.clip(values, 0, maximum).astype(np.float32), maximum, ""
    if mode in ("CMYK", "LAB"):
        return np.asarray(_managed(image, notes)), 255, mode
    if mode in ("1", "L"):
        return _keyed(np.asarray(image.convert("L"))[..., None], key), 255, ""
    if mode in ("P", "PA"):
        see_through = mode == "PA" or key is not None
        return np.asarray(image.convert("RGBA" if see_through else "RGB")), 255, ""
    if mode == "RGB":
        return _keyed(np.asarray(image), key), 255, ""
    target = {"La": "LA", "LA": "LA", "RGBA": "RGBA", "RGBa": "RGBA"}.get(mode, "RGB")
    return np.asarray(image.convert(target)), 255, ""


def _keyed(samples: np.ndarray, key: Any) -> np.ndarray:
    """Alpha from the one colour that a file names as transparent; without one, the samples."""
    if key is None or isinstance(key, bytes) or samples.shape[-1] not in (1, 3):
        return samples
    shown = (samples != np.asarray(key).astype(samples.dtype)).any(-1, keepdims=True)
    return np.concatenate([samples, shown * samples.dtype.type(np.iinfo(samples.dtype).max)], -1)


def _managed(image: Image.Image, notes: list[str]) -> Image.Image:
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


def _file_bits(image: Image.Image) -> int:
    """Bits per channel of a PNG or TIFF that is not loaded yet; 8 where nothing says otherwise."""
    if any(";16" in _rawmode(tile) for tile in getattr(image, "tile", None) or ()):
        return 16
    bits = getattr(image, "tag_v2", {}).get(258, 8)
    return max(bits) if isinstance(bits, tuple) else int(bits)


def _exif(image: Image.Image) -> tuple[bytes | None, int]:
    """EXIF without what describes the stored pixels, and the orientation."""
    try:
        tags = image.getexif()
        # Pillow turns a TIFF while it loads it; not every version says so afterwards.
        orientation = 1 if image.format == "TIFF" else tags.get(ORIENTATION, 1)
        _strip(tags)
        return (tags.tobytes() if len(tags) else None), orientation
    # Cameras and editors write all kinds of broken tags; the picture is worth more than they are.
    except Exception:
        return None, 1


def _strip(tags: Image.Exif) -> None:
    for tag in STORAGE_TAGS.intersection(tags):
        del tags[tag]


def _upright(samples: np.ndarray, orientation: int) -> np.ndarray:
    """Apply an EXIF orientation (1 to 8) to h w c samples."""
    if orientation in (5, 6, 7, 8):
        samples = samples.swapaxes(0, 1)
    if orientation in (3, 4, 7, 8):
        samples = samples[::-1]
    if orientation in (2, 3, 6, 7):
        samples = samples[:, ::-1]
    return samples


def _fits(profile: Any, channels: int) -> bool:
    """Whether an ICC profile is one, and for this many channels."""
    if not isinstance(profile, bytes) or len(profile) < 128 or profile[36:40] != b"acsp":
        return False
    return profile[16:20] == (b"GRAY" if channels < 3 else b"RGB ")


PICTURE_STARTS = {
    b"\xff\xd8\xff": "JPEG",
    b"\x89PNG": "PNG",
    b"GIF8": "GIF",
    b"BM": "BMP",
    b"8BPS": "Photoshop file",
}
OTHER_STARTS = {
    b"%PDF": "a PDF document; export its page as PNG",
    b"PK\x03\x04": "a ZIP archive; unpack it first",
    b"Rar!": "a RAR archive; unpack it first",
    b"7z\xbc\xaf": "a 7-Zip archive; unpack it first",
    b"\x1f\x8b": "a compressed file; unpack it first",
    b"<svg": "an SVG drawing; export it as PNG",
    b"<?xml": "an XML file, perhaps an SVG drawing; export it as PNG",
    b"<": "a web page; the download went wrong, save the picture itself",
    b"{": "a text file (JSON)",
    b"version https://git-lfs": "a Git LFS pointer; fetch the file itself with `git lfs pull`",
}


def _what_is(path: Path) -> str:
    """Why Pillow does not know a file, from its first bytes."""
    with path.open("rb") as file:
        start = file.read(64)
    if start[:4] == b"RIFF" and start[8:12] == b"WEBP":
        return "this WebP file is cut short or damaged; get it again"
    if start[:4] in (b"II*\0", b"MM\0*", b"II+\0", b"MM\0+"):
        return (
            "this TIFF is damaged, or of a kind that Pillow cannot read (such as floating-point "
            "RGB); save it as an 8 or 16-bit PNG or TIFF"
        )
    if start[4:8] == b"ftyp":
        return (
            "is a picture or video of the HEIC, AVIF or MP4 family that Pillow cannot read here; "
            "convert it to JPEG or PNG"
        )
    for magic, name in PICTURE_STARTS.items():
        if start.startswith(magic):
            return f"this {name} is cut short or damaged; get it again"
    text = start.lstrip(b"\xef\xbb\xbf \t\r\n").lower()
    for magic, name in OTHER_STARTS.items():
        if start.startswith(magic) or text.startswith(magic.lower()):
            return f"is not a picture but {name}"
    return "is not a picture that can be read; JPEG, PNG, WebP, TIFF, GIF and BMP can, among others"


def _damaged(path: Path, error: BaseException) -> str:
    return (
        f"{path}: cut short or damaged ({error or type(error).__name__}); get the file again, or "
        "take what is there with truncated=True"
    )


def _reason(error: OSError) -> str:
    known = {
        errno.EACCES: "permission denied",
        errno.EPERM: "permission denied",
        errno.EROFS: "it lies on a read-only disk",
        errno.ENOSPC: "the disk is full; free some space",
        errno.EDQUOT: "your share of the disk is full; free some space",
        errno.ENAMETOOLONG: "the name is too long; shorten it",
    }
    return known.get(error.errno, error.strerror or str(error))


# Writing


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
    profile = like.icc if like is not None and _fits(like.icc, channels) else None

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
        raise PictureError(f"{path}: cannot be written: {_reason(error)}") from error
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
        _strip(tags)
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
