"""Training data: the same samples under any number of workers, and files that are broken in many ways."""

import io
import json
import tarfile
import warnings

import numpy as np
import pytest
import torch
from PIL import Image
from torch.utils.data import DataLoader

from train import pairs, peers
from train.data import pictures as data


@pytest.fixture(autouse=True)
def quiet():
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "codecs not available")
        yield


def noise(seed: int, h: int = 80, w: int = 96) -> Image.Image:
    small = np.random.default_rng(seed).integers(0, 256, (h // 8, w // 8, 3), dtype=np.uint8)
    return Image.fromarray(small).resize((w, h), Image.Resampling.BICUBIC)


def encoded(image: Image.Image, kind: str = "PNG") -> bytes:
    held = io.BytesIO()
    image.save(held, kind)
    return held.getvalue()


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "deep" / "er").mkdir(parents=True)
    for i in range(5):
        noise(i).save(tmp_path / f"{i}.png")
    noise(5).save(tmp_path / "deep" / "er" / "5.jpg")
    return tmp_path


def take(dataset, workers: int, count: int = 18, start: int = 0) -> list[dict]:
    order = data.Order(len(dataset), seed=3, start=start)
    context = "fork" if workers else None
    loader = DataLoader(
        dataset, batch_size=3, sampler=order, num_workers=workers, multiprocessing_context=context
    )
    found = []
    for batch in dataset.watch(loader):
        names, captions = batch["name"], batch["caption"]
        for i in range(len(names)):
            found.append({"hr": batch["hr"][i], "lr": batch["lr"][i]})
            found[-1] |= {"name": names[i], "caption": captions[i]}
        if len(found) >= count:
            return found
    raise AssertionError("the order is endless")


def same(a: list[dict], b: list[dict]) -> bool:
    return all(
        x["name"] == y["name"] and torch.equal(x["hr"], y["hr"]) and torch.equal(x["lr"], y["lr"])
        for x, y in zip(a, b, strict=True)
    )


def test_samples_do_not_depend_on_workers_or_restarts(folder):
    (folder / "cut.png").write_bytes(encoded(noise(9))[:500])
    how = data.Degradation("mixed", mix="tiny")
    dataset = data.Pictures(folder, crop=64, degradation=how, seed=7)
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        one = take(dataset, 0)
        again = take(dataset, 0)
    assert [str(w.message).split(":")[0] for w in told if "skipped" in str(w.message)] == [
        "skipped cut.png"
    ]
    assert dataset.bad_count() == 1
    fresh = data.Pictures(folder, crop=64, degradation=how, seed=7)
    with pytest.warns(UserWarning, match=r"skipped cut\.png"):
        two = take(fresh, 2)
    assert fresh.bad_count() == 1  # found by a worker, known to its parent
    assert same(one, again)
    assert same(one, two)
    assert same(one[6:], take(fresh, 0, count=12, start=6))
    assert one[0]["hr"].shape == (3, 64, 64)
    assert one[0]["lr"].shape == (3, 16, 16)
    assert one[0]["hr"].dtype == torch.uint8
    other = data.Pictures(folder, crop=64, degradation=how, seed=8)
    with pytest.warns(UserWarning, match="skipped"):
        assert not same(one, take(other, 0))


def test_epochs_differ(folder):
    dataset = data.Pictures(folder, crop=48)
    assert not torch.equal(dataset[0, 2]["hr"], dataset[1, 2]["hr"])
    assert torch.equal(dataset[2]["hr"], dataset[0, 2]["hr"])
    assert "lr" not in dataset[2]


def test_order_covers_every_epoch_and_splits_among_ranks():
    def keys(count, **options):
        return [key for key, _ in zip(data.Order(5, seed=1, **options), range(count), strict=False)]

    whole = keys(15)
    for epoch in range(3):
        assert sorted(whole[5 * epoch : 5 * epoch + 5]) == [(epoch, i) for i in range(5)]
    assert whole[:5] != [(0, i) for _, i in whole[5:10]]
    assert keys(8, start=7) == whole[7:]
    ranks = [keys(5, start=3, rank=r, world=2) for r in range(2)]
    assert [key for both in zip(*ranks, strict=True) for key in both] == whole[3:13]
    with pytest.raises(data.DataError, match="rank 2 of 2"):
        data.Order(5, rank=2, world=2)


def test_small_pictures_are_enlarged_to_the_crop():
    pixels = np.asarray(noise(0, 70, 200))
    rng = np.random.default_rng(0)
    for side in (69, 70, 71, 128):
        assert data.random_crop(pixels, side, rng, True).shape == (side, side, 3)
    a = data.random_crop(pixels, 70, np.random.default_rng(5), False)
    assert any(np.array_equal(a, pixels[:, x : x + 70]) for x in range(131))


def test_flip_mirrors_half_of_the_crops():
    pixels = np.asarray(noise(1, 64, 64))
    rng = np.random.default_rng(0)
    flips = 0
    for _ in range(200):
        crop = data.random_crop(pixels, 64, rng, True)
        mirrored = np.array_equal(crop, pixels[:, ::-1])
        assert mirrored or np.array_equal(crop, pixels)
        flips += mirrored
    assert 75 < flips < 125


def transparent() -> Image.Image:
    image = noise(0).convert("RGBA")
    image.putpixel((3, 3), (0, 0, 0, 90))
    return image


def grey16() -> Image.Image:
    return Image.fromarray(np.full((80, 80), 40_000, np.uint16))


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"", "cannot be decoded"),
        (b"this is no picture", "cannot be decoded"),
        (encoded(noise(0))[:700], "cannot be decoded"),
        (encoded(noise(0), "JPEG")[:700], "cannot be decoded"),
        (encoded(noise(0, 16, 300)), "300x16 is below 64"),
        (encoded(noise(0).convert("CMYK"), "TIFF"), "mode CMYK"),
        (encoded(grey16()), "mode I"),
        (encoded(transparent()), "transparency"),
    ],
)
def test_unusable_pictures_say_why(content, words):
    with pytest.raises(data.BadPicture, match=words):
        data.decode(content)


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "RGB", "RGBA"])
def test_ordinary_modes_become_rgb(mode):
    image = noise(2).convert(mode)
    pixels = data.decode(encoded(image))
    np.testing.assert_array_equal(pixels, np.asarray(image.convert("RGB")))


