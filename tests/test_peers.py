"""Restorers read by spandrel: as teachers and as peers."""

from __future__ import annotations

import importlib.util
import sys

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from train import pairs, peers


def brighter(x: torch.Tensor) -> torch.Tensor:
    return nn.functional.interpolate(x, scale_factor=2.0) + 0.25


def test_a_teacher_rounds_and_keeps_the_range():
    teacher = peers.Teacher(brighter, digest="")
    pixels = np.array([0, 100, 250], np.uint8).reshape(1, 1, 1, 3).repeat(4, 1).repeat(4, 2)
    out = teacher.restore(pixels, 8)
    assert out.shape == (1, 8, 8, 3)
    assert out.dtype == np.uint8
    # 100/255 + .25 = .64216, 163.75 in 255ths; the last channel is beyond white.
    assert out[0, 0, 0].tolist() == [64, 164, 255]


def test_a_teacher_of_another_scale_fits_the_crop():
    teacher = peers.Teacher(brighter, digest="")
    flat = np.full((2, 8, 8, 3), 50, np.uint8)
    for side in (12, 16, 32):
        out = teacher.restore(flat, side)
        assert out.shape == (2, side, side, 3)
        assert (out == 114).all()


def test_spandrel_is_named_where_it_is_missing(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "spandrel", None)
    with pytest.raises(peers.PeerError, match="pip install --no-deps spandrel"):
        peers.read(tmp_path / "x.pth")


def test_pairs_name_what_keeps_a_teacher_from_loading(tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "spandrel", None)
    words = ["--data", tmp_path, "--out", tmp_path / "out", "--count", "1", "--teacher", "x.pth"]
    assert pairs.main([str(w) for w in words]) == 2
    assert "spandrel" in capsys.readouterr().err


@pytest.fixture
def compact(tmp_path):
    """A compact SRVGG of four channels that enlarges by 2, and the same network by hand."""
    g = torch.Generator().manual_seed(0)
    tensors = {}
    for i, (a, b) in ((0, (3, 4)), (2, (4, 4)), (4, (4, 12))):
        tensors[f"body.{i}.weight"] = torch.randn(b, a, 3, 3, generator=g) * 0.1
        tensors[f"body.{i}.bias"] = torch.rand(b, generator=g) * 0.1
    for i in (1, 3):
        tensors[f"body.{i}.weight"] = torch.rand(4, generator=g)
    save_file(tensors, tmp_path / "compact.safetensors")

    def by_hand(x):
        y = x
        for i in (0, 2, 4):
            y = nn.functional.conv2d(
                y, tensors[f"body.{i}.weight"], tensors[f"body.{i}.bias"], 1, 1
            )
            if i < 4:
                y = nn.functional.prelu(y, tensors[f"body.{i + 1}.weight"])
        return nn.functional.pixel_shuffle(y, 2) + x.repeat_interleave(2, 2).repeat_interleave(2, 3)

    return tmp_path / "compact.safetensors", by_hand


def test_a_file_becomes_the_network_that_it_holds(compact):
    if importlib.util.find_spec("spandrel") is None:
        pytest.skip("spandrel is not installed")
    path, by_hand = compact
    teacher = peers.teacher(path)
    pixels = np.random.default_rng(0).integers(60, 160, (2, 9, 7, 3), dtype=np.uint8)
    with torch.inference_mode():
        x = torch.from_numpy(pixels).permute(0, 3, 1, 2) / 255
        assert float((teacher.network(x) - by_hand(x).clamp(0, 1)).abs().max()) < 1e-5
    assert len(teacher.digest) == 64
    assert not any(p.requires_grad for p in teacher.network.model.parameters())


def test_a_file_of_nothing_is_refused(tmp_path):
    if importlib.util.find_spec("spandrel") is None:
        pytest.skip("spandrel is not installed")
    save_file({"x": torch.zeros(1)}, tmp_path / "x.safetensors")
    with pytest.raises(peers.PeerError, match="can't read"):
        peers.read(tmp_path / "x.safetensors")
    with pytest.raises(peers.PeerError, match="does not exist"):
        peers.read(tmp_path / "y.safetensors")


def test_nothing_stays_in_torchvision_s_place():
    before = {k: v for k, v in sys.modules.items() if k.startswith("torchvision")}
    with peers._without_torchvision():
        from torchvision.transforms.functional import rotate

        with pytest.raises(peers.PeerError, match="needs torchvision"):
            rotate(None, 1)
    after = {k: v for k, v in sys.modules.items() if k.startswith("torchvision")}
    assert before == after
