"""Files to tensors: 16 bits, alpha, grey, EXIF, ICC, and sentences for what is no picture."""

from __future__ import annotations

import contextlib
import os
import threading
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any

import numpy as np
import torch
from PIL import Image, ImageFile, UnidentifiedImageError

from . import jpeg, metadata, modes, netpbm, png, tiff
from .failures import expect_file, what_is
from .kinds import (
    ANIMATED,
    CAMERA_RAW,
    MAX_PIXELS,
    ORIENTATION,
    VECTOR,
    CutShortError,
    Picture,
    PictureError,
    TooLargeError,
    os_reason,
    profile_fits,
)
from .values import Samples

TURNED = (5, 6, 7, 8)  # orientations that swap width and height


def read(
    path: str | os.PathLike[str], *, truncated: bool = False, max_pixels: int | None = MAX_PIXELS
) -> Picture:
    """Decode a file of any kind and mode that Pillow knows, and the deeper ones of TIFF and Netpbm.

    EXIF orientation is applied; palettes, CMYK (through its ICC profile), Lab, HSV and YCbCr become
    RGB; of an animation comes the first frame. More than 8 bits per channel are kept. Where white
    is not the largest number of the format, a note says what was taken for it.

    truncated: take what can be decoded of a file that is cut short, instead of an error.
    max_pixels: refuse larger pictures before decoding them; None = no limit.
    Raises PictureError.
    """
    path = Path(path)
    with _opened(path) as (file, settings):
        try:
            return _decode(file, path, max_pixels)
        except (PictureError, UnidentifiedImageError, MemoryError):
            raise
        except Exception:
            if not truncated:
                raise
            settings(truncated=True)
            picture = _decode(file, path, max_pixels, whole=False)
            picture.notes += ("the file is cut short or damaged; what is missing is empty",)
            return picture


def measure(path: str | os.PathLike[str], *, max_pixels: int | None = None) -> tuple[int, int]:
    """Height and width of a picture as it is shown, from its header alone. Raises PictureError.

    max_pixels: as of `read`.
    """
    path = Path(path)
    with _opened(path) as (file, _):
        source = _Source(file, path, max_pixels, whole=False, pixels=False)
        height, width = source.size
        return (width, height) if source.orientation() in TURNED else (height, width)


@contextlib.contextmanager
def _opened(path: Path) -> Iterator[tuple[IO[bytes], Callable[..., None]]]:
    """The file and Pillow's switches; whatever goes wrong inside becomes a PictureError."""
    try:
        expect_file(path)
        with _pillow() as settings, path.open("rb") as file:
            yield file, settings
    except PictureError as error:
        if str(error).startswith(str(path)):
            raise
        raise PictureError(f"{path}: {error}") from error
    except UnidentifiedImageError as error:
        raise PictureError(f"{path}: {what_is(path)}") from error
    except MemoryError as error:
        raise PictureError(f"{path}: too large for the memory that is free") from error
    except OSError as error:
        if error.errno is not None:
            raise PictureError(f"{path}: cannot be read: {os_reason(error)}") from error
        raise _damaged(path, error) from error
    # Whatever a decoder makes of damaged bytes: struct, zlib, index and key errors among others.
    except Exception as error:
        raise _damaged(path, error) from error


def _damaged(path: Path, error: BaseException) -> PictureError:
    return CutShortError(f"{path}: cut short or damaged ({error or type(error).__name__})")


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


