"""What is known before a run, and pictures made smaller for it."""

from __future__ import annotations

import io
import json
import tarfile

import numpy as np
import pytest
from conftest import header, random_network
from PIL import Image

from gendr.files import checkpoint
from train import preflight, shrink
from train.data import codecs
from train.data.index import find


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    folder = tmp_path_factory.mktemp("pictures")
    rng = np.random.default_rng(0)
    for n in range(4):
        small = Image.fromarray(rng.integers(0, 256, (10, 12, 3), np.uint8))
        small.resize((240, 200), Image.Resampling.BICUBIC).save(folder / f"{n}.jpg", quality=95)
    (folder / "0.txt").write_text("a boat")
    return folder


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    path = tmp_path_factory.mktemp("base") / "base.safetensors"
    network = random_network(prompts=("positive", "negative", "null"))
    checkpoint.save(path, network, header(network), dtype="fp32")
    return path


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    monkeypatch.setattr(preflight, "SECONDS", 0.05)
    monkeypatch.setattr("train.stage1.previews.STEPS", 2)


def words(stage, pictures, out, *more):
    return [
        "--stage", stage, "--recipe", "tiny", "--data", str(pictures), "--out", str(out),
        "--device", "cpu", *map(str, more),
    ]  # fmt: skip


def test_a_run_that_can_begin_is_ready(pictures, base, tmp_path, capsys):
    out = tmp_path / "run"
    more = ("--base", base, "--crop", 32, "--micro-batch", 1, "--batch", 1, "--mix", "tiny")
    more += ("--validate", pictures)
    assert preflight.main(words("cida", pictures, out, *more)) == 0
    text = capsys.readouterr().out
    assert text.rstrip().endswith("ready")
    for fact in (
        "pictures",
        "short sides",
        "200 px",
        "captions",
        "25 %",
        "loading 32 px",
        "step, 32 px",
        "0 with an original",
    ):
        assert fact in text
    assert not out.exists()


def test_what_stands_in_the_way_is_a_list(pictures, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(
        codecs,
        "available",
        lambda: {c: c == "jpeg" for c in ("jpeg", "webp", "avif", *codecs.VIDEO_ENCODERS)},
    )
    monkeypatch.setattr("train.data.degradations.available", codecs.available)
    monkeypatch.setattr("shutil.disk_usage", lambda place: type("Usage", (), {"free": 1000}))
    more = ("--codecs", "all", "--mix", "paper", "--sizes", 512, "--no-step")
    assert preflight.main(words("repa", pictures, tmp_path, *more)) == 1
    text = capsys.readouterr().out
    wrong = text[text.index("not ready:") :]
    assert "avif, h264, h265, mpeg2, mpeg4, webp don't work here: install PyAV" in wrong
    assert "smaller than the crop of 512 px" in wrong
    assert "free and the run will need" in wrong


def test_a_missing_base_is_a_line_of_the_list(pictures, tmp_path, capsys):
    assert preflight.main(words("cida", pictures, tmp_path, "--crop", 32)) == 1
    assert "step: no base given: name a GenDR checkpoint with --base" in capsys.readouterr().out


def test_a_folder_to_validate_on_that_is_none_is_a_line_too(pictures, tmp_path, capsys):
    more = ("--validate", tmp_path / "nowhere", "--no-step")
    assert preflight.main(words("cida", pictures, tmp_path, *more)) == 1
    assert "validation: not a folder" in capsys.readouterr().out


def test_shards_hold_the_same_pictures_smaller(pictures, tmp_path, capsys):
    out = tmp_path / "shards"
    command = ["--data", str(pictures), "--out", str(out), "--short", "100", "--per-shard", "3"]
    assert shrink.main(command) == 0
    assert "shard-00000.tar: 3 pictures" in capsys.readouterr().out
    found = find(out)
    assert len(found) == 4
    assert found[0].words() == "a boat"
    with Image.open(pictures / "0.jpg") as whole, Image.open(io.BytesIO(found[0].read())) as small:
        assert small.size == (120, 100)
        expected = np.asarray(whole.resize(small.size, Image.Resampling.LANCZOS), float)
        # JPEG of quality 95 without chroma subsampling, of a picture that was decoded at half size.
        assert np.abs(np.asarray(small, float) - expected).mean() < 3
    # Finished shards stay, missing ones are made, and made the same.
    first, second = (out / f"shard-0000{n}.tar" for n in range(2))
    before, stamp = second.read_bytes(), first.stat().st_mtime_ns
    second.unlink()
    assert shrink.main(command) == 0
    assert second.read_bytes() == before
    assert first.stat().st_mtime_ns == stamp
    command[command.index("100")] = "90"
    assert shrink.main(command) == 1
    assert "other pictures or options" in capsys.readouterr().err


def test_small_pictures_are_copied_as_they_are(pictures, tmp_path):
    out = tmp_path / "shards"
    assert shrink.main(["--data", str(pictures), "--out", str(out), "--short", "300"]) == 0
    assert find(out)[1].read() == (pictures / "1.jpg").read_bytes()
    assert json.loads((out / "about.json").read_text())["pictures"] == 4
    with tarfile.open(out / "shard-00000.tar") as tar:
        assert len(tar.getnames()) == 5
