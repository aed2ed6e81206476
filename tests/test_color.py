"""Colour fixes: what they must change, and above all what they must leave alone."""

import math

import pytest
import torch
import torch.nn.functional as F

from gendr import color
from gendr.settings import COLOR_FIXES

pytestmark = pytest.mark.threads
FIXES = ("wavelet", "adain", "lab")
SIZES = [(1, 1), (1, 400), (400, 1), (2, 3), (7, 5), (31, 64), (97, 53)]


def picture(height, width, *, batch=1, seed=0, channels=3):
    """A smooth random picture with some detail, b c h w in [0, 1]."""
    generator = torch.Generator().manual_seed(seed)
    coarse = torch.rand(batch, channels, 5, 5, generator=generator)
    fine = torch.rand(batch, channels, height, width, generator=generator)
    smooth = F.interpolate(coarse, (height, width), mode="bilinear", align_corners=True)
    return 0.8 * smooth + 0.2 * fine


def low(image):
    """The method's blur, written the slow way: five padded 3x3 convolutions per channel."""
    kernel = torch.tensor([1.0, 2, 1])
    kernel = torch.outer(kernel, kernel)[None, None] / 16
    planes = image.flatten(0, 1)[:, None].double()
    for level in range(5):
        d = 2**level
        planes = F.conv2d(F.pad(planes, (d, d, d, d), "replicate"), kernel.double(), dilation=d)
    return planes[:, 0].unflatten(0, image.shape[:2])


def hue(rgb):
    """HSV hue in degrees of three numbers."""
    r, g, b = (float(v) for v in rgb)
    return math.degrees(math.atan2(3**0.5 * (g - b), 2 * r - g - b)) % 360


def test_the_names_are_the_settings():
    assert ("auto", *color.METHODS) == COLOR_FIXES


def test_unknown_name_is_told_the_known_ones():
    x = torch.rand(1, 3, 4, 4)
    with pytest.raises(ValueError, match=r"wavelet, adain, lab.*got 'hsv'"):
        color.apply("hsv", x, x)


@pytest.mark.parametrize("fix", FIXES)
def test_shapes_that_differ_are_named(fix):
    with pytest.raises(ValueError, match=r"\(1, 3, 4, 4\) and \(1, 3, 8, 8\)"):
        color.apply(fix, torch.rand(1, 3, 4, 4), torch.rand(1, 3, 8, 8))


@pytest.mark.parametrize("fix", color.METHODS)
@pytest.mark.parametrize("size", SIZES)
def test_equal_pictures_stay(fix, size):
    x = picture(*size)
    out = color.apply(fix, x, x)
    assert out.shape == x.shape
    assert out.dtype == torch.float32
    assert torch.allclose(out, x, atol=1e-6 if fix != "lab" else 2e-5)


@pytest.mark.parametrize("fix", color.METHODS)
@pytest.mark.parametrize("y", [0.0, 0.4, 1.0])
@pytest.mark.parametrize("x", [0.0, 0.6, 1.0])
def test_constant_pictures_become_the_input(fix, x, y):
    x, y = torch.full((2, 3, 9, 11), x), torch.full((2, 3, 9, 11), y)
    out = color.apply(fix, y, x)
    assert torch.allclose(out, y if fix == "none" else x, atol=1e-5)


@pytest.mark.parametrize("fix", FIXES)
@pytest.mark.parametrize("size", SIZES)
def test_no_nan_and_inputs_untouched(fix, size):
    x, y = picture(*size, seed=1) * 1.4 - 0.2, picture(*size, seed=2) * 3 - 1
    before = x.clone(), y.clone()
    assert color.apply(fix, y, x).isfinite().all()
    assert color.apply(fix, torch.zeros_like(y), x).isfinite().all()
    assert x.equal(before[0])
    assert y.equal(before[1])


