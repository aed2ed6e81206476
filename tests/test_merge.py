"""Checkpoints as weighted sums of others."""

from __future__ import annotations

import pytest
import torch

import gendr
from gendr.files import checkpoint
from train import merge


@pytest.fixture
def moved(tiny_checkpoint, tmp_path):
    """A checkpoint, and two others whose every weight lies .25 and 1 higher."""
    header, state = checkpoint.read(tiny_checkpoint)
    paths = [tiny_checkpoint]
    for shift in (0.25, 1.0):
        network = checkpoint.unfolded(header.config, {k: v + shift for k, v in state.items()})
        paths.append(tmp_path / f"{shift}.safetensors")
        checkpoint.save(paths[-1], network, header, dtype="fp32")
    return paths


def test_a_difference_is_added(moved, tmp_path):
    out = tmp_path / "merged.safetensors"
    sums = [f"{w}={p}" for w, p in zip((1, 1, -1), moved, strict=True)]
    assert merge.main([*sums, "--out", str(out), "--name", "Sum"]) == 0
    header, state = checkpoint.read(out)
    _, first = checkpoint.read(moved[0])
    assert header.name == "Sum"
    for name, value in state.items():
        # 0.25 - 1: the result is kept in half precision.
        torch.testing.assert_close(value.float(), first[name] - 0.75, atol=2e-3, rtol=1e-3)
    model = gendr.load(out, device="cpu", dtype="fp32")
    assert model.header.sha256


@pytest.mark.parametrize(
    ("weights", "words"), [((1, 1), "add up to 2"), (("x", 1), "write weight=file")]
)
def test_weights_that_make_no_mean_are_refused(moved, tmp_path, weights, words, capsys):
    sums = [f"{w}={p}" for w, p in zip(weights, moved, strict=False)]
    try:
        code = merge.main([*sums, "--out", str(tmp_path / "out.safetensors")])
    except SystemExit as left:
        code = left.code
    assert code == 2
    assert words in capsys.readouterr().err
    assert not (tmp_path / "out.safetensors").exists()


def test_other_structures_are_refused(moved, plain_checkpoint, tmp_path, capsys):
    sums = [f"0.5={moved[0]}", f"0.5={plain_checkpoint}"]
    assert merge.main([*sums, "--out", str(tmp_path / "out.safetensors")]) == 2
    assert "different structures" in capsys.readouterr().err


def test_nothing_is_overwritten(moved, capsys):
    before = moved[1].read_bytes()
    assert merge.main([f"1={moved[0]}", "--out", str(moved[1])]) == 2
    assert "there already" in capsys.readouterr().err
    assert moved[1].read_bytes() == before


def test_other_shapes_are_refused():
    parts = [(0.5, {"a": torch.zeros(2)}), (0.5, {"a": torch.zeros(3)})]
    with pytest.raises(ValueError, match="other tensors"):
        merge.merged(parts)