@dataclass
class _Source:
    """A file that is known to be of some kind and size, and not decoded yet.

    whole: a part that is missing is an error. pixels: whether they will be asked for.
    """

    file: IO[bytes]
    path: Path
    max_pixels: int | None
    whole: bool = True
    pixels: bool = True
    notes: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.image: Image.Image | None = None
        self.page: tiff.Page | None = None
        self.png: png.Facts | None = None
        self.jpeg: jpeg.Facts | None = None
        self.netpbm = False
        self.frames = 1
        self.file.seek(0)
        start = self.file.read(16)
        if netpbm.is_ours(start):
            self.netpbm, self.kind = True, "PPM"
            self.size = netpbm.size(self.file)
            self.expect_size()
        elif start.startswith(png.SIGNATURE):
            self.kind = "PNG"
            _, self.png = png.parse(self.file, pixels=False)
            self.size = self.png.height, self.png.width
            self.expect_size()
            if self.pixels:
                self.open_png()
        elif start.startswith(tiff.STARTS):
            self.kind = "TIFF"
            self.open_tiff()
        else:
            self.open_other(start)

    def expect_size(self) -> None:
        height, width = self.size
        if self.max_pixels is not None and width * height > self.max_pixels:
            raise TooLargeError(
                f"{self.path}: {width}x{height} is {width * height / 1e6:.4g} megapixels, more "
                f"than the limit of {self.max_pixels / 1e6:.4g}"
            )

    def open_png(self) -> None:
        self.file, self.png = png.parse(self.file)
        self.notes += self.png.notes
        self.frames = self.png.frames
        self.image = Image.open(self.file)
        self.image.info["icc_profile"] = self.png.icc
        if self.png.key is not None:
            self.image.info["transparency"] = self.png.key

    def open_tiff(self) -> None:
        if self.path.suffix.lower() in CAMERA_RAW:
            raise PictureError(
                f"{self.path}: is a camera's raw file, of which only the small preview could be "
                "read; develop it to a 16-bit TIFF or PNG first"
            )
        try:
            self.page, self.frames = tiff.choose(self.file, self.notes)
        except Exception as error:
            raise UnidentifiedImageError(str(error)) from error
        self.size = int(self.page.first(tiff.HEIGHT, 0)), int(self.page.first(tiff.WIDTH, 0))
        self.expect_size()
        self.file = tiff.at(self.file, self.page)
        if self.pixels and not tiff.readable(self.page):
            self.image = Image.open(self.file)

    def open_other(self, start: bytes) -> None:
        self.file.seek(0)
        self.image = Image.open(self.file)
        self.kind = "JPEG" if self.image.format == "MPO" else self.image.format or ""
        if self.kind in VECTOR:
            raise PictureError(f"{self.path}: is a drawing ({self.kind}); export it as PNG first")
        width, height = self.image.size
        self.size = height, width
        self.expect_size()
        if not self.pixels:
            return
        if self.kind == "JPEG":
            self.file, self.jpeg = jpeg.prepared(self.file, self.whole)
            self.image = Image.open(self.file)
        elif self.kind in ANIMATED:
            self.frames = _frames(self.image)
            # Counting moves through the file, and stays where a damaged frame ends it.
            self.file.seek(0)
            self.image = Image.open(self.file)

    def tags(self) -> Image.Exif:
        """EXIF as it is stored; whatever a broken one raises."""
        tags = Image.Exif()
        if self.page is not None:
            tags.endian, tags.bigtiff = self.page.endian, self.page.big
            tags.load_from_fp(self.file, self.page.offset)
        elif self.png is not None:
            if self.png.exif:
                tags.load(self.png.exif)
        elif self.image is not None:
            tags = self.image.getexif()
        return tags

    def orientation(self) -> int:
        with contextlib.suppress(Exception):
            found = self.tags().get(ORIENTATION)
            if isinstance(found, (int, float)):
                return int(found)
        return metadata.xmp_orientation(self.beside()["xmp"])

    def beside(self) -> dict[str, Any]:
        """Fields of `Picture` that do not depend on the pixels."""
        if self.png is not None:
            png = self.png
            return {
                **{"xmp": png.xmp, "iptc": png.iptc, "dpi": png.dpi},
                **{"colour": tuple(png.colour), "text": tuple(png.text)},
            }
        info = self.image.info if self.image is not None else {}
        if self.kind == "JPEG" and "xmp" not in info:
            # Older Pillows do not tell it there.
            segments = getattr(self.image, "applist", [])
            info = info | {"xmp": metadata.xmp_of_segments(segments)}
        return metadata.beside(info, self.page.tags if self.page else {}, self.kind)

    def profile(self) -> bytes | None:
        if self.page is not None:
            return tiff.profile(self.page)
        return self.image.info.get("icc_profile") if self.image is not None else None

    def samples(self) -> Samples:
        """Decode."""
        if self.netpbm:
            return netpbm.decode(self.file, self.notes, self.whole)
        if self.page is not None and tiff.readable(self.page):
            return tiff.decode(self.file, self.page, self.notes, self.whole)
        bits = modes.file_bits(self.image, self.kind, self.file)
        wide = modes.sixteen_bits(self.image, self.file) if self.page is None else None
        if wide is None:
            self.image.load()
        if self.png is not None and self.whole:
            png.expect_rows(self.png, self.file)
        if self.jpeg is not None and self.whole:
            self.notes += jpeg.expect_whole(self.image, self.file, self.jpeg)
        found = wide or modes.samples(self.image, self.kind, bits, self.notes)
        if self.page is not None:
            tiff.left_out(tiff.unread(self.page, found.values.shape[-1]), self.notes)
        return found._replace(upright=self.kind == "TIFF" and self._turned(found.values))

    def _turned(self, values: np.ndarray) -> bool:
        """Whether Pillow has turned these samples of a TIFF while it loaded it.

        It does so for the tag. For an orientation in XMP alone newer ones do; sides tell it.
        """
        with contextlib.suppress(Exception):
            if self.tags().get(ORIENTATION):
                return True
        swaps = self.orientation() in TURNED and self.size[0] != self.size[1]
        return not swaps or values.shape[:2] != tuple(self.size)


