"""Pictures that other programs get wrong: what is stored comes out, or a sentence says why not."""

import errno
import io
import os
import re
import struct
import subprocess
import sys
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image, ImageCms, PngImagePlugin, TiffImagePlugin

from gendr.pictures import CutShortError, Picture, PictureError, measure, placing, png, read, write
from gendr.pictures.values import floating

ROOT = Path(__file__).resolve().parent.parent
SRGB = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
XMP = b'<x:xmpmeta xmlns:x="adobe:ns:meta/"><r tiff:Orientation="1" exif:PixelXDimension="9"/></x:xmpmeta>'


def stored(folder, data, name):
    path = folder / name
    path.write_bytes(data)
    return path


def encoded(image, kind, **options):
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def scene(width=24, height=18, seed=0):
    """Noise over a ramp, h w 3 uint8: no corner is flat."""
    y, x = np.mgrid[:height, :width]
    ramp = np.stack([x * 200 // width, y * 200 // height, 200 - x * 150 // width], -1)
    return (ramp + np.random.default_rng(seed).integers(0, 50, ramp.shape)).astype(np.uint8)


def values(picture):
    """h w c in [0, 1]."""
    return picture.pixels[0].permute(1, 2, 0).numpy()


# TIFF


def tiff(
    strips,
    size,
    bits,
    *,
    order="<",
    channels=1,
    photometric=1,
    sample_format=1,
    compression=1,
    predictor=1,
    planes=False,
    extra=(),
    fill_order=1,
    more=(),
):
    """A TIFF of strips that are packed already, made by hand; `more` are further pages' tags."""
    width, height = size
    rows = -(-height // (len(strips) // (channels if planes else 1)))
    tags = {256: [width], 257: [height], 258: [bits] * channels, 259: [compression]}
    tags |= {262: [photometric], 266: [fill_order], 277: [channels], 278: [rows]}
    tags |= {279: [len(strip) for strip in strips], 284: [2 if planes else 1], 317: [predictor]}
    tags[339] = [sample_format] * channels
    if extra:
        tags[338] = list(extra)
    tags |= dict(more)
    tags[273] = tags[279]
    beyond = 8 + 2 + 12 * len(tags) + 4
    start = beyond + sum(4 * len(v) for v in tags.values() if len(v) > 1)
    tags[273] = [start + sum(tags[279][:n]) for n in range(len(strips))]
    entries, behind = b"", b""
    for tag, numbers in sorted(tags.items()):
        packed = struct.pack(f"{order}{len(numbers)}I", *numbers)
        if len(numbers) > 1:
            packed, behind = struct.pack(f"{order}I", beyond + len(behind)), behind + packed
        entries += struct.pack(f"{order}HHI", tag, 4, len(numbers)) + packed
    head = {"<": b"II", ">": b"MM"}[order] + struct.pack(f"{order}HIH", 42, 8, len(tags))
    return head + entries + bytes(4) + behind + b"".join(strips)


def bits_of(numbers, bits):
    """Rows of numbers as `bits` bits each from the highest, rows ending at a byte."""
    rows = (numbers[..., None].astype(np.int64) >> np.arange(bits - 1, -1, -1)) & 1
    return np.packbits(rows.reshape(len(numbers), -1).astype(np.uint8), axis=1).tobytes()


@pytest.mark.parametrize("order", ["<", ">"])
@pytest.mark.parametrize("photometric", [0, 1])
@pytest.mark.parametrize("bits", [3, 6, 10, 12, 14, 24])
def test_depths_that_are_no_bytes(tmp_path, bits, photometric, order):
    numbers = np.random.default_rng(bits).integers(0, 2**bits, (5, 7))
    numbers[0, :2] = 0, 2**bits - 1
    raw = bits_of(numbers, bits)
    if bits == 24 and order == "<":
        raw = np.frombuffer(raw, np.uint8).reshape(-1, 3)[:, ::-1].tobytes()
    data = tiff([raw], (7, 5), bits, photometric=photometric, order=order)
    picture = read(stored(tmp_path, data, "a.tif"))
    expected = numbers / (2**bits - 1)
    expected = 1 - expected if photometric == 0 else expected
    assert np.abs(values(picture)[..., 0] - expected).max() < 1e-6
    assert picture.bits == (16 if bits > 8 else 8)


@pytest.mark.parametrize("order", ["<", ">"])
@pytest.mark.parametrize("bits", [8, 16, 32])
def test_signed_samples_are_as_bright_as_they_say(tmp_path, bits, order):
    top = 2 ** (bits - 1) - 1
    numbers = np.linspace(0, top, 35).round().reshape(5, 7).astype(f"{order}i{bits // 8}")
    data = tiff([numbers.tobytes()], (7, 5), bits, sample_format=2, order=order)
    picture = read(stored(tmp_path, data, "a.tif"))
    assert np.abs(values(picture)[..., 0] - numbers / top).max() < 1e-6
    assert picture.notes
    full = np.linspace(-top - 1, top, 35).round().reshape(5, 7).astype(f"{order}i{bits // 8}")
    data = tiff([full.tobytes()], (7, 5), bits, sample_format=2, order=order)
    got = values(read(stored(tmp_path, data, "b.tif")))[..., 0]
    assert np.abs(got - np.linspace(0, 1, 35).reshape(5, 7)).max() < max(1 / top, 1e-6)
    assert (got.min(), got.max()) == (0, 1)


@pytest.mark.parametrize("bits", [16, 32, 64])
@pytest.mark.parametrize("channels", [1, 2, 3, 4])
def test_floating_point_of_any_width_and_channels(tmp_path, bits, channels):
    numbers = np.random.default_rng(0).random((5, 7, channels)).astype(f"<f{bits // 8}")
    data = tiff(
        [numbers.tobytes()],
        *((7, 5), bits),
        channels=channels,
        sample_format=3,
        photometric=1 if channels < 3 else 2,
        extra=[2] if channels in (2, 4) else [],
    )
    picture = read(stored(tmp_path, data, "a.tif"))
    assert np.abs(values(picture) - numbers.astype(np.float32)).max() < 1e-7
    assert not picture.notes


@pytest.mark.parametrize("peak", [1.0000001, 1.02, 1.9, 4.0, 300.0])
def test_highlights_do_not_darken_the_picture(tmp_path, peak):
    numbers = np.linspace(0, 1, 100, dtype=np.float32).reshape(10, 10)
    numbers[0, 1] = peak
    picture = read(
        stored(tmp_path, tiff([numbers.tobytes()], (10, 10), 32, sample_format=3), "a.tif")
    )
    assert np.abs(values(picture)[..., 0] - numbers.clip(0, 1)).max() < 1e-6
    pfm = b"Pf\n10 10\n-1.0\n" + numbers[::-1].astype("<f4").tobytes()
    assert read(stored(tmp_path, pfm, "a.pfm")).pixels.equal(picture.pixels)
    assert len(picture.notes) == (peak > 1.001)


@pytest.mark.parametrize("peak", [2.0, 4.0, 12.0])
def test_a_ramp_beyond_one_keeps_all_its_steps(peak):
    ramp = np.linspace(0, peak, 64, dtype=np.float32)[None, :, None]
    notes = []
    got, white = floating(ramp, notes)
    assert np.allclose(got / white, ramp / peak)
    assert notes


def test_wide_integers_keep_their_bright_half(tmp_path):
    numbers = np.linspace(0, 2**32 - 1, 35).reshape(5, 7).astype("<u4")
    picture = read(stored(tmp_path, tiff([numbers.tobytes()], (7, 5), 32), "a.tif"))
    assert np.abs(values(picture)[..., 0] - np.linspace(0, 1, 35).reshape(5, 7)).max() < 1e-6
    assert "4294967295" in picture.notes[0]


@pytest.mark.parametrize("order", ["<", ">"])
def test_sixteen_bits_where_white_is_zero(tmp_path, order):
    numbers = np.linspace(0, 65535, 35).round().reshape(5, 7).astype(f"{order}u2")
    data = tiff([numbers.tobytes()], (7, 5), 16, photometric=0, order=order)
    picture = read(stored(tmp_path, data, "a.tif"))
    assert np.array_equal((values(picture)[..., 0] * 65535).round(), 65535 - numbers)


def by_libtiff(raw, line, height, compression):
    """Bytes packed by the library behind Pillow."""
    image = Image.frombytes("L", (line, height), raw)
    data = encoded(image, "TIFF", compression=compression, tiffinfo={278: height})
    with Image.open(io.BytesIO(data)) as made:
        (start,), (count,) = made.tag_v2[273], made.tag_v2[279]
    return data[start : start + count]


@pytest.mark.parametrize("predictor", [1, 2, 3])
@pytest.mark.parametrize(
    ("compression", "name"), [(5, "tiff_lzw"), (8, None), (32773, "packbits"), (50000, "zstd")]
)
def test_packed_samples_with_a_predictor(tmp_path, compression, name, predictor):
    rng = np.random.default_rng(0)
    if predictor == 3:
        numbers = rng.random((5, 7, 3)).astype("<f4")
        order = numbers.astype(">f4").view(np.uint8).reshape(5, 21, 4).transpose(0, 2, 1)
        flat = order.reshape(5, -1, 3)
        raw = np.concatenate([flat[:, :1], np.diff(flat, axis=1)], 1).astype(np.uint8).tobytes()
    else:
        numbers = rng.integers(0, 65536, (5, 7, 3)).astype("<u2")
        raw = numbers.tobytes()
        if predictor == 2:
            steps = np.diff(numbers.astype(np.int64), axis=1)
            raw = np.concatenate([numbers[:, :1], steps], 1).astype("<u2").tobytes()
    if compression == 32773 and predictor != 1:
        pytest.skip("PackBits has no predictor")
    line = len(raw) // 5
    try:
        packed = zlib.compress(raw) if name is None else by_libtiff(raw, line, 5, name)
    except Exception as error:
        pytest.skip(f"this Pillow cannot pack {name}: {error}")
    data = tiff(
        [packed],
        *((7, 5), 32 if predictor == 3 else 16),
        channels=3,
        photometric=2,
        compression=compression,
        predictor=predictor,
        sample_format=3 if predictor == 3 else 1,
    )
    white = 1 if predictor == 3 else 65535
    assert np.abs(values(read(stored(tmp_path, data, "a.tif"))) - numbers / white).max() < 1e-6


def test_bits_from_the_other_end(tmp_path):
    numbers = np.random.default_rng(0).integers(0, 4096, (5, 8))
    raw = bytes(int(f"{b:08b}"[::-1], 2) for b in bits_of(numbers, 12))
    picture = read(stored(tmp_path, tiff([raw], (8, 5), 12, fill_order=2), "a.tif"))
    assert np.abs(values(picture)[..., 0] - numbers / 4095).max() < 1e-6


@pytest.mark.parametrize("planes", [False, True])
@pytest.mark.parametrize("bits", [8, 16])
def test_multiplied_alpha_is_divided_out(tmp_path, bits, planes):
    white = 2**bits - 1
    rng = np.random.default_rng(0)
    alpha = rng.integers(white // 2, white, (5, 7, 1))
    straight = rng.integers(0, white, (5, 7, 3))
    multiplied = (straight * alpha / white).round()
    stack = np.concatenate([multiplied, alpha], -1).astype(f"<u{bits // 8}")
    strips = [stack[..., c].tobytes() for c in range(4)] if planes else [stack.tobytes()]
    data = tiff(strips, (7, 5), bits, channels=4, photometric=2, extra=[1], planes=planes)
    got = values(read(stored(tmp_path, data, "a.tif"))) * white
    assert np.abs(got[..., :3] - straight).max() <= 2
    assert np.array_equal(got[..., 3:].round(), alpha)


@pytest.mark.parametrize("bits", [8, 16])
def test_cmyk_in_planes(tmp_path, bits):
    inks = np.random.default_rng(0).integers(0, 2**bits, (5, 7, 4)).astype(f"<u{bits // 8}")
    strips = [inks[..., c].tobytes() for c in range(4)]
    data = tiff(strips, (7, 5), bits, channels=4, photometric=5, planes=True)
    picture = read(stored(tmp_path, data, "a.tif"))
    eight = (inks >> (bits - 8)).astype(np.uint8)
    expected = np.asarray(Image.fromarray(eight, "CMYK").convert("RGB"))
    assert np.array_equal((values(picture) * 255).round(), expected)
    assert any("as 8" in note for note in picture.notes) == (bits == 16)


def test_channels_of_different_depth_are_refused(tmp_path):
    data = tiff([bytes(70)], (7, 5), 5, channels=3, photometric=2, more={258: [5, 6, 5]})
    with pytest.raises(PictureError, match=r"a\.tif: .*differ in depth"):
        read(stored(tmp_path, data, "a.tif"))


@pytest.mark.parametrize("bits", [12, 16, 32])
def test_a_tiff_that_lacks_rows_is_cut_short(tmp_path, bits):
    data = tiff([bytes(7 * bits // 8 * 4)], (7, 5), bits)
    with pytest.raises(CutShortError):
        read(stored(tmp_path, data, "a.tif"))


def pages(*flags, sizes):
    images = [Image.fromarray(scene(*size)) for size in sizes]
    data = bytearray(encoded(images[0], "TIFF", save_all=True, append_images=images[1:]))
    offset = struct.unpack("<I", data[4:8])[0]
    for flag in flags:
        data, offset = _flagged(data, offset, flag)
    return bytes(data)


def _flagged(data, offset, flag):
    """The directory copied to the end with NewSubfileType set; its follower's place."""
    count = struct.unpack_from("<H", data, offset)[0]
    entries = data[offset + 2 : offset + 2 + 12 * count]
    follower = struct.unpack_from("<I", data, offset + 2 + 12 * count)[0]
    place = len(data) + len(data) % 2
    data = data.ljust(place, b"\0")
    new = struct.pack("<HHII", 254, 4, 1, flag)
    data += struct.pack("<H", count + 1) + new + entries + struct.pack("<I", follower)
    # Whoever pointed to the old directory points to the copy.
    for at in range(4, len(data) - 3, 2):
        if at < place and struct.unpack_from("<I", data, at)[0] == offset:
            struct.pack_into("<I", data, at, place)
            break
    return data, follower


@pytest.mark.parametrize("flags", [(1, 0), (1, 1), (4, 0)])
def test_the_picture_is_read_and_not_its_thumbnail(tmp_path, flags):
    data = pages(*flags, sizes=((8, 6), (24, 18)))
    path = stored(tmp_path, data, "a.tif")
    picture = read(path)
    assert np.array_equal((values(picture) * 255).round(), scene())
    assert measure(path) == (18, 24)
    assert picture.frames == 1
    assert "thumbnail" in picture.notes[0]


def test_a_picture_below_its_thumbnail_is_read(tmp_path):
    small, large = scene(8, 6), scene()
    whole = tiff([large.tobytes()], (24, 18), 8, channels=3, photometric=2)
    head = tiff([small.tobytes()], (8, 6), 8, channels=3, photometric=2, more={254: [1], 330: [0]})
    # The second file's directory behind the first, its places moved.
    shift = len(head)
    moved = bytearray(whole)
    count = struct.unpack_from("<H", moved, 8)[0]
    for entry in range(10, 10 + 12 * count, 12):
        tag, _, length, value = struct.unpack_from("<HHII", moved, entry)
        if length > 1 or tag == 273:
            struct.pack_into("<I", moved, entry + 8, value + shift)
    data = bytearray(head + moved)
    count = struct.unpack_from("<H", data, 8)[0]
    for entry in range(10, 10 + 12 * count, 12):
        if struct.unpack_from("<H", data, entry)[0] == 330:
            struct.pack_into("<I", data, entry + 8, shift + 8)
    path = stored(tmp_path, bytes(data), "a.tif")
    assert np.array_equal((values(read(path)) * 255).round(), large)
    assert measure(path) == (18, 24)


# PNG


def chunk(kind, data, wrong=0):
    check = zlib.crc32(kind + data) ^ wrong
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", check)


def png_of(rows, width, height, depth=8, colour=2, *, extra=b"", interlaced=0):
    head = struct.pack(">IIBBBBB", width, height, depth, colour, 0, 0, interlaced)
    parts = chunk(b"IHDR", head), extra, chunk(b"IDAT", zlib.compress(rows)), chunk(b"IEND", b"")
    return png.SIGNATURE + b"".join(parts)


def scene_png(extra=b""):
    return png_of(b"".join(b"\0" + row.tobytes() for row in scene()), 24, 18, extra=extra)


LARGE = {
    "text": chunk(b"zTXt", b"workflow\0\0" + zlib.compress(b"[1,2,3]," * 200_000)),
    "xmp": chunk(
        b"iTXt", b"XML:com.adobe.xmp\0\1\0\0\0" + zlib.compress(b"<x/>" + b" " * 1_500_000)
    ),
    "profile": chunk(b"iCCP", b"big\0\0" + zlib.compress(SRGB + bytes(1_500_000))),
    "much text": b"".join(chunk(b"tEXt", b"n%d\0" % n + b"x" * 400_000) for n in range(30)),
}


@pytest.mark.parametrize("kind", LARGE)
def test_large_metadata_is_no_damage_and_is_kept(tmp_path, kind):
    path = stored(tmp_path, scene_png(LARGE[kind]), "a.png")
    picture = read(path)
    assert np.array_equal((values(picture) * 255).round(), scene())
    assert not picture.notes
    again = read(write(tmp_path / "b.png", picture.pixels, picture))
    assert (again.icc, again.xmp) == (picture.icc, picture.xmp)
    assert [png.text_of(c) for c in again.text] == [png.text_of(c) for c in picture.text]
    assert again.text or again.icc or again.xmp
    with Image.open(tmp_path / "b.png") as image:  # which refuses long text that is packed
        image.load()


@pytest.mark.parametrize("kind", [b"tEXt", b"pHYs", b"gAMA", b"eXIf", b"tIME", b"sRGB", b"abCd"])
def test_a_wrong_checksum_of_metadata_costs_the_metadata(tmp_path, kind):
    path = stored(tmp_path, scene_png(chunk(kind, b"123456789", wrong=1)), "a.png")
    picture = read(path)
    assert np.array_equal((values(picture) * 255).round(), scene())
    assert kind.decode() in picture.notes[0]


def test_a_profile_proves_itself(tmp_path):
    packed = b"p\0\0" + zlib.compress(SRGB)
    path = stored(tmp_path, scene_png(chunk(b"iCCP", packed, wrong=1)), "a.png")
    assert read(path).icc == SRGB


@pytest.mark.parametrize("broken", [b"p\0\0nonsense", b"", b"p\0\5" + zlib.compress(SRGB)])
def test_a_broken_profile_is_noted(tmp_path, broken):
    picture = read(stored(tmp_path, scene_png(chunk(b"iCCP", broken)), "a.png"))
    assert picture.icc is None
    assert "profile" in picture.notes[0]


@pytest.mark.parametrize("interlaced", [0, 1])
@pytest.mark.parametrize("share", [0.5, 0.99])
def test_a_png_with_rows_missing_is_cut_short(tmp_path, interlaced, share):
    passes = png.ADAM7 if interlaced else ((0, 0, 1, 1),)
    rows = b""
    for top, left, down, across in passes:
        part = scene()[top::down, left::across]
        rows += b"".join(b"\0" + row.tobytes() for row in part)
    path = stored(tmp_path, png_of(rows, 24, 18, interlaced=interlaced), "whole.png")
    assert np.array_equal((values(read(path)) * 255).round(), scene())
    part = rows[: int(len(rows) * share)]
    path = stored(tmp_path, png_of(part, 24, 18, interlaced=interlaced), "a.png")
    with pytest.raises(CutShortError, match="rows"):
        read(path)
    assert read(path, truncated=True).pixels.shape == (1, 3, 18, 24)


@pytest.mark.parametrize("depth", [1, 2, 4, 8, 16])
@pytest.mark.parametrize("key", [0, 1])
def test_one_grey_can_be_transparent_at_any_depth(tmp_path, depth, key):
    numbers = np.arange(16).reshape(2, 8) % 2**depth
    key = key * (2**depth - 1)
    numbers[0, 0] = key
    rows = b"".join(b"\0" + bits_of(row[None], depth) for row in numbers)
    extra = chunk(b"tRNS", struct.pack(">H", key))
    path = stored(tmp_path, png_of(rows, 8, 2, depth, 0, extra=extra), "a.png")
    got = values(read(path))
    assert np.array_equal(got[..., 1] == 0, numbers == key)
    assert np.allclose(got[..., 0], numbers / (2**depth - 1))


COLOURS = {
    "gAMA": struct.pack(">I", 100000),
    "cHRM": struct.pack(">8I", 31270, 32900, 70800, 29200, 17000, 79700, 13100, 4600),
    "cICP": bytes([9, 16, 0, 1]),
    "sRGB": b"\1",
}


@pytest.mark.parametrize("kind", COLOURS)
@pytest.mark.parametrize("bits", [8, 16])
def test_what_the_numbers_mean_is_kept_in_a_png(tmp_path, kind, bits):
    picture = read(stored(tmp_path, scene_png(chunk(kind.encode(), COLOURS[kind])), "a.png"))
    picture.bits = bits
    again = read(write(tmp_path / "b.png", picture.pixels, picture))
    assert again.colour == ((kind.encode(), COLOURS[kind]),)
    assert again.bits == bits
    # As other programs read it: before the pixels.
    data = (tmp_path / "b.png").read_bytes()
    assert data.find(kind.encode()) < data.find(b"IDAT")


@pytest.mark.parametrize("suffix", ["jpg", "webp", "tif", "bmp"])
def test_what_the_numbers_mean_is_not_lost_in_silence(tmp_path, suffix, recwarn):
    for kind, data in COLOURS.items():
        picture = read(stored(tmp_path, scene_png(chunk(kind.encode(), data)), "a.png"))
        recwarn.clear()
        write(tmp_path / f"{kind}.{suffix}", picture.pixels, picture)
        told = [str(w.message) for w in recwarn if kind in str(w.message)]
        assert len(told) == (kind != "sRGB"), kind  # which is what every reader assumes


def test_numbers_of_srgb_need_no_warning(tmp_path, recwarn):
    extra = chunk(b"gAMA", struct.pack(">I", 45455))
    primaries = 31270, 32900, 64000, 33000, 30000, 60000, 15000, 6000
    extra += chunk(b"cHRM", struct.pack(">8I", *primaries))
    picture = read(stored(tmp_path, scene_png(extra), "a.png"))
    write(tmp_path / "a.jpg", picture.pixels, picture)
    assert not recwarn


# Beside the pixels


def with_text():
    info = PngImagePlugin.PngInfo()
    info.add_text("parameters", "a tree\nSteps: 20, Größe")
    info.add_itxt("workflow", '{"nodes": [1]}')
    info.add_text("prompt", "{}", zip=True)
    return encoded(Image.fromarray(scene()), "PNG", pnginfo=info, dpi=(300, 300))


@pytest.mark.parametrize("bits", [8, 16])
def test_text_of_a_png_stays_in_a_png(tmp_path, bits):
    picture = read(stored(tmp_path, with_text(), "a.png"))
    picture.bits = bits
    path = write(tmp_path / "b.png", picture.pixels, picture)
    with Image.open(path) as image:
        image.load()
        assert image.text["parameters"] == "a tree\nSteps: 20, Größe"
        assert image.text["workflow"] == '{"nodes": [1]}'
        assert image.text["prompt"] == "{}"
        assert image.info["dpi"] == pytest.approx((300, 300), abs=0.01)
    bare = write(tmp_path / "c.png", picture.pixels, picture, keep_metadata=False)
    with Image.open(bare) as image:
        image.load()
        assert not image.text
        assert "dpi" not in image.info


@pytest.mark.parametrize("suffix", ["jpg", "webp", "tif"])
def test_generation_parameters_go_where_generators_look(tmp_path, suffix):
    picture = read(stored(tmp_path, with_text(), "a.png"))
    with pytest.warns(UserWarning, match="workflow.*prompt"):
        path = write(tmp_path / f"b.{suffix}", picture.pixels, picture)
    with Image.open(path) as image:
        comment = image.getexif().get_ifd(0x8769)[0x9286]
        assert comment == b"UNICODE\0" + "a tree\nSteps: 20, Größe".encode("utf-16-be")


@pytest.mark.parametrize("source", ["png", "jpg", "tif", "bmp"])
@pytest.mark.parametrize("suffix", ["png", "jpg", "tif", "webp", "bmp"])
def test_dots_per_inch_go_from_file_to_file(tmp_path, source, suffix):
    kind = {"jpg": "JPEG", "tif": "TIFF"}.get(source, source.upper())
    data = encoded(Image.fromarray(scene()), kind, dpi=(300, 300))
    picture = read(stored(tmp_path, data, f"a.{source}"))
    assert picture.dpi == pytest.approx((300, 300), abs=0.05)
    picture.exif = None  # of a TIFF, which a BMP has no place for
    again = read(write(tmp_path / f"b.{suffix}", picture.pixels, picture))
    assert again.dpi == pytest.approx((300, 300), abs=0.05)


@pytest.mark.parametrize("source", ["png", "jpg", "tif", "webp"])
@pytest.mark.parametrize("suffix", ["png", "jpg", "tif", "webp"])
def test_xmp_goes_from_file_to_file_upright(tmp_path, source, suffix):
    turned = XMP.replace(b'Orientation="1"', b'Orientation="6"')
    first = read(stored(tmp_path, scene_png(), "plain.png"))
    first.xmp = turned
    path = write(tmp_path / f"a.{source}", first.pixels, first, quality=100)
    assert measure(path) == ((24, 18) if source != "tif" else measure(path))
    picture = read(path)
    assert tuple(picture.pixels.shape[-2:]) == measure(path)
    again = read(write(tmp_path / f"b.{suffix}", torch.rand(1, 3, 30, 40), picture))
    assert b'Orientation="1"' in again.xmp
    assert b'PixelXDimension="40"' in again.xmp


def test_comments_and_captions(tmp_path):
    caption = b"\x1c\x02\x78\x00\x05hello"
    segment = b"Photoshop 3.0\x008BIM\x04\x04\0\0" + struct.pack(">I", len(caption)) + caption
    segment = struct.pack(">BBH", 0xFF, 0xED, len(segment) + 2) + segment
    data = encoded(Image.fromarray(scene()), "JPEG", comment=b"by hand", extra=segment)
    picture = read(stored(tmp_path, data, "a.jpg"))
    assert picture.iptc.rstrip(b"\0") == caption
    path = write(tmp_path / "b.jpg", picture.pixels, picture)
    assert read(path).iptc.rstrip(b"\0") == caption
    with Image.open(path) as image:
        assert image.info["comment"] == b"by hand"
    assert read(write(tmp_path / "b.tif", picture.pixels, _no_text(picture))).iptc
    with pytest.warns(UserWarning, match="IPTC"):
        path = write(tmp_path / "b.png", picture.pixels, picture)
    with Image.open(path) as image:
        assert image.text["Comment"] == "by hand"


def _no_text(picture):
    return Picture(picture.pixels, iptc=picture.iptc)


def test_exif_as_text_turns_the_picture(tmp_path):
    exif = Image.Exif()
    exif[0x0112], exif[0x010F] = 6, "Maker"
    digits = exif.tobytes().hex()
    said = f"\nexif\n{len(digits) // 2:8}\n{digits}\n".encode()
    extra = chunk(b"zTXt", b"Raw profile type exif\0\0" + zlib.compress(said))
    path = stored(tmp_path, scene_png(extra), "a.png")
    picture = read(path)
    assert picture.pixels.shape == (1, 3, 24, 18)
    assert measure(path) == (24, 18)
    assert b"Maker" in picture.exif


# JPEG


def jpeg_of(width=64, height=48, **options):
    return encoded(Image.fromarray(scene(width, height)), "JPEG", quality=90, **options)


def resized_header(data, width, height):
    at = max(data.find(b"\xff\xc0"), data.find(b"\xff\xc2"))
    return data[: at + 5] + struct.pack(">HH", height, width) + data[at + 9 :]


@pytest.mark.parametrize("progressive", [False, True])
def test_a_jpeg_without_its_end_marker_is_whole(tmp_path, progressive):
    data = jpeg_of(progressive=progressive)
    expected = read(stored(tmp_path, data, "whole.jpg")).pixels
    assert read(stored(tmp_path, data[:-2], "a.jpg")).pixels.equal(expected)
    assert read(stored(tmp_path, data[:-1], "b.jpg")).pixels.equal(expected)


@pytest.mark.parametrize("options", [{}, {"progressive": True}, {"restart_marker_rows": 1}])
@pytest.mark.parametrize("size", [(64, 64), (64, 96), (80, 48), (640, 480), (3000, 3000)])
def test_a_jpeg_that_claims_more_than_it_holds_is_cut_short(tmp_path, size, options):
    path = stored(tmp_path, resized_header(jpeg_of(**options), *size), "a.jpg")
    with pytest.raises(CutShortError):
        read(path)


@pytest.mark.parametrize("options", [{}, {"progressive": True}, {"restart_marker_rows": 1}])
def test_a_jpeg_that_ends_early_is_cut_short_even_with_an_end_marker(tmp_path, options):
    data = jpeg_of(**options)
    for share in (0.6, 0.8, 0.88):
        cut = data[: int(len(data) * share)].rstrip(b"\xff")
        for end in (b"", b"\xff\xd9"):
            with pytest.raises(CutShortError):
                read(stored(tmp_path, cut + end, "a.jpg"))


@pytest.mark.parametrize("options", [{}, {"progressive": True}, {"restart_marker_rows": 1}])
def test_no_end_of_a_jpeg_is_lost_without_a_word(tmp_path, options):
    data = jpeg_of(**options)
    expected = read(stored(tmp_path, data, "whole.jpg"))
    assert expected.notes == ()
    for lost in (1, 2, 3, 5, 8, 12, 20, 40):
        path = stored(tmp_path, data[: -2 - lost] + data[-2:], "a.jpg")
        try:
            picture = read(path)
        except CutShortError:
            continue
        early = "its data ends early: the last pixels, at the lower right, may be made up"
        assert picture.pixels.equal(expected.pixels) or picture.notes == (early,)


def test_scans_that_are_missing_are_told(tmp_path):
    data = jpeg_of(progressive=True)
    tables = data.rfind(b"\xff\xc4", 0, data.rfind(b"\xff\xda"))
    picture = read(stored(tmp_path, data[:tables] + b"\xff\xd9", "ended.jpg"))
    assert picture.notes == (
        "the finer of its progressive scans are missing; it may have been saved so",
    )
    with pytest.raises(CutShortError, match="the finer of its progressive scans are missing"):
        read(stored(tmp_path, data[:tables], "cut.jpg"))
    colour = next(m.start() for m in re.finditer(b"\xff\xda\x00\x08", data))
    with pytest.raises(CutShortError):
        read(stored(tmp_path, data[:colour], "grey.jpg"))


@pytest.mark.parametrize("options", [{}, {"progressive": True}, {"restart_marker_rows": 1}])
@pytest.mark.parametrize("mode", ["L", "RGB", "CMYK"])
def test_a_flat_corner_is_no_damage(tmp_path, mode, options):
    image = Image.new("RGB", (64, 48), (128, 128, 128))
    image.paste(Image.fromarray(scene(32, 24)), (0, 0))
    path = stored(tmp_path, encoded(image.convert(mode), "JPEG", **options), "a.jpg")
    picture = read(path)
    assert picture.pixels.shape[-2:] == (48, 64)
    assert not any("missing" in note or "early" in note for note in picture.notes)


def test_a_bomb_of_a_jpeg_takes_no_memory(tmp_path):
    path = stored(tmp_path, resized_header(jpeg_of(), 65500, 3000), "a.jpg")
    code = (
        "import resource, sys; from gendr import pictures\n"
        "before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss\n"
        "try: pictures.read(sys.argv[1])\n"
        "except pictures.PictureError as error: print(error)\n"
        "print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)"
    )
    if sys.platform != "linux":
        pytest.skip("measures with Linux's units")
    command = [sys.executable, "-c", code, str(path)]
    told = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    message, grown = told.stdout.splitlines()
    assert "cut short" in message
    assert int(grown) < 100_000  # kB; the pixels alone would take 590,000


# Other containers


def zero_alpha_bmp():
    pixels = np.zeros((18, 24, 4), np.uint8)
    pixels[..., :3] = scene()[..., ::-1]
    data = pixels[::-1].tobytes()
    masks = struct.pack("<IIII", 0xFF0000, 0xFF00, 0xFF, 0xFF000000)
    head = struct.pack("<IiiHHIIiiII", 108, 24, 18, 1, 32, 3, len(data), 2835, 2835, 0, 0)
    head += masks + b"BGRs" + bytes(48)
    return b"BM" + struct.pack("<IHHI", 122 + len(data), 0, 0, 122) + head + data


def zero_alpha(kind):
    if kind == "BMP":
        return zero_alpha_bmp()
    pixels = np.concatenate([scene(), np.zeros((18, 24, 1), np.uint8)], -1)
    return encoded(Image.fromarray(pixels), kind)


@pytest.mark.parametrize("kind", ["BMP", "TGA"])
def test_alpha_that_nobody_wrote_hides_nothing(tmp_path, kind):
    picture = read(stored(tmp_path, zero_alpha(kind), f"a.{kind.lower()}"))
    assert np.array_equal((values(picture) * 255).round(), scene())
    assert "opaque" in picture.notes[0]


def test_an_invisible_png_is_meant(tmp_path):
    picture = read(stored(tmp_path, zero_alpha("PNG"), "a.png"))
    assert picture.pixels.shape[1] == 4
    assert not picture.pixels[:, 3].any()


@pytest.mark.parametrize("top", [1, 100, 255, 256, 1023, 4095, 65535])
@pytest.mark.parametrize("kind", ["P2", "P3", "P5", "P6", "P7 1", "P7 2", "P7 3", "P7 4"])
def test_netpbm_of_any_depth(tmp_path, kind, top):
    channels = int(kind[3:]) if kind.startswith("P7") else 3 if kind in ("P3", "P6") else 1
    numbers = np.random.default_rng(top).integers(0, top + 1, (5, 7, channels))
    numbers[0, 0] = top
    head = f"{kind}\n# made by hand\n7 5\n{top}\n".encode()
    if kind.startswith("P7"):
        head = f"P7\nWIDTH 7\nHEIGHT 5\nDEPTH {channels}\nMAXVAL {top}\nENDHDR\n".encode()
    if kind in ("P2", "P3"):
        body = " ".join(map(str, numbers.ravel())).encode()
    else:
        body = numbers.astype("u1" if top < 256 else ">u2").tobytes()
    path = stored(tmp_path, head + body, "a.ppm")
    picture = read(path)
    assert np.abs(values(picture) - numbers / top).max() < 1e-6
    assert picture.bits == (8 if top < 256 else 16)
    assert measure(path) == (5, 7)
    with pytest.raises(CutShortError):
        read(stored(tmp_path, head + body[: len(body) // 2], "b.ppm"))


@pytest.mark.parametrize("order", ["<", ">"])
def test_colour_pfm(tmp_path, order):
    numbers = np.random.default_rng(0).random((5, 7, 3)).astype(f"{order}f4")
    head = b"PF\n7 5\n" + (b"-1.0\n" if order == "<" else b"1.0\n")
    picture = read(stored(tmp_path, head + numbers[::-1].tobytes(), "a.pfm"))
    assert np.array_equal(values(picture), numbers)


def test_sixteen_bits_that_become_eight_are_noted(tmp_path):
    wide = Image.fromarray(scene()[..., 0].astype(np.uint16) * 257)
    sgi = encoded(wide.convert("L"), "SGI", bpc=2)
    assert read(stored(tmp_path, sgi, "a.sgi")).notes == ("16 bits per channel were read as 8",)


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP", "TIFF", "BMP", "GIF", "PPM", "TGA"])
def test_a_size_from_the_header_is_the_size(tmp_path, kind):
    exif = Image.Exif()
    exif[0x0112] = 6
    options = {"exif": exif.tobytes()} if kind in ("PNG", "JPEG", "WEBP", "TIFF") else {}
    path = stored(tmp_path, encoded(Image.fromarray(scene()), kind, **options), "a.x")
    assert measure(path) == tuple(read(path).pixels.shape[-2:])
    assert measure(path) == ((24, 18) if options else (18, 24))


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="needs named pipes")
def test_measuring_a_pipe_does_not_hang(tmp_path):
    os.mkfifo(tmp_path / "pipe.png")
    with pytest.raises(PictureError, match="not a regular file"):
        measure(tmp_path / "pipe.png")


# Placing


@pytest.mark.parametrize("code", sorted(placing.NO_FLUSH))
def test_a_disk_that_cannot_flush_keeps_the_picture(tmp_path, monkeypatch, code):
    def refuse(descriptor):
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(os, "fsync", refuse)
    path = write(tmp_path / "a.png", torch.rand(1, 3, 4, 4))
    assert read(path).pixels.shape == (1, 3, 4, 4)


def test_a_disk_that_fails_to_flush_says_so(tmp_path, monkeypatch):
    def refuse(descriptor):
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    monkeypatch.setattr(os, "fsync", refuse)
    with pytest.raises(PictureError, match="cannot be written"):
        write(tmp_path / "a.png", torch.rand(1, 3, 4, 4))
    assert not list(tmp_path.iterdir())


@pytest.mark.skipif(os.name == "nt", reason="open files hold their names there")
def test_only_what_the_dead_left_is_swept(tmp_path):
    dead = subprocess.Popen([sys.executable, "-c", ""])
    dead.wait()
    here = placing._machine()
    names = {
        f".gendr-{here}-{dead.pid}-{'a' * 16}.part": False,
        f".gendr-{here}-{os.getppid()}-{'b' * 16}.part": True,  # a process that works
        f".gendr-{here}-{os.getpid()}-{'c' * 16}.part": True,
        f".gendr-00000000-{dead.pid}-{'d' * 16}.part": True,  # of another machine, today
        f".gendr-{'e' * 16}.part": True,  # of an older version, a moment ago
        ".gendr-resume.jsonl": True,
        "mine.part": True,
    }
    for name in names:
        (tmp_path / name).write_bytes(b"x")
    old = tmp_path / f".gendr-{'f' * 16}.part"
    old.write_bytes(b"x")
    os.utime(old, (1, 1))
    assert placing.sweep(tmp_path) == 2
    assert {p.name for p in tmp_path.iterdir()} == {name for name, kept in names.items() if kept}


@pytest.mark.parametrize(
    ("start", "told"),
    [
        (b"\xff\x0a", "is a JPEG XL picture, which is not read here; export it as PNG"),
        (b"\0\0\0\x0cJXL \r\n\x87\n", "is a JPEG XL picture"),
        (b"\x76\x2f\x31\x01\2\0\0\0", "is an OpenEXR picture"),
        (b"#?RADIANCE\n", "is a Radiance HDR picture"),
        (b"gimp xcf v011", "is a GIMP picture"),
        (b"\x89PNG\r\n\x1a\n\0\0\0\4CgBI\x50\0\x20\2\0\0\0\0", "is a PNG for iOS apps"),
    ],
)
def test_kinds_that_are_not_read_are_named(tmp_path, start, told):
    with pytest.raises(PictureError, match=told):
        read(stored(tmp_path, start + bytes(100), "a.png"))


@pytest.mark.parametrize("depth", [8, 16])
def test_a_channel_of_unknown_use_is_left_out_with_a_note(tmp_path, depth):
    values = np.dstack([scene(12, 9), np.full((9, 12), 7, np.uint8)])
    values = values if depth == 8 else values.astype(np.uint16) * 257
    tags = TiffImagePlugin.ImageFileDirectory_v2(prefix=b"II")
    for tag, value in {256: 12, 257: 9, 258: (depth,) * 4, 259: 1, 262: 2, 277: 4}.items():
        tags[tag] = value
    tags[273], tags[278], tags[279], tags[284], tags[338] = 0, 9, values.nbytes, 1, 0
    file = io.BytesIO()
    tags.save(file)
    picture = read(stored(tmp_path, file.getvalue() + values.tobytes(), "a.tif"))
    assert picture.pixels.shape[1] == 3
    assert picture.notes == ("1 further channel of the file left out",)
