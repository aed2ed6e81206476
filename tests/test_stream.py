"""Samples are the same under any number of processes, micro-batches and restarts."""

from __future__ import annotations

from itertools import islice

import numpy as np
import pytest
import torch
from PIL import Image

from train.data.pictures import DataError, Degradation
from train.data.stream import Purpose, Stream, draw, sample_generator


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    folder = tmp_path_factory.mktemp("photos")
    rng = np.random.default_rng(0)
    for n in range(5):
        pixels = rng.integers(0, 256, (80, 96, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / f"{n}.png")
    return folder


@pytest.fixture(scope="module")
def pairs(tmp_path_factory):
    folder = tmp_path_factory.mktemp("pairs")
    rng = np.random.default_rng(1)
    for part, side in (("hr", 64), ("lr", 16)):
        array = rng.integers(0, 256, (6, side, side, 3), dtype=np.uint8)
        np.save(folder / f"pairs-00000.{part}.npy", array)
    return folder


def collect(source, *, count, start=0, world=1, micro=4, **more):
    """Samples by key of `count` batches of 4, over all ranks."""
    found = {}
    for rank in range(world):
        stream = Stream(
            source, batch=4, micro=micro, crop=32, seed=3, rank=rank, world=world, **more
        )
        for batch in islice(stream.batches(start), count):
            for micro_batch in batch:
                for n, key in enumerate(micro_batch.keys):
                    lr = None if micro_batch.lr is None else micro_batch.lr[n]
                    found[key] = (micro_batch.hr[n], lr)
    return found


@pytest.mark.parametrize("kind", ["photos", "pairs"])
def test_a_sample_depends_on_its_key_alone(kind, request):
    source = request.getfixturevalue(kind)
    more = {"degradation": Degradation("mild")} if kind == "photos" else {}
    whole = collect(source, count=3, **more)
    assert sorted(whole) == list(range(12))
    for other in (
        collect(source, count=3, world=2, micro=1, **more),
        collect(source, count=3, micro=2, **more),
        collect(source, count=1, **more) | collect(source, count=2, start=1, **more),
    ):
        assert sorted(other) == sorted(whole)
        for key, (hr, lr) in whole.items():
            assert torch.equal(hr, other[key][0])
            assert torch.equal(lr, other[key][1])
    hr, lr = whole[0]
    assert hr.shape == (3, 32, 32)
    assert lr.shape == (3, 8, 8)
    assert -1 <= float(hr.min()) < -0.5 < 0.5 < float(hr.max()) <= 1


def test_pictures_alone_have_no_damaged_copy(photos):
    assert all(lr is None for _, lr in collect(photos, count=1).values())


def test_noise_depends_on_key_and_purpose_alone():
    together = draw([7, 8, 9], (2, 4, 4), seed=1, purpose=Purpose.FAKE, drop=0.5)
    alone = draw([8], (2, 4, 4), seed=1, purpose=Purpose.FAKE, drop=0.5)
    for x, y in zip(together, alone, strict=True):
        assert torch.equal(x[1:2], y)
    other = draw([8], (2, 4, 4), seed=1, purpose=Purpose.REAL)
    assert not torch.equal(other.eps, alone.eps)
    assert together.drop.shape == (3, 1, 1)
    first = [
        float(torch.rand(1, generator=sample_generator(0, k, Purpose.CROP))) for k in range(2000)
    ]
    assert np.mean(first) == pytest.approx(0.5, abs=0.03)
    assert np.corrcoef(first[:-1], first[1:])[0, 1] == pytest.approx(0, abs=0.08)


def test_dropped_prompts_are_as_many_as_asked():
    keys = list(range(2000))
    found = draw(keys, (1, 1, 1), seed=0, purpose=Purpose.FAKE, first=20, last=979, drop=0.1)
    assert found.drop.float().mean().item() == pytest.approx(0.1, abs=0.03)
    assert int(found.t.min()) >= 20
    assert int(found.t.max()) <= 979


def test_sizes_that_do_not_fit_are_named(photos):
    with pytest.raises(ValueError, match="batch of 6 is not a multiple of 2 processes x 2"):
        Stream(photos, batch=6, micro=2, crop=32, world=2)
    with pytest.raises(DataError, match="name folders"):
        Stream((), batch=1, micro=1, crop=32)
