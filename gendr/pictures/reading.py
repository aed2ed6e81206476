"""Files to tensors: 16 bits, alpha, grey, EXIF, ICC, and sentences for what is no picture."""

from __future__ import annotations

import contextlib
import io
import os
import re
import sys
import threading
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO, Any

import numpy as np
import torch
from PIL import Image, ImageCms, ImageFile, UnidentifiedImageError

from .kinds import (
    ANIMATED,
    BLACK_POINT_COMPENSATION,
    CAMERA_RAW,
    MAX_PIXELS,
    ORIENTATION,
    PLANAR,
    VECTOR,
    Picture,
    PictureError,
    os_reason,
    profile_fits,
    strip_tags,
)


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
            raise PictureError(f"{path}: cannot be read: {os_reason(error)}") from error
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
        icc=profile if not space and profile_fits(profile, channels) else None,
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
        strip_tags(tags)
        return (tags.tobytes() if len(tags) else None), orientation
    # Cameras and editors write all kinds of broken tags; the picture is worth more than they are.
    except Exception:
        return None, 1


def _upright(samples: np.ndarray, orientation: int) -> np.ndarray:
    """Apply an EXIF orientation (1 to 8) to h w c samples."""
    if orientation in (5, 6, 7, 8):
        samples = samples.swapaxes(0, 1)
    if orientation in (3, 4, 7, 8):
        samples = samples[::-1]
    if orientation in (2, 3, 6, 7):
        samples = samples[:, ::-1]
    return samples


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
