"""The degradations: the same for a seed, of the right statistics, and honest about missing codecs."""

import math
import warnings

import numpy as np
import pytest
import torch
from PIL import Image

from train.data import blur, codecs, degradations, noise
from train.data.draws import Draws
from train.degrade import main


def picture(seed: int, side: int = 96) -> np.ndarray:
    """A synthetic picture `side side 3` uint8: 1/f noise like a photograph's, and a few hard shapes."""
    rng = np.random.default_rng(seed)
    f = np.hypot(np.fft.fftfreq(side)[:, None], np.fft.rfftfreq(side)[None])
    f[0, 0] = 1
    spectrum = np.fft.rfft2(rng.standard_normal((4, side, side))) / f**1.3
    spectrum[:, 0, 0] = 0
    planes = np.fft.irfft2(spectrum, s=(side, side)).transpose(1, 2, 0)
    x = planes[..., :1] + 0.3 * planes[..., 1:]  # mostly light, some colour
    x = 0.5 + 0.2 * x / x.std()
    top, left = rng.integers(0, side // 2, 2)
    x[top : top + side // 3, left : left + side // 3] = rng.random(3)
    return (x.clip(0, 1) * 255).round().astype(np.uint8)


def psnr(a, b) -> float:
    return -10 * math.log10(np.mean((np.asarray(a, float) - np.asarray(b, float)) ** 2) / 255**2)


@pytest.fixture(autouse=True)
def quiet():
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "codecs not available")
        codecs.available()
        yield


@pytest.mark.parametrize("kind", degradations.KINDS)
def test_same_seed_same_picture_whatever_the_threads(kind):
    hr = picture(1)
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        one = [degradations.degrade(hr, kind=kind, seed=s, mix="tiny") for s in range(6)]
        torch.set_num_threads(2)
        two = [degradations.degrade(hr, kind=kind, seed=s, mix="tiny") for s in range(6)]
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(before)
    for a, b in zip(one, two, strict=True):
        assert a.shape == (24, 24, 3)
        assert a.dtype == np.uint8
        np.testing.assert_array_equal(a, b)
    if kind != "clean":
        assert not np.array_equal(one[0], one[1])


def test_odd_sizes_and_scales():
    hr = picture(2)[:72, :36]
    for kind in ("realesrgan", "apisr", "mild", "clean"):
        for seed in range(4):
            assert degradations.degrade(hr, kind=kind, seed=seed).shape == (18, 9, 3)
    assert degradations.degrade(hr, kind="mild", seed=0, scale=2).shape == (36, 18, 3)


def test_clean_is_antialiased_bicubic():
    hr = picture(3)
    expected = Image.fromarray(hr).resize((24, 24), Image.Resampling.BICUBIC)
    np.testing.assert_array_equal(
        degradations.degrade(hr, kind="clean", seed=0), np.asarray(expected)
    )


@pytest.mark.parametrize(
    ("hr", "kind", "words"),
    [
        (np.zeros((8, 8), np.uint8), "mild", "h w 3"),
        (np.zeros((8, 8, 3), np.float32), "mild", "uint8"),
        (np.zeros((10, 8, 3), np.uint8), "mild", "does not divide by 4"),
        (np.zeros((8, 8, 3), np.uint8), "harsh", "unknown kind"),
    ],
)
def test_wrong_input_is_named(hr, kind, words):
    with pytest.raises(ValueError, match=words):
        degradations.degrade(hr, kind=kind, seed=0)


def test_kernels_sum_to_one_and_are_symmetric():
    draws = Draws(np.random.default_rng(0), [])
    for _ in range(300):
        kernel = blur.draw_kernel(draws, degradations.REALESRGAN.stages[0].kernels)
        assert kernel.shape[0] == kernel.shape[1]
        assert 7 <= kernel.shape[0] <= 21
        assert kernel.shape[0] % 2 == 1
        assert abs(kernel.sum() - 1) < 1e-6
        # the filter runs in the frequency domain, where only such kernels need no turning
        np.testing.assert_allclose(kernel, kernel[::-1, ::-1], atol=1e-12)
    kinds = {line.split()[0] for line in draws.trace}
    assert kinds == {"sinc", *(kind for kind, _ in blur.Kernels(sigma=(1, 1)).kinds)}


@pytest.mark.parametrize("sigma", [0.8, 1.5, 3.0])
def test_gaussian_kernel_has_its_sigma(sigma):
    kernel = blur.gaussian_kernel(31, sigma)
    at = np.arange(31) - 15
    assert math.sqrt((kernel.sum(0) * at**2).sum()) == pytest.approx(sigma, rel=0.01)


def test_anisotropic_kernel_is_long_along_its_angle():
    kernel = blur.gaussian_kernel(21, 3.0, 0.5, angle=math.pi / 4)
    at = np.arange(21) - 10
    assert (kernel * at[None] * at[:, None]).sum() > 3  # x and y grow together


def test_sinc_kernel_passes_and_stops():
    kernel = blur.sinc_kernel(21, math.pi / 3)
    response = np.abs(np.fft.fft2(kernel, s=(84, 84)))
    assert response[0, 5] == pytest.approx(1, abs=0.15)  # 5/84 cycles: below the cut-off of 14/84
    assert response[0, 30] < 0.1


@pytest.mark.parametrize(("h", "w", "side"), [(40, 33, 7), (40, 33, 21), (5, 3, 21), (1, 2, 9)])
def test_blur_equals_a_direct_convolution(h, w, side):
    x = torch.rand(3, h, w)
    kernel = blur.gaussian_kernel(side, 2.0, 1.0, 0.5, "plateau", 1.5)
    reach = side // 2
    padded = x.numpy()
    mode = "symmetric" if min(h, w) == 1 else "reflect"
    padded = np.pad(padded, ((0, 0), (0, 0), (reach, reach)), mode="reflect")
    padded = np.pad(padded, ((0, 0), (reach, reach), (0, 0)), mode=mode)
    weight = torch.from_numpy(kernel).float()[None, None]
    expected = torch.nn.functional.conv2d(torch.from_numpy(padded)[:, None], weight)[:, 0]
    torch.testing.assert_close(blur.blur(x, kernel), expected, atol=2e-5, rtol=0)


@pytest.mark.parametrize("sigma", [1.0, 10.0, 30.0])
@pytest.mark.parametrize("grey", [False, True])
def test_gaussian_noise_has_its_sigma(sigma, grey):
    x = torch.full((3, 128, 128), 0.5)
    added = noise.gaussian_noise(x, sigma, grey, np.random.default_rng(0)) - x
    assert float(added.std() * 255) == pytest.approx(sigma, rel=0.05)
    assert bool((added[0] == added[1]).all()) == grey


@pytest.mark.parametrize("mean", [0.3, 2.0, 6.0, 60.0, 250.0])
def test_poisson_counts_have_mean_variance_and_skew(mean):
    counts = noise._poisson(np.random.default_rng(0), np.full(60_000, mean, np.float32))
    counts = counts.astype(np.float64)
    assert counts.min() >= 0
    assert np.array_equal(counts, counts.round())
    assert counts.mean() == pytest.approx(mean, rel=0.02)
    assert counts.var() == pytest.approx(mean, rel=0.05)
    skew = ((counts - counts.mean()) ** 3).mean() / counts.std() ** 3
    assert skew == pytest.approx(1 / math.sqrt(mean), abs=0.05)


def test_poisson_noise_grows_with_light():
    x = torch.full((3, 96, 96), 0.1)
    x[:, 48:] = 0.9
    added = noise.poisson_noise(x, 1.0, True, np.random.default_rng(0)) - x
    assert torch.equal(added[0], added[2])
    assert float(added[:, 48:].std() / added[:, :48].std()) == pytest.approx(3, rel=0.15)


@pytest.mark.parametrize("name", ["jpeg", "webp"])
def test_quality_is_monotone(name):
    hr = picture(4)
    values = [psnr(codecs.compress(hr, name, q), hr) for q in (20, 40, 60, 80, 95)]
    assert values == sorted(values)
    assert values[-1] - values[0] > 4


@pytest.mark.parametrize("name", sorted(codecs.VIDEO_ENCODERS))
def test_video_codecs_follow_their_quantiser(name):
    if not codecs.available()[name]:
        pytest.skip(f"{name}: PyAV or this encoder is not installed")
    hr = picture(5, 48)[:47, :45]
    codec = next(c for c in degradations.APISR.codecs if c.name == name)
    good, bad = (codecs.compress(hr, name, q) for q in codec.quality)
    assert good.shape == bad.shape == hr.shape
    assert codecs.compress(hr[:7, :8], name, codec.quality[0]).shape == (7, 8, 3)
    assert psnr(good, hr) > psnr(bad, hr) + 2


def chi_square(counts: dict[str, int], expected: dict[str, float]) -> tuple[float, float]:
    """The statistic, and its 99.9 % point by Wilson and Hilferty."""
    n, k = sum(counts.values()), len(expected) - 1
    value = sum((counts.get(name, 0) - n * p) ** 2 / (n * p) for name, p in expected.items())
    return value, k * (1 - 2 / (9 * k) + 3.09 * math.sqrt(2 / (9 * k))) ** 3


@pytest.mark.parametrize("everything", [False, True])
def test_codecs_are_drawn_by_their_weights(everything, monkeypatch):
    if everything:  # as if PyAV were there: the draws do not need it
        names = [c.name for c in degradations.APISR.codecs]
        monkeypatch.setattr(codecs, "available", lambda: dict.fromkeys(names, True))
    draws = Draws(np.random.default_rng(1))
    for table in (degradations.APISR.codecs, degradations.APISR.stages[0].codecs):
        expected = codecs.shares(table)
        counts: dict[str, int] = {}
        for _ in range(3000):
            name = draws.pick(tuple(expected.items()))
            counts[name] = counts.get(name, 0) + 1
        value, limit = chi_square(counts, expected)
        assert set(counts) == set(expected)
        assert value < limit
    if everything:
        assert codecs.shares(degradations.APISR.codecs) == pytest.approx(
            {c.name: c.weight for c in degradations.APISR.codecs}
        )


def test_missing_codecs_are_dropped_and_told_once(monkeypatch):
    def broken(*_):
        raise ModuleNotFoundError("No module named 'av'")

    monkeypatch.setattr(codecs, "_compress_video", broken)
    codecs.available.cache_clear()
    try:
        with warnings.catch_warnings(record=True) as told:
            warnings.simplefilter("always")
            shares = degradations.report()["apisr_last"]
            for seed in range(3):
                degradations.degrade(picture(6), kind="apisr", seed=seed)
        assert len(told) == 1
        assert "h264, h265, mpeg2, mpeg4 (No module named 'av')" in str(told[0].message)
        assert sum(shares.values()) == pytest.approx(1)
        assert "h264" not in shares
        assert shares["webp"] / shares["jpeg"] == pytest.approx(10 / 6)
    finally:
        codecs.available.cache_clear()


def test_tables_are_whole():
    for table in (degradations.REALESRGAN, degradations.APISR):
        for stage in table.stages:
            assert sum(w for _, w in stage.kernels.kinds) == pytest.approx(1)
            resize = stage.resize
            assert resize.up + resize.down + resize.keep == pytest.approx(1)
        tables = [table.codecs, *(s.codecs for s in table.stages if s.codecs)]
        for weighted in tables:
            assert sum(c.weight for c in weighted) == pytest.approx(1)
            assert {c.name for c in weighted} <= set(codecs.available())
    assert sum(w for _, w in codecs.VIDEO_PRESETS) == pytest.approx(1)
    for mix in degradations.MIXES.values():
        assert sum(mix.values()) == pytest.approx(1)
        assert set(mix) < set(degradations.KINDS)


def test_mixes_draw_their_kinds():
    hr = picture(7, 32)
    counts: dict[str, int] = {}
    for seed in range(400):
        trace: list[str] = []
        degradations.degrade(hr, kind="mixed", mix="tiny", seed=seed, trace=trace)
        counts[trace[0]] = counts.get(trace[0], 0) + 1
    value, limit = chi_square(counts, degradations.MIXES["tiny"])
    assert value < limit


def test_damage_is_in_a_plausible_band():
    """Bicubic enlargement of the copies against the crops, in dB."""
    means = {}
    for kind in ("clean", "mild", "realesrgan", "apisr"):
        values = []
        for seed in range(40):
            hr = picture(seed)
            low = Image.fromarray(degradations.degrade(hr, kind=kind, seed=seed))
            values.append(psnr(low.resize((96, 96), Image.Resampling.BICUBIC), hr))
        means[kind] = float(np.mean(values))
    assert means["clean"] > means["mild"] > means["realesrgan"] > means["apisr"] - 1
    assert 18 < (means["realesrgan"] + means["apisr"]) / 2 < 28, means


def test_sheet_is_written_past_bad_files(tmp_path, capsys):
    for i in range(3):
        Image.fromarray(picture(i, 64)).save(tmp_path / f"{i}.png")
    (tmp_path / "cut.png").write_bytes((tmp_path / "0.png").read_bytes()[:400])
    out = tmp_path / "sheet.png"
    command = ["sheet", "--data", str(tmp_path), "--out", str(out), "--crop", "64"]
    with pytest.warns(UserWarning, match=r"skipped cut\.png"):
        assert main([*command, "--kind", "mild", "--count", "5"]) == 0
    with Image.open(out) as image:
        assert image.size == (4 * 128, 2 * 98)
    command[2] = str(tmp_path / "absent")
    assert main(command) == 2
    assert "no such folder" in capsys.readouterr().err


def test_pairs_to_validate_on_are_files_of_the_same_names(tmp_path, capsys):
    """Different pictures, the copy made by its own number's seed, and nothing is written over."""
    (tmp_path / "in").mkdir()
    for i in range(3):
        Image.fromarray(picture(i, 64)).save(tmp_path / "in" / f"{i}.png")
    out = tmp_path / "val"
    command = ["pairs", "--data", str(tmp_path / "in"), "--out", str(out), "--crop", "64"]
    assert main([*command, "--kind", "mild", "--count", "5", "--seed", "4"]) == 0
    found = [sorted(p.name for p in (out / part).iterdir()) for part in ("hr", "lr")]
    assert found == [["0000.png", "0001.png", "0002.png"]] * 2
    clean = [np.asarray(Image.open(out / "hr" / name)) for name in found[0]]
    assert {c.tobytes() for c in clean} == {picture(i, 64).tobytes() for i in range(3)}
    for i, name in enumerate(found[0]):
        low = np.asarray(Image.open(out / "lr" / name))
        assert np.array_equal(low, degradations.degrade(clean[i], kind="mild", seed=4 + i))
    assert main(command) == 2
    assert "is not empty: give another --out" in capsys.readouterr().err