def test_nothing_usable_is_an_error_that_names_the_folder(tmp_path):
    with pytest.raises(data.DataError, match="no such folder"):
        data.Pictures(tmp_path / "absent")
    with pytest.raises(data.DataError, match="no pictures in"):
        data.Pictures(tmp_path)
    (tmp_path / "a.png").write_bytes(b"x")
    dataset = data.Pictures(tmp_path, crop=64)
    with pytest.raises(data.DataError, match=r"could not be used, for example a\.png"):
        dataset[0]
    with pytest.raises(data.DataError, match="does not divide"):
        data.Pictures(tmp_path, crop=66, degradation=data.Degradation())


def test_captions_beside_pictures_and_in_lists(folder):
    (folder / "0.txt").write_text("a red\n  boat \n")
    lines = [{"file": "1.png", "caption": "two birds"}, {"file": "deep/er/5.jpg", "text": "a hill"}]
    (folder / "list.jsonl").write_text("\n".join(json.dumps(line) for line in lines) + "\n\n")
    (folder / "2.txt").write_bytes(b"\xff\xfe broken")
    dataset = data.Pictures(folder, crop=64)
    captions = {dataset[i]["name"]: dataset[i]["caption"] for i in range(len(dataset))}
    assert captions["0.png"] == "a red boat"
    assert captions["1.png"] == "two birds"
    assert captions["deep/er/5.jpg"] == "a hill"
    assert captions["2.png"] == captions["3.png"] == ""
    (folder / "list.jsonl").write_text('{"caption": "of what?"}')
    with pytest.raises(data.DataError, match=r"list\.jsonl, line 1"):
        data.Pictures(folder)


def make_tar(path, members: dict[str, bytes]) -> None:
    with tarfile.open(path, "w") as tar:
        for name, content in members.items():
            member = tarfile.TarInfo(name)
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))


