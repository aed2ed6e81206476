"""Damage, measured on pictures whose damage is known, and what follows from it for fidelity."""

from __future__ import annotations

import io

import numpy as np
import pytest
import torch
from PIL import Image

from gendr import fidelity
from gendr.damage import Damage, compression, edge_blur, luma, measure, noise_map, quality, samples


def scene(height=160, width=192, seed=0, texture=True):
    """A sharp colour picture, 1 3 h w: discs on a ramp, and a patch of texture."""
    y, x = torch.meshgrid(torch.arange(height), torch.arange(width), indexing="ij")
    generator = torch.Generator().manual_seed(seed)
    picture = torch.stack((0.3 + 0.3 * x / width, 0.5 - 0.2 * y / height, 0.4 + 0.2 * x / width))
    for _ in range(30):
        top, left, radius, *colour = torch.rand(6, generator=generator).tolist()
        inside = (y - top * height) ** 2 + (x - left * width) ** 2 < (4 + 16 * radius) ** 2
        colour = torch.tensor(colour)[:, None, None] * 0.8 + 0.1
        picture = torch.where(inside, colour, picture)
    if texture:
        patch = (height // 3, width // 3)
        picture[:, : patch[0], : patch[1]] = 0.3 + 0.3 * torch.rand(1, *patch, generator=generator)
    # Four pixels make one, as in an antialiased drawing.
    return torch.nn.functional.interpolate(
        picture[None], size=(height // 2, width // 2), mode="bicubic", antialias=True
    ).clamp(0, 1)


def noisy(picture, levels, seed=1):
    generator = torch.Generator().manual_seed(seed)
    return (picture + torch.randn(picture.shape, generator=generator) * levels / 255).clamp(0, 1)


def eight_bits(picture):
    return (picture[0].permute(1, 2, 0) * 255).round().numpy().astype(np.uint8)


def jpeg(picture, quality):
    file = io.BytesIO()
    Image.fromarray(eight_bits(picture)).save(file, "JPEG", quality=quality)
    back = torch.from_numpy(np.array(Image.open(file).convert("RGB")))
    return back.permute(2, 0, 1)[None].float() / 255


def blurred(picture, sigma):
    x = torch.arange(-9, 10).float()
    kernel = torch.exp(-(x**2) / (2 * sigma**2))
    kernel = (kernel / kernel.sum()).expand(3, 1, 1, -1)
    edged = torch.nn.functional.pad(picture, (9, 9, 9, 9), mode="replicate")
    edged = torch.nn.functional.conv2d(edged, kernel, groups=3)
    return torch.nn.functional.conv2d(edged, kernel.transpose(-1, -2), groups=3)


# ---- noise ----


@pytest.mark.parametrize("levels", [3, 8, 20])
def test_noise_of_known_deviation_is_recovered(levels):
    # Texture raises it a little, clipping lowers it: 15 % hold both.
    found = measure(noisy(scene(), levels))[0].noise
    assert found == pytest.approx(levels, rel=0.15)


def test_texture_is_not_noise():
    assert measure(scene())[0].noise < 1


def test_noise_is_told_where_it_is():
    picture = scene(240, 480)
    picture[..., :120] = 0.5
    picture[..., 120:] = noisy(picture, 10)[..., 120:]
    noise = noise_map(picture)
    assert float(noise[..., :100].max()) < 0.5
    assert float(noise[..., 160:].mean()) == pytest.approx(10, rel=0.2)


def test_overexposed_parts_hide_no_noise():
    picture = noisy(scene(), 10)
    picture[..., :30, :] = 1.0
    assert float(noise_map(picture)[..., 60:, :].mean()) == pytest.approx(10, rel=0.2)


# ---- compression ----


def test_coarser_jpeg_is_found_coarser():
    picture = luma(scene(320, 384))
    found = [compression(luma(jpeg(scene(320, 384), q))) for q in (95, 90, 80, 70, 50, 30, 15)]
    assert compression(picture) == (0.0, 0.0)
    coarseness, error = zip(*found, strict=True)
    assert list(coarseness) == sorted(coarseness)
    assert list(error) == sorted(error)
    assert coarseness[0] > 0


@pytest.mark.parametrize("q", [30, 50, 75])
def test_the_quality_of_a_jpeg_is_recovered(q):
    coarseness, _ = compression(luma(jpeg(scene(320, 384), q)))
    assert quality(coarseness) == pytest.approx(q, abs=4)  # the table's steps are whole numbers


@pytest.mark.parametrize("q", [30, 60, 85])
def test_what_jpeg_has_changed_is_estimated(q):
    picture = scene(320, 384)
    damaged = jpeg(picture, q)
    true = float((luma(damaged) - luma(picture)).square().mean().sqrt()) * 255
    assert compression(luma(damaged))[1] == pytest.approx(true, rel=0.5)


def test_the_grid_of_a_cropped_jpeg_is_found():
    damaged = luma(jpeg(scene(320, 384), 40))
    whole = compression(damaged)[0]
    assert compression(damaged[..., 3:, 5:])[0] == pytest.approx(whole, rel=0.1)


def test_pixel_art_is_not_jpeg():
    """Blocks of eight pixels that were drawn: steps along a grid, and no steps of coefficients."""
    generator = torch.Generator().manual_seed(0)
    art = torch.rand(1, 3, 20, 24, generator=generator)
    found, _ = measure(art.repeat_interleave(8, -1).repeat_interleave(8, -2))
    assert found.compression < 1
    assert found.noise < 1


# ---- blur ----


@pytest.mark.parametrize("sigma", [1.0, 1.5, 2.5])
def test_blur_of_known_deviation_is_recovered(sigma):
    # A sharp picture's own edges are about .4 px wide; they add to it.
    picture = scene(320, 384, texture=False)
    assert edge_blur(luma(blurred(picture, sigma))) == pytest.approx(sigma, rel=0.2)


def test_a_blurred_background_is_not_a_blurred_picture():
    picture = scene(320, 384)
    half = picture.shape[-1] // 2
    picture[..., :half] = blurred(picture, 3)[..., :half]
    assert measure(picture)[0].blur < fidelity.SHARP


# ---- anything ----

ODD = {
    "one pixel": torch.rand(1, 3, 1, 1),
    "two pixels": torch.rand(1, 3, 1, 2),
    "a line": torch.rand(1, 3, 1, 300),
    "four": torch.rand(1, 3, 4, 4),
    "narrow": torch.rand(1, 3, 200, 5),
    "white": torch.ones(1, 3, 40, 50),
    "grey": torch.full((1, 1, 40, 50), 0.3),
}


@pytest.mark.parametrize("name", ODD)
def test_odd_pictures_are_measured(name):
    picture = ODD[name]
    found, noise = measure(picture)
    assert noise.shape == (1, 1, *picture.shape[-2:])
    assert bool(torch.isfinite(noise).all())
    assert all(value >= 0 and np.isfinite(value) for value in vars(found).values())


@pytest.mark.parametrize("name", ["white", "grey"])
def test_flat_pictures_are_clean(name):
    assert str(measure(ODD[name])[0]) == "clean"


def test_line_art_is_clean():
    y, x = torch.meshgrid(torch.arange(200), torch.arange(200), indexing="ij")
    page = torch.ones(1, 3, 200, 200)
    for n in range(12):
        distance = ((x - 100) ** 2 + (y - 90) ** 2).float().sqrt() - 7 * n
        page = page * (distance.abs() - 0.6).clamp(0, 1)
    found, noise = measure(page)
    assert str(found) == "clean"
    assert float(noise.max()) < 2


def test_a_grey_picture_is_measured_as_its_copy_in_three_channels():
    grey = luma(noisy(scene(), 6))
    one, three = measure(grey)[0], measure(grey.expand(-1, 3, -1, -1))[0]
    assert one.noise == pytest.approx(three.noise, rel=1e-4)
    assert one.blur == pytest.approx(three.blur, rel=1e-3)


def test_a_large_picture_is_read_in_crops_that_keep_the_phase_of_the_grid():
    columns = torch.arange(3000.0).expand(1, 1, 100, -1)
    crops = samples(columns)
    assert crops.shape == (3, 1, 100, 256)
    assert [float(crop[0, 0, 0]) % 8 for crop in crops] == [0, 0, 0]
    assert float(crops[-1].max()) > 2980


# ---- trust ----


def test_a_clean_input_is_trusted_where_a_result_departs_from_it():
    picture = scene()
    result = blurred(picture, 1)
    share = fidelity.trust(picture, result, *measure(picture))
    departs = (picture - result).abs().mean(1, keepdim=True) > 4 / 255
    assert float(share[departs].mean()) > 0.95


def test_noise_is_not_given_back():
    picture = scene()
    damaged = noisy(picture, 12)
    share = fidelity.trust(damaged, picture, *measure(damaged))
    assert float(share.mean()) < 0.25


def test_detail_in_noise_is_given_back_more_than_the_noise():
    picture = torch.full((1, 3, 96, 96), 0.5)
    picture[..., 40:56, ::4] = 0.9
    damaged = noisy(picture, 8)
    share = fidelity.trust(damaged, torch.full_like(picture, 0.5), *measure(damaged))
    assert float(share[..., 46:50, 10:-10].min()) > 0.9
    assert float(share[..., :25, :].mean()) < 0.2


@pytest.mark.parametrize("measured", ["noise", "compression", "blur"])
def test_more_damage_is_never_trusted_more(measured):
    picture, result = scene(), blurred(scene(), 1)
    shares = []
    for amount in (0, 0.4, 0.8, 1.2, 2, 5, 10, 30):
        noise = torch.full((1, 1, 1, 1), float(amount) if measured == "noise" else 0.0)
        damage = Damage(**{measured: amount}, quantisation=float(amount))
        shares.append(float(fidelity.trust(picture, result, damage, noise).mean()))
    assert shares == sorted(shares, reverse=True)
    assert shares[0] > 0.9
    assert shares[-1] < 0.1


# ---- back-projection ----


@pytest.mark.parametrize("scale", [1.0, 1.02, 1.1, 1.5, 2, 3, 4])
def test_a_result_is_brought_back_to_its_input(scale):
    picture = blurred(scene(), 0.6) * 0.6 + 0.2
    size = [round(side * scale) for side in picture.shape[-2:]]
    result = fidelity.resize(noisy(blurred(picture, 1.5), 4), size)
    brought = fidelity.back_project(result, picture, 1.0)
    back = fidelity.reduce(brought, picture.shape[-2:])
    # Half a step, where the damping for scales just above 1 leaves the finest pattern to itself.
    assert float((back - picture).abs().mean()) < 0.5 / 255
    assert float((back - picture).abs().max()) < 2 / 255


def test_a_long_side_is_solved_in_segments_as_if_it_were_one(monkeypatch):
    values = torch.rand(1, 3, 700, 4) - 0.5
    pieces = fidelity.unreduced(values, (1400, 8))
    fidelity._inverse.cache_clear()
    monkeypatch.setattr(fidelity, "SEGMENT", 10**6)
    assert torch.allclose(pieces, fidelity.unreduced(values, (1400, 8)), atol=1e-4)
    fidelity._inverse.cache_clear()


def test_a_smaller_result_is_brought_back_to_the_reduced_input():
    picture = scene()
    smaller = fidelity.reduce(picture, (40, 48))
    assert torch.allclose(fidelity.back_project(smaller * 0, picture, 1.0), smaller, atol=1e-6)


@pytest.mark.parametrize("scale", [1, 1.3, 2, 4])
@pytest.mark.parametrize("value", [0.0, 200 / 255, 1.0])
def test_flat_stays_flat(scale, value):
    """Whatever a network makes of it: ripples of some levels here."""
    page = torch.full((1, 3, 60, 50), value)
    size = [round(side * scale) for side in page.shape[-2:]]
    result = noisy(torch.full((1, 3, *size), value), 3)
    brought, _ = fidelity.automatic(result, page, fidelity.resize(page, size))
    assert torch.allclose(brought, torch.full_like(brought, value), atol=1e-5)


def test_white_paper_stays_white_around_print():
    page = torch.ones(1, 3, 80, 80)
    page[..., 30:50:4, 20:60] = 0.0
    result = noisy(fidelity.resize(page, (160, 160)), 3)
    brought, _ = fidelity.automatic(result, page, fidelity.resize(page, (160, 160)))
    assert bool((brought[..., :50, :] == 1).all())
    assert float((brought[..., 60:100, 40:120] < 0.5).float().mean()) > 0.2


def test_blocks_of_jpeg_are_not_flat():
    """The middle of a block without detail is as flat as paper; its edges are the damage."""
    damaged = jpeg(scene(320, 384), 20)
    found = measure(damaged)[0]
    middles = fidelity.flat(damaged, Damage()).mean()
    assert float(middles) > 0.1
    assert float(fidelity.flat(damaged, found).mean()) < 0.2 * float(middles)
