"""The index of pictures: what tarfile and pathlib would find, kept for the next process, drawn by weight."""

from __future__ import annotations

import io
import json
import tarfile
from collections import Counter
from itertools import islice

import numpy as np
import pytest
from PIL import Image

from train.data import index
from train.data.index import Sources, find, members
from train.data.pictures import DataError, Order, decode, random_crop


def tar(path, names, kind=tarfile.PAX_FORMAT, content=b"x" * 700):
    with tarfile.open(path, "w", format=kind) as out:
        for name in names:
            member = tarfile.TarInfo(name)
            member.size = len(content)
            out.addfile(member, io.BytesIO(content))
    return path


@pytest.mark.parametrize("kind", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_members_are_those_that_tarfile_finds(tmp_path, kind):
    long = "/".join(["folder"] * 14) + "/picture.png"
    names = ["a.png", "deep/er/b.jpg", long, "empty.txt"]
    if kind != tarfile.USTAR_FORMAT:
        names += ["x" * 180 + ".png", "ä" * 60 + ".jpg"]
    path = tmp_path / "shard.tar"
    with tarfile.open(path, "w", format=kind) as out:
        for n, name in enumerate(names):
            member = tarfile.TarInfo(name)
            member.size = 0 if name == "empty.txt" else 500 + n
            out.addfile(member, io.BytesIO(bytes(member.size)))
        folder, link = tarfile.TarInfo("deep"), tarfile.TarInfo("link.png")
        folder.type, link.type, link.linkname = tarfile.DIRTYPE, tarfile.SYMTYPE, "a.png"
        out.addfile(folder)
        out.addfile(link)
    with tarfile.open(path) as there:
        expected = [(m.name, m.offset_data, m.size) for m in there if m.isfile()]
    assert list(members(path)) == expected
    assert len(expected) == len(names)


def test_a_damaged_tar_gives_what_is_before_the_damage(tmp_path):
    path = tar(tmp_path / "shard.tar", ["a.png", "b.png", "c.png"], tarfile.GNU_FORMAT)
    data = bytearray(path.read_bytes())
    second = list(members(path))[1][1] - 512
    data[second + 10] ^= 0xFF
    path.write_bytes(data)
    with pytest.warns(UserWarning, match="damaged after 1 members"):
        found = find(path)
    assert [entry.name for entry in found] == ["shard.tar/a.png"]


@pytest.fixture
def data(tmp_path):
    folder = tmp_path / "data"
    (folder / "deep").mkdir(parents=True)
    for name in ("0.png", "1.jpg", "deep/2.png"):
        (folder / name).write_bytes(name.encode())
    (folder / "0.txt").write_text("a boat")
    (folder / "list.jsonl").write_text(json.dumps({"file": "deep/2.png", "caption": "ein Haus"}))
    tar(folder / "shard.tar", ["3.png", "3.txt", "4.png"], content=b"two birds")
    return folder


def rows(found):
    return [(e.name, e.read(), e.words()) for e in found]


def test_a_kept_index_is_the_same_without_looking_again(data, tmp_path, monkeypatch):
    fresh = rows(find(data))
    assert [(name, words) for name, _, words in fresh] == [
        ("0.png", "a boat"), ("1.jpg", ""), ("deep/2.png", "ein Haus"),
        ("shard.tar/3.png", "two birds"), ("shard.tar/4.png", ""),
    ]  # fmt: skip
    assert find(data).captioned() == 3
    # Few pictures are not worth a file.
    cache = tmp_path / "cache"
    find(data, cache)
    assert not cache.exists()
    monkeypatch.setattr(index, "KEPT_FROM", 1)
    find(data, cache)
    with monkeypatch.context() as patch:
        patch.setattr(index, "_scan", lambda source: pytest.fail("looked again"))
        assert rows(find(data, cache)) == fresh
    assert not list(cache.glob("*.part"))


@pytest.mark.parametrize("change", ["picture", "caption", "list", "tar", "torn"])
def test_an_index_is_made_again_when_something_has_changed(data, tmp_path, monkeypatch, change):
    monkeypatch.setattr(index, "KEPT_FROM", 1)
    cache = tmp_path / "cache"
    before = rows(find(data, cache))
    if change == "picture":
        (data / "deep" / "new.png").write_bytes(b"new")
    elif change == "caption":
        (data / "1.txt").write_text("now described")
    elif change == "list":
        (data / "list.jsonl").write_text(json.dumps({"file": "1.jpg", "caption": "something"}))
    elif change == "tar":
        tar(data / "shard.tar", ["3.png", "3.txt", "4.png", "5.png"], content=b"two birds")
    else:
        next(cache.glob("index-*/offset.npy")).write_bytes(b"cut")
    after = rows(find(data, cache))
    assert after == rows(find(data))
    assert (after == before) == (change == "torn")


def test_several_sources_are_one_sequence(data, tmp_path):
    other = tmp_path / "other"
    other.mkdir()
    (other / "9.png").write_bytes(b"9")
    both = Sources([find(data), find(other)])
    assert both.sizes == [5, 1]
    assert [e.name for e in both][-1] == "9.png"
    assert both.captioned() == 3
    with pytest.raises(IndexError):
        both[6]


def test_sources_are_drawn_by_weight_whatever_their_sizes():
    def keys(count, **more):
        order = Order(1010, seed=1, sizes=[1000, 10], weights=[1, 3], **more)
        return list(islice(order, count))

    whole = keys(4000)
    counts = Counter(i >= 1000 for _, i in whole)
    # Five standard deviations of a coin that falls on one side three times of four.
    assert counts[True] / 4000 == pytest.approx(0.75, abs=5 * (0.75 * 0.25 / 4000) ** 0.5)
    assert {i for _, i in whole if i >= 1000} == set(range(1000, 1010))
    # The same samples from any start and for any number of processes.
    assert keys(50, start=7) == whole[7:57]
    ranks = [keys(20, start=4, rank=r, world=2) for r in range(2)]
    assert [key for pair in zip(*ranks, strict=True) for key in pair] == whole[4:44]
    # The same picture twice is not the same crop.
    assert len({epoch for epoch, _ in whole}) == 4000


@pytest.mark.parametrize("weights", [[1.0], [-1.0, 2.0], [0.0, 0.0]])
def test_weights_that_make_no_sense_are_named(weights):
    with pytest.raises(DataError, match="weights needs a number"):
        Order(5, sizes=[3, 2], weights=weights)


def test_a_span_shows_most_of_a_large_picture():
    """A gradient from 0 to 255 across the picture tells how much of it a crop holds."""
    ramp = np.linspace(0, 255, 1000).astype(np.uint8)
    pixels = np.repeat(np.repeat(ramp[None, :, None], 800, 0), 3, 2)
    rng = np.random.default_rng(0)
    plain = [np.ptp(random_crop(pixels, 100, rng, False)) for _ in range(20)]
    wide = [np.ptp(random_crop(pixels, 100, rng, False, 1.5)) for _ in range(20)]
    assert max(plain) < 30
    # 100 of at most 150 pixels of the short side, and so at least 53 % of the long one.
    assert min(wide) > 0.5 * 255
    assert max(wide) <= 0.83 * 255
    # What is smaller than the span is not enlarged beyond the crop.
    small = random_crop(pixels[:110, :120], 100, np.random.default_rng(3), False, 1.5)
    assert small.shape == (100, 100, 3)


def test_large_jpegs_are_decoded_small_enough_and_not_smaller():
    held = io.BytesIO()
    rng = np.random.default_rng(0)
    small = Image.fromarray(rng.integers(0, 256, (30, 40, 3), np.uint8))
    small.resize((1600, 1200), Image.Resampling.BICUBIC).save(held, "JPEG")
    assert decode(held.getvalue(), least=290).shape == (300, 400, 3)
    assert decode(held.getvalue(), least=310).shape == (600, 800, 3)
    assert decode(held.getvalue()).shape == (1200, 1600, 3)