def _frames(image: Image.Image) -> int:
    try:
        return int(getattr(image, "n_frames", 1))
    # A later frame is damaged: the first one is all that is wanted.
    except Exception:
        return 1


def _decode(file: IO[bytes], path: Path, max_pixels: int | None, whole: bool = True) -> Picture:
    source = _Source(file, path, max_pixels, whole)
    notes = source.notes
    if source.frames > 1:
        notes.append(f"the first of {source.frames} frames; the others are left out")
    samples = source.samples()
    values = samples.values
    if not samples.upright:
        values = _upright(values, source.orientation())
    height, width, channels = values.shape
    pixels = np.empty((channels, height, width), np.float32)
    for channel in range(channels):
        np.divide(values[..., channel], np.float32(samples.white), out=pixels[channel])
    profile = source.profile()
    fits = profile_fits(profile, channels)
    if profile and not fits and not samples.converted:
        notes.append("its colour profile is damaged or for other channels, and was left out")
    beside = source.beside()
    exif, dpi = metadata.exif_of(source.tags)
    return Picture(
        pixels=torch.from_numpy(pixels)[None],
        bits=8 if samples.bits <= 8 else 16,
        grey=channels < 3,
        exif=exif,
        # What was converted is sRGB now, whatever the file's profile says.
        icc=profile if not samples.converted and fits else None,
        xmp=metadata.upright_xmp(beside["xmp"]),
        iptc=beside["iptc"],
        dpi=beside.get("dpi") or dpi,
        colour=beside.get("colour", ()),
        text=beside.get("text", ()),
        format=source.kind,
        frames=source.frames,
        path=path,
        notes=tuple(notes),
    )


def _upright(values: np.ndarray, orientation: int) -> np.ndarray:
    """Apply an EXIF orientation (1 to 8) to h w c samples."""
    if orientation in TURNED:
        values = values.swapaxes(0, 1)
    if orientation in (3, 4, 7, 8):
        values = values[::-1]
    if orientation in (2, 3, 6, 7):
        values = values[:, ::-1]
    return values