def test_tar_shards_with_captions_and_a_cut_end(folder, tmp_path_factory):
    shards = tmp_path_factory.mktemp("shards")
    members = {
        "a/000.png": encoded(noise(0)),
        "a/000.txt": b"first",
        "a/001.jpg": encoded(noise(1), "JPEG"),
        "a/001.json": json.dumps({"caption": "second"}).encode(),
        "a/001.cls": b"3",
        "a/002.png": encoded(noise(2)),
    }
    make_tar(shards / "x-000.tar", members)
    dataset = data.Pictures(shards, crop=64)
    assert [dataset[i]["caption"] for i in range(3)] == ["first", "second", ""]
    assert dataset.entries[0].name == "x-000.tar/a/000.png"
    plain = data.Pictures(folder, crop=64)
    assert torch.equal(dataset[0]["hr"], plain[0]["hr"])
    assert len(data.find(shards / "x-000.tar")) == 3
    assert len(data.Pictures([folder, shards])) == len(plain) + 3

    whole = (shards / "x-000.tar").read_bytes()
    (shards / "x-000.tar").write_bytes(whole[: len(whole) - 10240 - 2000])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        rest = data.find(shards)
    assert [entry.name[-7:] for entry in rest] == ["000.png", "001.jpg"]


def nearest(x: torch.Tensor) -> torch.Tensor:
    """A teacher that only enlarges by 4 and brightens."""
    return torch.nn.functional.interpolate(x, scale_factor=4.0) + 0.1


def test_pairs_are_written_resumed_and_repeatable(folder, tmp_path_factory):
    out = tmp_path_factory.mktemp("pairs")
    model = peers.Teacher(nearest, digest="a teacher")
    options = pairs.Options(crop=64, drawn=0.3)
    (folder / "cut.png").write_bytes(encoded(noise(9))[:500])
    with pytest.warns(UserWarning, match=r"skipped cut\.png"):
        lines = list(pairs.make(folder, out, 12, options, model=model, shard=8, batch=3))
    assert len(lines) == 2
    assert "8 pairs" in lines[0]
    assert not list(out.glob(".*"))
    arrays = {k: np.load(out / f"pairs-00000.{k}.npy") for k in ("hr", "lr", "teacher")}
    assert arrays["hr"].shape == arrays["teacher"].shape == (8, 64, 64, 3)
    assert arrays["lr"].shape == (8, 16, 16, 3)
    np.testing.assert_array_equal(arrays["teacher"], model.restore(arrays["lr"], 64))
    record = json.loads((out / "pairs-00001.json").read_text())
    assert (record["first"], record["count"]) == (8, 4)
    assert record["teacher"] == model.digest

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        hr, lr = pairs.pair(pairs.Source(folder, {}), options, 5)
        np.testing.assert_array_equal(hr, arrays["hr"][5])
        np.testing.assert_array_equal(lr, arrays["lr"][5])
        (out / "pairs-00000.json").unlink()  # as if the run had been stopped there
        lines = list(pairs.make(folder, out, 12, options, model=model, shard=8, batch=3))
        assert "8 pairs" in lines[0]
        assert lines[1] == "pairs-00001.json: there already"
        np.testing.assert_array_equal(np.load(out / "pairs-00000.hr.npy"), arrays["hr"])
        other = pairs.Options(crop=64, seed=1)
        with pytest.raises(ValueError, match="made with other options"):
            list(pairs.make(folder, out, 12, other, model=model, shard=8))


def test_sources_are_weighted(folder):
    rows = [f"{i}.png,{'photo' if i < 3 else 'comic'}" for i in range(5)]
    (folder / "manifest.csv").write_text("\n".join(["file,source", *rows]) + "\n")
    source = pairs.Source(folder, {"photo": 0.0})
    rng = np.random.default_rng(0)
    seen = {source.draw(rng).tobytes() for _ in range(60)}
    assert len(seen) == 3  # two comics and the picture without a source
    with pytest.raises(data.DataError, match=r"manifest\.csv has comic, photo"):
        pairs.Source(folder, {"fotos": 2.0})


def test_drawn_crops_are_varied_and_sharp():
    crops = [pairs.drawn_crop(96, np.random.default_rng(i)) for i in range(12)]
    assert all(c.shape == (96, 96, 3) and c.dtype == np.uint8 for c in crops)
    assert len({c.tobytes() for c in crops}) == 12
    steps = [np.abs(np.diff(c.astype(int), axis=1)).max() for c in crops]
    assert np.median(steps) > 60


def test_command_line_reports_errors(folder, capsys, tmp_path):
    command = ["--data", str(folder), "--out", str(tmp_path / "o"), "--count", "2", "--crop", "64"]
    assert pairs.main([*command, "--weights", "nobody=2"]) == 2
    assert "--weights names nobody" in capsys.readouterr().err
    assert pairs.main(command) == 0
    assert "2 pairs" in capsys.readouterr().out
