"""Files: nothing is lost in silence, and what goes wrong is said in words that help."""

import errno
import io
import os
import struct
import sys
import threading
import zlib
from itertools import product

import numpy as np
import pytest
import torch
from PIL import Image, ImageCms, ImageFile

from gendr.pictures import Picture, PictureError, kinds, modes, read, write, writing
from gendr.pictures import png as png_chunks

SRGB = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
MAKE, DATE, RATING = 271, 0x9003, 18246


def profile(space):
    """A file that is an ICC profile as far as its header says."""
    return SRGB[:16] + space + SRGB[20:]


def noise(*shape, dtype=np.uint8, seed=0):
    high = np.iinfo(dtype).max
    return np.random.default_rng(seed).integers(0, high, shape, dtype, endpoint=True)


def integers(pixels, white):
    """1 c h w in [0, 1] -> h w c, exactly the integers that were divided by `white`."""
    values = pixels[0].permute(1, 2, 0).double().numpy() * white
    assert np.abs(values - values.round()).max() < 0.01
    return values.round().astype(int)


def tagged(orientation=1):
    exif = Image.Exif()
    exif[MAKE], exif[RATING] = "Maker", 4
    exif[kinds.ORIENTATION] = orientation
    exif[kinds.EXIF_IFD] = {DATE: "2026:11:23 12:00:00", 0xA002: 5, 0xA003: 7}
    exif[kinds.GPS_IFD] = {1: "N", 2: (47.0, 22.0, 1.5)}
    return exif


def header(path):
    """What Pillow says about a file beside its pixels."""
    with Image.open(path) as image:
        return image.info