def in_float64(fix: str, y: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    """The colour fix over whole pictures in float64: what float32 in any order only rounds."""
    y, x = y.double(), x.double()
    if fix == "wavelet":
        return y - low(y) + low(x)
    in_lab = fix == "lab"
    a, b = (color.to_lab(t) if in_lab else t for t in (y, x))
    (a_var, a_mean), (b_var, b_mean) = (
        torch.var_mean(t, dim=(-2, -1), correction=0 if in_lab else 1, keepdim=True) for t in (a, b)
    )
    eps = color.LAB_EPS if in_lab else color.ADAIN_EPS
    out = color._match(a, a_mean, a_var, b_mean, b_var, eps)
    return color.encode(color.into_gamut(color._linear_from_lab(out))) if in_lab else out


@pytest.mark.parametrize("fix", FIXES)
def test_layout_batch_and_strips_change_rounding_alone(fix, monkeypatch):
    # Whatever the order of sums, which follows from the processor and its threads, float32 stays
    # this close to float64. Values are below 1 and rounded about ten times, 2**-24 each: 6e-7.
    # Through Lab, three roundings of a cube root of up to .8 are 3 * .8**2 * 3 * 2**-24 = 3.4e-7
    # of linear light; in a dark channel of a bright colour the sRGB curve makes 12.92 times as
    # much of them, 4.4e-6.
    bound = 5e-6 if fix == "lab" else 1e-6
    x, y = picture(300, 41, batch=2, seed=3), picture(300, 41, batch=2, seed=4)
    expected = in_float64(fix, y, x)

    def check(got):
        assert float((got.double() - expected).abs().max()) < bound

    check(color.apply(fix, y, x))
    check(
        color.apply(
            fix,
            y.to(memory_format=torch.channels_last),
            x.transpose(2, 3).contiguous().transpose(2, 3),
        )
    )
    check(torch.cat([color.apply(fix, y[i : i + 1], x[i : i + 1]) for i in range(2)]))
    monkeypatch.setattr(color, "STRIP", 41 * 50)
    check(color.apply(fix, y, x))


@pytest.mark.parametrize("fix", FIXES)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_computed_in_float32(fix, dtype):
    x, y = picture(20, 30, seed=5).to(dtype), picture(20, 30, seed=6).to(dtype)
    out = color.apply(fix, y, x)
    assert out.dtype == torch.float32
    assert torch.allclose(out, color.apply(fix, y.float(), x.float()), atol=1e-6)


@pytest.mark.gpu
@pytest.mark.parametrize("fix", FIXES)
@pytest.mark.parametrize("size", [(1, 1), (64, 50)])
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_a_gpu_gives_the_same(fix, size):
    x, y = picture(*size, seed=7), picture(*size, seed=8)
    there = color.apply(fix, y.cuda(), x.cuda()).cpu()
    assert torch.allclose(there, color.apply(fix, y, x), atol=2e-5)


@pytest.mark.parametrize("size", SIZES)
def test_wavelet_is_high_of_output_and_low_of_input(size):
    x, y = picture(*size, seed=1), picture(*size, seed=2)
    expected = y.double() - low(y) + low(x)
    assert torch.allclose(color.wavelet(y, x).double(), expected, atol=2e-6)


def test_wavelet_removes_a_shift_of_colour():
    x = picture(50, 70)
    shift = torch.tensor([0.2, -0.1, 0.05])[:, None, None]
    error = (color.wavelet(x + shift, x) - x).mean(dim=(-2, -1))
    assert error.abs().max() < 1e-6


def test_wavelet_keeps_the_detail_of_the_output():
    x = picture(96, 96)
    checker = (torch.arange(96)[:, None] + torch.arange(96)) % 2 * 0.1
    kept = (color.wavelet(x + checker, x) - x)[..., 40:50, 40:50]
    assert torch.allclose(kept - kept.mean(), (checker - 0.05)[40:50, 40:50], atol=1e-6)


def test_adain_takes_mean_and_deviation():
    x, y = picture(40, 60, batch=2, seed=1), 0.8 * picture(40, 60, batch=2, seed=2) + 0.3
    out = color.adain(y, x)
    assert torch.allclose(out.mean((-2, -1)), x.mean((-2, -1)), atol=1e-4)
    assert torch.allclose(out.std((-2, -1)), x.std((-2, -1)), atol=1e-4)


def test_lab_takes_mean_and_deviation():
    x = 0.3 + 0.4 * picture(40, 60, batch=2, seed=1)
    y = 0.4 + 0.2 * picture(40, 60, batch=2, seed=2)
    out, target = color.to_lab(color.lab(y, x)), color.to_lab(x)
    assert torch.allclose(out.mean((-2, -1)), target.mean((-2, -1)), atol=0.1)
    assert torch.allclose(out.std((-2, -1)), target.std((-2, -1)), rtol=0.02)


def test_lab_stays_in_range():
    x, y = picture(30, 30, seed=1), picture(30, 30, seed=2)
    x = (x - 0.5) * 3 + 0.5
    out = color.lab(y, x.clamp(0, 1))
    assert out.min() >= 0
    assert out.max() <= 1


@pytest.mark.parametrize("brightness", [0.6, 0.8, 1.0])
@pytest.mark.parametrize("drift", [(0.1, 0.0, -0.1), (0.0, 0.1, 0.0), (0.15, 0.15, 0.15)])
def test_saturated_blue_stays_blue(brightness, drift):
    blue = torch.tensor([0.0, 0.0, brightness])[:, None, None]
    shade = 0.7 + 0.3 * picture(32, 48, channels=1)
    x = (blue * shade).clamp(0, 1)
    y = (x + torch.tensor(drift)[:, None, None] + 0.05 * picture(32, 48, seed=3)).clamp(0, 1)
    for fix in FIXES:
        out = color.apply(fix, y, x).clamp(0, 1)
        assert abs(hue(out.mean((0, 2, 3))) - 240) < 6, fix


def test_blue_in_a_picture_that_gets_brighter_does_not_turn_purple():
    x = picture(64, 64, seed=9) * 0.5 + 0.4
    x[..., :20, :20] = torch.tensor([0.0, 0.0, 1.0])[:, None, None]
    y = 0.75 * x
    patch = color.lab(y, x)[..., 2:18, 2:18].mean((0, 2, 3))
    assert abs(hue(patch) - 240) < 8


@pytest.mark.parametrize("fix", FIXES)
def test_grey_stays_grey(fix):
    grey = picture(24, 24, channels=1)
    y = (0.8 * grey + 0.15 + 0.1 * picture(24, 24, channels=1, seed=2)).expand(-1, 3, -1, -1)
    out = color.apply(fix, y, grey.expand(-1, 3, -1, -1))
    assert (out.amax(1) - out.amin(1)).max() < 1e-5
    assert torch.allclose(color.apply(fix, y[:, :1], grey), out[:, :1], atol=1e-5)


def test_out_of_gamut_colours_keep_their_hue():
    colours = torch.tensor([[0.0, 0.0, 1.3], [1.2, -0.05, -0.05], [-0.1, 0.9, -0.1]])[
        :, :, None, None
    ]
    inside = color.into_gamut(colours)
    assert inside.min() >= 0
    assert inside.max() <= 1
    for before, after in zip(colours, inside, strict=True):
        assert abs(hue(before.flatten()) - hue(after.flatten())) < 0.1


def test_lab_values_are_the_published_ones():
    rgb = torch.tensor([[1.0, 1, 1], [0, 0, 0], [1, 0, 0], [0, 1, 0], [0, 0, 1], [0.5, 0.5, 0.5]])
    known = [(100, 0, 0), (0, 0, 0), (53.24, 80.09, 67.20), (87.73, -86.18, 83.18)]
    known += [(32.30, 79.19, -107.86), (53.39, 0, 0)]
    got = color.to_lab(rgb[:, :, None, None])
    assert torch.allclose(got.flatten(1), torch.tensor(known), atol=0.02)
    back = color.encode(color._linear_from_lab(got))
    assert torch.allclose(back.flatten(1), rgb, atol=2e-5)


def test_delta_e_is_a_distance_per_picture(monkeypatch):
    a, b = picture(70, 20, batch=3, seed=1), picture(70, 20, batch=3, seed=2)
    b[1] = a[1]
    got = color.delta_e(a, b)
    assert got.shape == (3,)
    assert got[1] == 0
    whole = (color.to_lab(a) - color.to_lab(b)).norm(dim=1).mean((1, 2))
    assert torch.allclose(got, whole, rtol=1e-5)
    monkeypatch.setattr(color, "STRIP", 1000)
    assert torch.allclose(color.delta_e(a, b), whole, rtol=1e-5)
    black, white = torch.zeros(1, 1, 3, 3), torch.ones(1, 1, 3, 3)
    assert color.delta_e(black, white).item() == pytest.approx(100, abs=0.01)
    with pytest.raises(ValueError, match="alpha"):
        color.delta_e(torch.rand(1, 4, 2, 2), torch.rand(1, 4, 2, 2))
