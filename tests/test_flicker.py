"""The flicker benchmark: its clips are what they say, and its figures are those of what it was given."""

import numpy as np
import pytest
from PIL import Image

from benchmarks import flicker


@pytest.fixture(scope="module")
def picture():
    y, x = np.mgrid[:96, :140]
    waves = 120 + 60 * np.sin(x / 4) * np.cos(y / 5)
    return np.repeat(waves[..., None], 3, -1).astype(np.uint8)


@pytest.mark.parametrize("name", flicker.CLIPS)
def test_originals_do_not_flicker_and_are_perfect(picture, name):
    clip = flicker.clip_of(picture, name, side=64, frames=4)
    assert clip.frames.shape == (4, 32, 32, 3)
    assert flicker.flicker(clip.originals, clip) < 0.5  # a fade's clipping and rounding
    assert flicker.psnr(clip.originals, clip) > 100
    assert clip.covered.any() == name.startswith("object")


@pytest.mark.parametrize(
    "name", ["still, noise 5", "object, noise 5", "fade, noise 5", "pan 2, noise 5"]
)
def test_noise_of_five_levels_flickers_by_five(picture, name):
    clip = flicker.clip_of(picture, name, side=96, frames=8)
    assert flicker.flicker(clip.frames, clip) == pytest.approx(5, rel=0.15)


def test_half_a_pixel_can_not_be_compared(picture):
    clip = flicker.clip_of(picture, "pan 3, clean", side=64, frames=3)
    assert flicker.flicker(clip.frames, clip) is None
    assert flicker.flicker(clip.originals, clip) == 0


def test_a_run_prints_a_row_for_each_way(picture, tiny_checkpoint, tmp_path, capsys):
    Image.fromarray(picture).save(tmp_path / "a.png")
    words = ["--originals", tmp_path, "--model", tiny_checkpoint, "--side", 64, "--frames", 3]
    words += ["--only", "object, noise", "--dtype", "fp32"]
    assert flicker.main([*map(str, words)]) == 0
    rows = capsys.readouterr().out.splitlines()[2:5]
    assert [row.split("|")[1].split(": ")[1].strip() for row in rows] == [
        *("Lanczos", "as it comes", "steady=true")
    ]
    assert all(float(cell) > 0 for row in rows for cell in row.split("|")[2:-1])
    assert flicker.main([*map(str, words[:4]), "--side", "4096"]) == 1
    assert "smaller --side" in capsys.readouterr().err