def chunk(kind, data):
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def png(samples, *, interlaced=False, extra=b""):
    """A 16-bit PNG of h w c samples, unfiltered, made by hand."""
    height, width, channels = samples.shape
    passes = [(0, 0, 1, 1)]
    if interlaced:
        passes = [(0, 0, 8, 8), (0, 4, 8, 8), (4, 0, 8, 4), (0, 2, 4, 4)]
        passes += [(2, 0, 4, 2), (0, 1, 2, 2), (1, 0, 2, 1)]
    data = b""
    for y, x, dy, dx in passes:
        for row in samples[y::dy, x::dx].astype(">u2"):
            data += b"\0" + row.tobytes() if row.size else b""
    kind = {1: 0, 2: 4, 3: 2, 4: 6}[channels]
    head = struct.pack(">IIBBBBB", width, height, 16, kind, 0, 0, int(interlaced))
    parts = chunk(b"IHDR", head), extra, chunk(b"IDAT", zlib.compress(data)), chunk(b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + b"".join(parts)


def tiff(
    samples, *, order="<", deflate=False, alpha=None, orientation=1, sample_format=1, planes=False
):
    """A TIFF of h w c samples of any size, made by hand: in two strips, or one for each channel."""
    height, width, channels = samples.shape
    half = height if planes else (height + 1) // 2
    bits = samples.dtype.itemsize * 8
    stored = samples.astype(samples.dtype.newbyteorder(order))
    strips = [stored[:half].tobytes(), stored[half:].tobytes()]
    if planes:
        strips = [stored[..., channel].tobytes() for channel in range(channels)]
    if deflate:
        strips = [zlib.compress(strip) for strip in strips]
    tags = {256: [width], 257: [height], 258: [bits] * channels, 259: [8 if deflate else 1]}
    tags |= {262: [1 if channels < 3 else 2], 273: [], 274: [orientation], 277: [channels]}
    tags |= {278: [half], 279: [len(strip) for strip in strips]}
    if alpha is not None:
        tags[338] = [alpha]
    tags[284], tags[339] = [2 if planes else 1], [sample_format] * channels
    beyond = 8 + 2 + 12 * len(tags) + 4
    tags[273] = tags[279]
    start = beyond + sum(4 * len(values) for values in tags.values() if len(values) > 1)
    tags[273] = [start + sum(tags[279][:n]) for n in range(len(strips))]
    entries, behind = b"", b""
    for tag, values in sorted(tags.items()):
        packed = struct.pack(f"{order}{len(values)}I", *values)
        if len(values) > 1:
            packed, behind = struct.pack(f"{order}I", beyond + len(behind)), behind + packed
        entries += struct.pack(f"{order}HHI", tag, 4, len(values)) + packed
    head = {"<": b"II", ">": b"MM"}[order] + struct.pack(f"{order}HIH", 42, 8, len(tags))
    return head + entries + bytes(4) + behind + b"".join(strips)


def saved(folder, image, name, **options):
    path = folder / name
    image.save(path, **options)
    return path


def stored(folder, data, name):
    path = folder / name
    path.write_bytes(data)
    return path


# Reading: modes


@pytest.mark.parametrize(
    ("mode", "channels"),
    [
        *(("1", 1), ("L", 1), ("LA", 2), ("La", 2), ("I;16", 1), ("I;16B", 1), ("I;16L", 1)),
        *(("I", 1), ("F", 1), ("P", 3), ("PA", 4), ("RGB", 3), ("RGBX", 3), ("RGBA", 4)),
        *(("RGBa", 4), ("CMYK", 3), ("YCbCr", 3), ("LAB", 3), ("HSV", 3)),
    ],
)
def test_every_mode_of_pillow_has_samples(mode, channels):
    samples = modes.samples(Image.new(mode, (5, 3)), "", 8, [])
    assert samples.values.shape == (3, 5, channels)
    assert samples.white >= samples.values.max()


@pytest.mark.parametrize("mode", ["L", "LA", "RGB", "RGBA"])
@pytest.mark.parametrize("suffix", ["png", "tif", "webp"])
def test_eight_bits_come_back(tmp_path, mode, suffix):
    samples = noise(6, 9, len(mode))
    image = Image.fromarray(samples[..., 0] if mode == "L" else samples)
    picture = read(saved(tmp_path, image, f"a.{suffix}", lossless=True, exact=True))
    expected = (
        samples
        if suffix != "webp"
        else np.asarray(image.convert("RGB" + mode[-1:] * ("A" in mode)))
    )
    assert np.array_equal(integers(picture.pixels, 255), expected)
    assert picture.bits == 8
    assert picture.grey == (mode in ("L", "LA") and suffix != "webp")
    assert picture.format == {"png": "PNG", "tif": "TIFF", "webp": "WEBP"}[suffix]
    assert picture.frames == 1
    assert not picture.notes


def test_black_and_white(tmp_path):
    samples = noise(5, 11) > 127
    picture = read(saved(tmp_path, Image.fromarray(samples), "a.png"))
    assert np.array_equal(integers(picture.pixels, 1)[..., 0], samples)
    assert picture.grey


@pytest.mark.parametrize("transparent", [None, 3, bytes([0, 128, 255, 7])])
def test_palettes(tmp_path, transparent):
    image = Image.new("P", (7, 6))
    image.putdata((noise(42) % 4).tolist())
    image.putpalette([9, 8, 7, 255, 0, 0, 0, 255, 0, 0, 0, 255])
    options = {} if transparent is None else {"transparency": transparent}
    picture = read(saved(tmp_path, image, "a.png", **options))
    assert picture.pixels.shape[1] == (3 if transparent is None else 4)
    indices = np.asarray(image)
    colours = np.array([[9, 8, 7], [255, 0, 0], [0, 255, 0], [0, 0, 255]])
    got = integers(picture.pixels, 255)
    assert np.array_equal(got[..., :3], colours[indices])
    if transparent == 3:
        assert np.array_equal(got[..., 3], np.where(indices == 3, 0, 255))
    elif transparent:
        assert np.array_equal(got[..., 3], np.array([0, 128, 255, 7])[indices])


def test_a_transparent_colour_becomes_alpha(tmp_path):
    grey = noise(6, 7)
    grey[2, 3] = 77
    picture = read(saved(tmp_path, Image.fromarray(grey), "grey.png", transparency=77))
    assert np.array_equal(integers(picture.pixels, 255)[..., 1], np.where(grey == 77, 0, 255))
    colour = noise(6, 7, 3)
    colour[2, 3] = 10, 20, 30
    path = saved(tmp_path, Image.fromarray(colour), "rgb.png", transparency=(10, 20, 30))
    assert integers(read(path).pixels, 255)[2, 3].tolist() == [10, 20, 30, 0]
    wide = noise(6, 7, 3, dtype=np.uint16)
    wide[2, 3] = 1000, 2000, 3000
    key = chunk(b"tRNS", struct.pack(">3H", 1000, 2000, 3000))
    alpha = integers(read(stored(tmp_path, png(wide, extra=key), "wide.png")).pixels, 65535)[..., 3]
    assert alpha[2, 3] == 0
    assert (alpha == 0).sum() == 1
    one = noise(6, 7, 1, dtype=np.uint16)
    key = chunk(b"tRNS", struct.pack(">H", int(one[1, 1, 0])))
    got = integers(read(stored(tmp_path, png(one, extra=key), "one.png")).pixels, 65535)
    assert got[1, 1].tolist() == [one[1, 1, 0], 0]


@pytest.mark.parametrize("channels", [1, 2, 3, 4])
@pytest.mark.parametrize("interlaced", [False, True])
@pytest.mark.parametrize("size", [(1, 1), (3, 2), (17, 13)])
def test_sixteen_bit_png_loses_nothing(tmp_path, channels, interlaced, size):
    samples = noise(*size, channels, dtype=np.uint16)
    picture = read(stored(tmp_path, png(samples, interlaced=interlaced), "a.png"))
    assert np.array_equal(integers(picture.pixels, 65535), samples)
    assert picture.bits == 16
    assert picture.grey == (channels < 3)
    assert not picture.notes


@pytest.mark.parametrize("order", ["<", ">"])
@pytest.mark.parametrize("deflate", [False, True])
@pytest.mark.parametrize(("channels", "alpha"), [(1, None), (3, None), (4, None), (4, 2), (4, 0)])
def test_sixteen_bit_tiff_loses_nothing(tmp_path, order, deflate, channels, alpha):
    samples = noise(7, 6, channels, dtype=np.uint16)
    data = tiff(samples, order=order, deflate=deflate, alpha=alpha)
    picture = read(stored(tmp_path, data, "a.tif"))
    expected = samples[..., :3] if alpha == 0 else samples
    assert np.array_equal(integers(picture.pixels, 65535), expected)
    assert picture.bits == 16


def test_sixteen_bit_tiff_with_multiplied_alpha(tmp_path):
    samples = noise(5, 6, 4, dtype=np.uint16)
    samples[..., 3] |= 0x4000
    multiplied = samples.copy()
    multiplied[..., :3] = samples[..., :3].astype(float) * samples[..., 3:] / 65535 + 0.5
    picture = read(stored(tmp_path, tiff(multiplied, alpha=1), "a.tif"))
    assert np.abs(integers(picture.pixels, 65535) - samples).max() <= 4


@pytest.mark.parametrize("deflate", [False, True])
def test_sixteen_bit_tiff_is_turned_once(tmp_path, deflate):
    samples = noise(5, 8, 3, dtype=np.uint16)
    data = tiff(samples, deflate=deflate, orientation=6)
    picture = read(stored(tmp_path, data, "a.tif"))
    assert np.array_equal(integers(picture.pixels, 65535), np.rot90(samples, -1))


def test_what_pillow_reduces_to_eight_bits_is_noted(tmp_path, monkeypatch):
    monkeypatch.setattr(modes, "sixteen_bits", lambda image, file: None)
    samples = noise(5, 6, 3, dtype=np.uint16)
    picture = read(stored(tmp_path, png(samples), "a.png"))
    assert np.array_equal(integers(picture.pixels, 255), samples >> 8)
    assert picture.bits == 8
    assert picture.notes == ("16 bits per channel were read as 8",)


@pytest.mark.parametrize("deflate", [False, True])
@pytest.mark.parametrize("dtype", [np.uint8, np.uint16])
@pytest.mark.parametrize(("channels", "alpha"), [(2, 2), (3, None), (4, 2)])
def test_separate_planes_are_read(tmp_path, deflate, dtype, channels, alpha):
    samples = noise(5, 6, channels, dtype=dtype)
    path = stored(tmp_path, tiff(samples, planes=True, deflate=deflate, alpha=alpha), "a.tif")
    picture = read(path)
    assert np.array_equal(integers(picture.pixels, np.iinfo(dtype).max), samples)
    assert not picture.notes


def test_without_the_raw_modes_eight_bits_are_read(tmp_path, monkeypatch):
    def lacking(file, rawmode):
        raise ValueError("unrecognized raw mode")

    monkeypatch.setattr(modes, "_reopened", lacking)
    samples = noise(5, 6, 4, dtype=np.uint16)
    picture = read(stored(tmp_path, png(samples), "a.png"))
    assert np.array_equal(integers(picture.pixels, 255), samples >> 8)
    assert picture.notes == ("16 bits per channel were read as 8",)


@pytest.mark.parametrize(
    ("peak", "divisor"), [(1.0, 1), (255.0, 255), (65535.0, 65535), (1e9, 2**31 - 1)]
)
def test_floating_point_values_are_scaled_and_noted(tmp_path, peak, divisor):
    values = np.linspace(0, peak, 42, dtype=np.float32).reshape(6, 7)
    picture = read(saved(tmp_path, Image.fromarray(values), "a.tif"))
    assert torch.allclose(picture.pixels[0, 0], torch.from_numpy(values / np.float32(divisor)))
    assert picture.bits == 16
    assert len(picture.notes) == (divisor != 1)


def test_values_that_are_no_numbers_become_zero(tmp_path):
    values = np.full((4, 5), 0.5, np.float32)
    values[1, 1], values[2, 2] = np.nan, np.inf
    picture = read(saved(tmp_path, Image.fromarray(values), "a.tif"))
    assert picture.pixels[0, 0, 1, 1] == picture.pixels[0, 0, 2, 2] == 0
    assert picture.pixels[0, 0, 0, 0] == 0.5
    assert "no numbers" in picture.notes[0]


def test_integers_of_32_bits(tmp_path):
    values = np.arange(42, dtype=np.int32).reshape(6, 7) * 1000
    picture = read(saved(tmp_path, Image.fromarray(values), "a.tif"))
    assert np.array_equal(integers(picture.pixels, 65535)[..., 0], values)


# Reading: colour


def cmyk_profile():
    """Pillow can make none; this one is sRGB's, and says that it is CMYK's."""
    return profile(b"CMYK")


def test_cmyk_without_a_profile_is_approximated(tmp_path):
    image = Image.new("CMYK", (6, 4), (0, 255, 255, 0))
    picture = read(saved(tmp_path, image, "a.tif"))
    red = integers(picture.pixels, 255)[0, 0]
    assert red[0] > 200
    assert red[1:].max() < 60
    assert picture.icc is None
    assert "approximation" in picture.notes[0]


@pytest.mark.parametrize("suffix", ["jpg", "tif"])
def test_cmyk_goes_through_its_profile(tmp_path, monkeypatch, suffix):
    asked = []

    def convert(image, source, target, **options):
        asked.append((image.mode, options["outputMode"]))
        return Image.new("RGB", image.size, (1, 2, 3))

    monkeypatch.setattr(ImageCms, "profileToProfile", convert)
    monkeypatch.setattr(ImageCms, "ImageCmsProfile", lambda file: file.read())
    image = Image.new("CMYK", (6, 4), (0, 255, 255, 0))
    picture = read(saved(tmp_path, image, f"a.{suffix}", icc_profile=cmyk_profile()))
    assert asked == [("CMYK", "RGB")]
    assert integers(picture.pixels, 255)[0, 0].tolist() == [1, 2, 3]
    assert picture.icc is None
    assert not picture.notes


def test_a_broken_cmyk_profile_is_noted(tmp_path):
    image = Image.new("CMYK", (6, 4))
    picture = read(saved(tmp_path, image, "a.tif", icc_profile=cmyk_profile()[:200]))
    assert picture.icc is None
    assert "approximation" in picture.notes[0]


def test_lab_becomes_srgb(tmp_path):
    image = Image.new("LAB", (6, 4), (138, 128, 128))
    picture = read(saved(tmp_path, image, "a.tif"))
    grey = integers(picture.pixels, 255)[0, 0]
    assert np.ptp(grey) <= 3
    assert 120 <= grey[0] <= 140


@pytest.mark.parametrize(
    ("mode", "space", "kept"),
    [
        *(("RGB", b"RGB ", True), ("RGBA", b"RGB ", True), ("P", b"RGB ", True)),
        *(("RGB", b"CMYK", False), ("RGB", b"GRAY", False)),
        *(("L", b"GRAY", True), ("L", b"RGB ", False)),
    ],
)
@pytest.mark.parametrize("suffix", ["png", "tif"])
def test_an_icc_profile_stays_where_it_fits(tmp_path, mode, space, kept, suffix):
    path = saved(tmp_path, Image.new(mode, (4, 3)), f"a.{suffix}", icc_profile=profile(space))
    picture = read(path)
    assert picture.icc == (profile(space) if kept else None)
    out = read(write(tmp_path / f"b.{suffix}", picture.pixels, picture))
    assert out.icc == picture.icc


def test_a_profile_of_another_colour_space_is_not_written(tmp_path):
    like = Picture(torch.rand(1, 3, 4, 4), icc=profile(b"CMYK"))
    assert "icc_profile" not in header(write(tmp_path / "a.png", like.pixels, like))
    like.icc = SRGB
    assert "icc_profile" not in header(write(tmp_path / "b.png", like.pixels[:, :1], like))
    assert header(write(tmp_path / "c.png", like.pixels, like))["icc_profile"] == SRGB


# Reading: EXIF, frames, names


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("suffix", ["png", "tif", "jpg", "webp"])
def test_orientation_is_applied_and_reset(tmp_path, orientation, suffix):
    samples = np.zeros((16, 24, 3), np.uint8)
    samples[:8, :8, 0] = samples[8:, 16:, 1] = samples[:8, 16:, 2] = 255
    image = Image.fromarray(samples)
    path = saved(tmp_path, image, f"a.{suffix}", exif=tagged(orientation).tobytes(), quality=100)
    turned = {
        1: samples,
        2: samples[:, ::-1],
        3: samples[::-1, ::-1],
        4: samples[::-1],
        5: samples.swapaxes(0, 1),
        6: np.rot90(samples, -1),
        7: np.rot90(samples, 2).swapaxes(0, 1),
        8: np.rot90(samples),
    }[orientation]
    picture = read(path)
    assert np.array_equal((picture.pixels[0].permute(1, 2, 0) > 0.5).numpy(), turned > 127)
    exif = Image.Exif()
    exif.load(picture.exif)
    assert kinds.ORIENTATION not in exif
    assert exif[MAKE] == "Maker"


@pytest.mark.parametrize("wide", [False, True])
@pytest.mark.parametrize("source", ["jpg", "png", "webp", "tif"])
@pytest.mark.parametrize("suffix", ["jpg", "png", "webp", "tif"])
def test_exif_goes_from_file_to_file(tmp_path, source, suffix, wide):
    picture = read(
        saved(tmp_path, Image.new("RGB", (5, 7)), f"a.{source}", exif=tagged(3).tobytes())
    )
    picture.bits = 16 if wide else 8
    path = write(tmp_path / f"b.{suffix}", torch.rand(1, 3, 28, 20), picture)
    with Image.open(path) as image:
        image.load()
        exif = image.getexif()
        assert exif.get(kinds.ORIENTATION, 1) == 1
        assert (exif[MAKE], exif[RATING]) == ("Maker", 4)
        details = exif.get_ifd(kinds.EXIF_IFD)
        assert details[DATE] == "2026:11:23 12:00:00"
        assert (details[0xA002], details[0xA003]) == (20, 28)
        assert exif.get_ifd(kinds.GPS_IFD)[2] == (47.0, 22.0, 1.5)
    assert read(path).pixels.shape == (1, 3, 28, 20)


def test_storage_tags_of_a_tiff_do_not_travel(tmp_path):
    picture = read(stored(tmp_path, tiff(noise(5, 6, 3, dtype=np.uint16), deflate=True), "a.tif"))
    assert picture.exif is None


def test_broken_exif_costs_the_exif_alone(tmp_path):
    path = saved(tmp_path, Image.new("RGB", (5, 7)), "a.jpg", exif=b"Exif\0\0II*\0\xff\xff\xff\x7f")
    assert read(path).pixels.shape == (1, 3, 7, 5)
    like = Picture(torch.rand(1, 3, 4, 4), exif=b"Exif\0\0rubbish, not a directory")
    with pytest.warns(UserWarning, match="without EXIF"):
        write(tmp_path / "b.png", like.pixels, like)
    assert read(tmp_path / "b.png").exif is None


def test_exif_too_long_for_jpeg_loses_the_makers_block_first(tmp_path):
    exif = tagged()
    exif[kinds.EXIF_IFD] = {DATE: "2026:11:23 12:00:00", kinds.MAKER_NOTE: bytes(70000)}
    like = Picture(torch.rand(1, 3, 4, 4), exif=exif.tobytes())
    kept = Image.Exif()
    kept.load(header(write(tmp_path / "a.jpg", like.pixels, like))["exif"])
    assert kept[MAKE] == "Maker"
    exif[315] = "x" * 70000
    like.exif = exif.tobytes()
    with pytest.warns(UserWarning, match="JPEG holds"):
        write(tmp_path / "b.jpg", like.pixels, like)


@pytest.mark.parametrize("suffix", ["gif", "png", "webp", "tif"])
def test_of_an_animation_comes_the_first_frame(tmp_path, suffix):
    frames = [Image.new("RGB", (8, 6), (80 * i, 10, 20)) for i in range(3)]
    options = {"save_all": True, "append_images": frames[1:], "lossless": True}
    picture = read(saved(tmp_path, frames[0], f"a.{suffix}", **options))
    assert picture.frames == 3
    assert picture.notes == ("the first of 3 frames; the others are left out",)
    assert np.abs(integers(picture.pixels, 255)[0, 0, :3] - [0, 10, 20]).max() <= 1


def test_an_animation_with_a_damaged_later_frame_gives_its_first(tmp_path):
    frames = [Image.fromarray(noise(20, 30, seed=i)) for i in range(4)]
    path = saved(tmp_path, frames[0], "a.gif", save_all=True, append_images=frames[1:])
    expected, data = read(path).pixels, path.read_bytes()
    for end in (len(data) // 2, len(data) * 3 // 4, len(data) - 30):
        path.write_bytes(data[:end])
        assert read(path).pixels.equal(expected)
    spoilt = bytearray(data)
    spoilt[len(data) // 2 :: 7] = b"\xff" * len(spoilt[len(data) // 2 :: 7])
    path.write_bytes(bytes(spoilt))
    assert read(path).pixels.equal(expected)


def test_a_file_is_what_it_holds_not_what_it_is_called(tmp_path):
    Image.new("L", (4, 3)).save(tmp_path / "a.jpg", format="PNG")
    assert read(tmp_path / "a.jpg").format == "PNG"


def test_names_and_paths_of_any_kind(tmp_path):
    path = tmp_path / "Ünï cödé 图.PNG"
    write(str(path), torch.rand(1, 3, 4, 4))
    assert read(str(path)).path == path


# Reading: what goes wrong


def test_missing_folder_and_empty(tmp_path):
    with pytest.raises(PictureError, match=r"none\.png: there is no such file"):
        read(tmp_path / "none.png")
    with pytest.raises(PictureError, match="is a folder"):
        read(tmp_path)
    with pytest.raises(PictureError, match="0 bytes"):
        read(stored(tmp_path, b"", "empty.png"))


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="needs named pipes")
def test_pipes_do_not_hang(tmp_path):
    os.mkfifo(tmp_path / "pipe.png")
    with pytest.raises(PictureError, match="not a regular file"):
        read(tmp_path / "pipe.png")


def test_a_file_that_may_not_be_read(tmp_path, monkeypatch):
    path = saved(tmp_path, Image.new("L", (4, 3)), "a.png")

    def refuse(*args):
        raise PermissionError(errno.EACCES, "Permission denied")

    monkeypatch.setattr(type(path), "open", refuse)
    with pytest.raises(PictureError, match="cannot be read: permission denied"):
        read(path)


@pytest.mark.parametrize(
    ("data", "text"),
    [
        (b"<!DOCTYPE html><html></html>", "a web page"),
        (b"  \n<html>", "a web page"),
        (b"%PDF-1.7 something", "a PDF document"),
        (b"PK\x03\x04 something", "a ZIP archive"),
        (b"<svg xmlns='x'></svg>", "an SVG drawing"),
        (b"version https://git-lfs.github.com/spec/v1", "git lfs pull"),
        (b"\0\0\0\x18ftypheic\0\0\0\0mif1heic", "HEIC"),
        (b"hello, this is text", "not a picture that can be read"),
        (b"\x89PNG\r\n\x1a\n", "this PNG is cut short"),
        (b"\xff\xd8\xff\xe0", "this JPEG is cut short"),
        (b"RIFF\x10\0\0\0WEBPVP8 ", "cut short"),
        (b"RIFF\x10\0\0\0WEBP", "this WebP file is cut short"),
        (b"II*\0\x08\0\0\0", "damaged"),
        (b"\x7fELF" + bytes(range(256)) * 9, "not a picture that can be read"),
    ],
)
def test_what_is_no_picture_is_named(tmp_path, data, text):
    with pytest.raises(PictureError, match=text) as info:
        read(stored(tmp_path, data, "photo.jpg"))
    assert "photo.jpg" in str(info.value)


def test_kinds_that_pillow_would_misread(tmp_path):
    data = tiff(noise(5, 6, 3))
    with pytest.raises(PictureError, match="raw file"):
        read(stored(tmp_path, data, "a.dng"))
    with pytest.raises(PictureError, match="SampleFormat 6"):
        read(stored(tmp_path, tiff(noise(5, 6, 3, dtype=np.uint32), sample_format=6), "a.tif"))
    drawing = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 10 10\n%%EndComments\nshowpage\n"
    with pytest.raises(PictureError, match="drawing"):
        read(stored(tmp_path, drawing, "a.eps"))


CUT = ["a.jpg", "a.png", "a.webp", "a.gif", "a.tif", "a.bmp"]
CUT += ["deflated.tif", "wide.png", "progressive.jpg"]


def whole(folder, name):
    image = Image.fromarray(noise(40, 37, 3))
    if name == "wide.png":
        return stored(folder, png(noise(40, 37, 3, dtype=np.uint16)), name)
    options = {"compression": "tiff_adobe_deflate"} if name.startswith("deflated") else {}
    return saved(folder, image, name, progressive=name.startswith("progressive"), **options)


@pytest.mark.parametrize("name", CUT)
def test_a_cut_file_is_an_error_or_complete(tmp_path, name):
    path = whole(tmp_path, name)
    expected, data = read(path).pixels, path.read_bytes()
    problems = []
    for share in (0.01, 0.1, 0.3, 0.5, 0.8, 0.95, 0.99):
        cut = stored(tmp_path, data[: int(len(data) * share)], f"cut_{name}")
        try:
            pixels = read(cut).pixels
        except PictureError as error:
            problems.append(str(error))
        else:
            assert pixels.equal(expected), share
    assert len(problems) >= 5
    for problem in problems:
        assert f"cut_{name}" in problem
        assert "cut short or damaged" in problem or "damaged, or of a kind" in problem


@pytest.mark.parametrize("name", ["a.jpg", "a.png", "wide.png"])
def test_a_cut_file_can_be_asked_for(tmp_path, name):
    path = whole(tmp_path, name)
    data = path.read_bytes()
    path.write_bytes(data[: len(data) // 2])
    with pytest.raises(PictureError, match="truncated=True"):
        read(path)
    picture = read(path, truncated=True)
    assert picture.pixels.shape == (1, 3, 40, 37)
    assert picture.pixels.std() > 0.1
    assert "cut short" in picture.notes[-1]


def test_a_whole_file_is_no_less_whole_when_truncated_is_allowed(tmp_path):
    path = whole(tmp_path, "a.png")
    assert not read(path, truncated=True).notes


def test_a_damaged_file_never_gives_another_error(tmp_path):
    rng = np.random.default_rng(0)
    for name in CUT:
        data = whole(tmp_path, name).read_bytes()
        for _ in range(12):
            spoilt = bytearray(data)
            for at in rng.integers(0, min(len(data), 400), 6):
                spoilt[at] = rng.integers(256)
            try:
                pixels = read(stored(tmp_path, bytes(spoilt), f"spoilt_{name}")).pixels
            except PictureError:
                continue
            assert pixels.isfinite().all()


def test_pictures_too_large_are_refused_before_they_are_decoded(tmp_path):
    head = struct.pack(">IIBBBBB", 60000, 60000, 8, 2, 0, 0, 0)
    data = (
        b"\x89PNG\r\n\x1a\n"
        + chunk(b"IHDR", head)
        + chunk(b"IDAT", zlib.compress(b""))
        + chunk(b"IEND", b"")
    )
    with pytest.raises(PictureError, match=r"3600 megapixels.*limit of 200.*max_pixels"):
        read(stored(tmp_path, data, "bomb.png"))
    path = whole(tmp_path, "a.png")
    with pytest.raises(PictureError, match="max_pixels"):
        read(path, max_pixels=1000)
    assert read(path, max_pixels=None).pixels.shape[-1] == 37


def test_pillows_switches_are_the_hosts(tmp_path, monkeypatch):
    path = whole(tmp_path, "a.jpg")
    data = path.read_bytes()
    path.write_bytes(data[: len(data) // 2])
    monkeypatch.setattr(ImageFile, "LOAD_TRUNCATED_IMAGES", True)
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 10)
    with pytest.raises(PictureError, match="cut short"):
        read(path)
    assert ImageFile.LOAD_TRUNCATED_IMAGES is True
    assert Image.MAX_IMAGE_PIXELS == 10
    read(path, truncated=True)
    assert ImageFile.LOAD_TRUNCATED_IMAGES is True


def test_reading_in_threads(tmp_path):
    good, bad = whole(tmp_path, "a.png"), whole(tmp_path, "a.jpg")
    bad.write_bytes(bad.read_bytes()[:1200])
    failures = []

    def work(path, truncated):
        for _ in range(5):
            try:
                read(path, truncated=truncated)
            except PictureError:
                if truncated or path is good:
                    failures.append(path)
            else:
                if path is bad and not truncated:
                    failures.append(path)

    threads = [threading.Thread(target=work, args=a) for a in product((good, bad), (False, True))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failures


# Writing


@pytest.mark.parametrize("channels", [1, 2, 3, 4])
@pytest.mark.parametrize("suffix", ["png", "tif", "tiff", "webp"])
def test_pixels_come_back(tmp_path, channels, suffix):
    values = torch.from_numpy(noise(9, 7, channels)).permute(2, 0, 1)[None] / 255
    path = write(tmp_path / f"a.{suffix}", values, quality=100)
    back = read(path)
    grey = channels < 3 and suffix != "webp"
    assert back.grey == grey
    expected = (
        values if channels > 2 or grey else torch.cat([values[:, :1]] * 3 + [values[:, 1:]], 1)
    )
    assert back.pixels.equal(expected)
    assert back.bits == 8


@pytest.mark.parametrize("channels", [1, 2, 3, 4])
@pytest.mark.parametrize("suffix", ["png", "tif"])
@pytest.mark.parametrize("size", [(1, 1), (1, 50), (50, 1), (33, 21)])
def test_sixteen_bits_come_back(tmp_path, channels, suffix, size):
    samples = noise(*size, channels, dtype=np.uint16)
    values = torch.from_numpy(samples.astype(np.float32)).permute(2, 0, 1)[None] / 65535
    like = Picture(values, bits=16)
    back = read(write(tmp_path / f"a.{suffix}", values, like))
    expected = samples if channels != 2 or suffix == "png" else samples[..., [0, 0, 0, 1]]
    assert np.array_equal(integers(back.pixels, 65535), expected)
    assert back.bits == 16


def test_sixteen_bit_png_is_filtered_and_compressed(tmp_path):
    y, x = np.mgrid[:64, :80]
    smooth = np.stack([40 * x + 30 * y, 700 * y, 65535 - 500 * x], -1).astype(np.uint16)
    values = torch.from_numpy(smooth.astype(np.float32)).permute(2, 0, 1)[None] / 65535
    path = write(tmp_path / "a.png", values, Picture(values, bits=16))
    assert path.stat().st_size < 0.1 * smooth.nbytes
    assert np.array_equal(integers(read(path).pixels, 65535), smooth)
    # As other readers see it.
    with Image.open(path) as image:
        assert np.array_equal(np.asarray(image), smooth >> 8)


def test_all_five_filters_are_used_and_right():
    rows = noise(40, 30)
    for y in range(8, 16):  # alike from pixel to pixel
        rows[y] = np.repeat(noise(1, 6, seed=y), 5, 0).ravel()
    rows[16:24] = noise(1, 30, seed=1)  # from row to row
    y, x = np.mgrid[:8, :30]
    rows[24:32] = 9 * y + 5 * (x // 6) + noise(1, 6, seed=2)[0, x % 6] // 2  # and both
    rows[32:] = 3 * y + 7 * x
    above = noise(30, seed=9)
    filtered = png_chunks.filtered(rows, above, 6)
    assert set(filtered[:, 0]) == set(range(5))
    before = above.astype(int)
    for (kind, *stored_row), expected in zip(filtered.astype(int), rows, strict=True):
        row = np.array(stored_row)
        for i in range(30):
            left, corner = (row[i - 6], before[i - 6]) if i >= 6 else (0, 0)
            up = before[i]
            guess = left + up - corner
            paeth = min((left, up, corner), key=lambda v, guess=guess: abs(guess - v))
            row[i] = (row[i] + (0, left, up, (left + up) // 2, paeth)[kind]) % 256
        assert np.array_equal(row, expected)
        before = row


def test_formats_without_sixteen_bits_get_eight(tmp_path):
    values = torch.rand(1, 3, 8, 8)
    assert read(write(tmp_path / "a.webp", values, Picture(values, bits=16))).bits == 8
    assert read(write(tmp_path / "a.jpg", values, Picture(values, bits=16))).bits == 8
    assert read(write(tmp_path / "a.png", values, Picture(values, bits=8))).bits == 8


@pytest.mark.parametrize("bits", [8, 16])
def test_rounding_is_half_up_and_clamped(tmp_path, bits):
    white = 2**bits - 1
    values = torch.tensor([-1.0, 0.49, 0.5, 1.5, 2.5, white - 0.5, white + 3]) / white
    values[-1] = 7.0
    like = Picture(torch.zeros(1), bits=bits)
    path = write(tmp_path / "a.png", values.double().view(1, 1, 1, -1), like)
    assert integers(read(path).pixels, white).ravel().tolist() == [0, 0, 1, 2, 3, white, white]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_layouts_and_dtypes(tmp_path, dtype):
    values = torch.rand(3, 6, 5).to(dtype)
    expected = (values.float() * 255 + 0.5).floor() / 255
    strided = values.permute(1, 2, 0).contiguous().permute(2, 0, 1)
    for k, one in enumerate((values, values[None], strided)):
        assert read(write(tmp_path / f"{k}.png", one)).pixels[0].equal(expected)


@pytest.mark.parametrize("name", ["a.jpg", "a.JPEG", "a.jpe", "a.PNG", "a.WebP", "a.TIF", "a.bmp"])
def test_endings(tmp_path, name):
    path = write(tmp_path / name, torch.rand(1, 3, 8, 8))
    assert read(path).format.lower().startswith(name[2:4].lower())


def test_the_format_can_be_said(tmp_path):
    assert read(write(tmp_path / "a.out", torch.rand(1, 3, 8, 8), format="webp")).format == "WEBP"
    assert read(write(tmp_path / "b.png", torch.rand(1, 3, 8, 8), format="JPEG")).format == "JPEG"
    assert read(write(tmp_path / "c", torch.rand(1, 3, 8, 8), format=".tif")).format == "TIFF"


@pytest.mark.parametrize(("name", "format"), [("a.xyz", None), ("a", None), ("a.png", "gif")])
def test_unknown_endings_are_told_the_known_ones(tmp_path, name, format):
    with pytest.raises(PictureError, match=r"cannot be written; choose one of \.png, \.jpg"):
        write(tmp_path / name, torch.rand(1, 3, 8, 8), format=format)
    assert not list(tmp_path.iterdir())


def test_quality(tmp_path):
    values = torch.rand(1, 3, 64, 64)
    sizes = [write(tmp_path / f"{q}.jpg", values, quality=q).stat().st_size for q in (20, 60, 95)]
    assert sizes == sorted(sizes)
    for quality in (0, 101):
        with pytest.raises(PictureError, match="between 1 and 100"):
            write(tmp_path / "x.jpg", values, quality=quality)


@pytest.mark.parametrize("channels", [2, 4])
@pytest.mark.parametrize("suffix", ["jpg", "bmp"])
def test_alpha_is_refused_where_it_would_be_lost(tmp_path, channels, suffix):
    values = torch.rand(1, channels, 8, 8)
    with pytest.raises(PictureError, match=r"no transparency.*PNG or WebP"):
        write(tmp_path / f"a.{suffix}", values)
    values[:, -1] = 1
    assert read(write(tmp_path / f"a.{suffix}", values)).pixels.shape[1] == channels - 1


def test_formats_end_somewhere(tmp_path):
    wide = torch.zeros(1, 1, 1, 16384)
    with pytest.raises(PictureError, match=r"16383 pixels a side.*16384x1.*PNG or TIFF"):
        write(tmp_path / "a.webp", wide)
    with pytest.raises(PictureError, match="65500"):
        write(tmp_path / "a.jpg", torch.zeros(1, 1, 1, 65501))
    write(tmp_path / "a.jpg", torch.zeros(1, 1, 1, 65500))
    write(tmp_path / "a.png", torch.zeros(1, 1, 1, 70000))


@pytest.mark.parametrize(
    ("pixels", "text"),
    [
        (torch.full((1, 3, 4, 4), float("nan")), "NaN"),
        (torch.full((1, 3, 4, 4), float("inf")), "infinite"),
        (torch.zeros(1, 3, 4, 4, dtype=torch.uint8), "floating-point"),
        (torch.zeros(2, 3, 4, 4), r"got \(2, 3, 4, 4\)"),
        (torch.zeros(1, 5, 4, 4), "1 to 4 channels"),
        (torch.zeros(1, 3, 0, 4), "is needed"),
        (torch.zeros(4, 4), "is needed"),
    ],
)
def test_what_is_no_picture_is_not_written(tmp_path, pixels, text):
    with pytest.raises(PictureError, match=text):
        write(tmp_path / "a.png", pixels)
    assert not list(tmp_path.iterdir())


def test_existing_files_stay(tmp_path):
    path = write(tmp_path / "a.png", torch.zeros(1, 3, 4, 4))
    before = path.read_bytes()
    with pytest.raises(PictureError, match="exists already"):
        write(path, torch.ones(1, 3, 4, 4))
    assert path.read_bytes() == before
    write(path, torch.ones(1, 3, 4, 4), overwrite=True)
    assert read(path).pixels.min() == 1
    assert [p.name for p in tmp_path.iterdir()] == ["a.png"]


@pytest.mark.skipif(sys.platform == "win32", reason="links need rights there")
def test_a_link_stays_a_link(tmp_path):
    path = write(tmp_path / "a.png", torch.zeros(1, 3, 4, 4))
    (tmp_path / "link.png").symlink_to(path)
    write(tmp_path / "link.png", torch.ones(1, 3, 4, 4), overwrite=True)
    assert (tmp_path / "link.png").is_symlink()
    assert read(path).pixels.min() == 1


def test_places_where_nothing_can_be_written(tmp_path):
    values = torch.rand(1, 3, 4, 4)
    with pytest.raises(PictureError, match=r"no folder.*make it first"):
        write(tmp_path / "none" / "a.png", values)
    (tmp_path / "folder.png").mkdir()
    with pytest.raises(PictureError, match="is a folder"):
        write(tmp_path / "folder.png", values, overwrite=True)
    with pytest.raises(PictureError, match="name is too long"):
        write(tmp_path / ("x" * 300 + ".png"), values)
    assert [p.name for p in tmp_path.iterdir()] == ["folder.png"]


@pytest.mark.skipif(
    not hasattr(os, "geteuid") or os.geteuid() == 0, reason="root may write anywhere"
)
def test_a_read_only_folder(tmp_path):
    tmp_path.chmod(0o500)
    try:
        with pytest.raises(PictureError, match="permission denied"):
            write(tmp_path / "a.png", torch.rand(1, 3, 4, 4))
    finally:
        tmp_path.chmod(0o700)


@pytest.mark.parametrize(
    ("code", "text"),
    [
        (errno.ENOSPC, "disk is full"),
        (errno.EACCES, "permission denied"),
        (errno.EIO, "nput/output"),
    ],
)
@pytest.mark.parametrize("where", ["_encode", "fsync", "replace"])
def test_nothing_half_written_stays(tmp_path, monkeypatch, code, text, where):
    path = write(tmp_path / "a.png", torch.zeros(1, 3, 4, 4))
    before = path.read_bytes()

    def fail(*args, **kwargs):
        if where == "_encode":
            args[0].write(b"half of it")
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(writing if where == "_encode" else os, where, fail)
    with pytest.raises(PictureError, match=text) as info:
        write(path, torch.ones(1, 3, 4, 4), overwrite=True)
    assert str(path) in str(info.value)
    assert path.read_bytes() == before
    assert [p.name for p in tmp_path.iterdir()] == ["a.png"]


def test_an_interruption_leaves_nothing(tmp_path, monkeypatch):
    def stop(*args):
        raise KeyboardInterrupt

    monkeypatch.setattr(os, "fsync", stop)
    with pytest.raises(KeyboardInterrupt):
        write(tmp_path / "a.png", torch.rand(1, 3, 4, 4))
    assert not list(tmp_path.iterdir())


def test_decoders_that_fail_late_are_readable(tmp_path, monkeypatch):
    def fail(self, *args, **kwargs):
        raise ValueError("encoder trouble")

    monkeypatch.setattr(Image.Image, "save", fail)
    with pytest.raises(PictureError, match="cannot be written as PNG: encoder trouble"):
        write(tmp_path / "a.png", torch.rand(1, 3, 4, 4))


def test_the_file_has_the_rights_of_any_new_file(tmp_path):
    (tmp_path / "plain").write_bytes(b"")
    path = write(tmp_path / "a.png", torch.rand(1, 3, 4, 4))
    assert path.stat().st_mode == (tmp_path / "plain").stat().st_mode


def test_a_jpeg_keeps_full_colour_resolution(tmp_path):
    data = io.BytesIO(write(tmp_path / "a.jpg", torch.rand(1, 3, 16, 16)).read_bytes())
    with Image.open(data) as image:
        assert [layer[1:3] for layer in image.layer] == [(1, 1)] * 3
