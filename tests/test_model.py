"""The promises of `GenDR.restore`, with tiny random networks."""

from __future__ import annotations

import math
from decimal import ROUND_HALF_UP, Decimal

import numpy as np
import pytest
import torch

import gendr
from gendr import Settings
from gendr.alpha import fill_transparent
from gendr.fidelity import reduce
from gendr.networks.onestep import OneStep
from gendr.networks.strips import Strips
from gendr.settings import NAMES, PRESETS


def picture(h: int, w: int, c: int = 3, b: int = 1, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.rand(b, c, h, w, generator=generator)


def in_decimals(side: int, scale: float) -> int:
    """The rounding of people: halves go up."""
    exact = side * Decimal(str(scale))
    return int(exact.quantize(Decimal(1), rounding=ROUND_HALF_UP))


def test_sizes_are_rounded_in_decimals():
    assert Settings(scale=1.15).target_size(50, 10) == (58, 12)
    scales = [round(1 + n * 0.05, 2) for n in range(141)] + [
        1.005,
        1.37,
        1.333,
        2.125,
        3.1415,
        7.999,
    ]
    for scale in scales:
        # The sum of a widget's steps means the same, although its last bit may differ.
        for given in (scale, math.nextafter(scale, 8), math.nextafter(scale, 1)):
            settings = Settings(scale=given)
            for side in (1, 3, 10, 30, 50, 70, 90, 110, 130, 250, 1000, 1001, 4990):
                assert settings.target_size(side, 1)[0] == in_decimals(side, scale), (scale, side)


@pytest.mark.parametrize("side", [1, 7, 99, 100, 101, 333, 1600])
def test_a_side_asked_for_is_that_side(side):
    assert max(Settings(long_side=side).target_size(200, 311)) == side
    assert min(Settings(short_side=side).target_size(200, 311)) == side


@pytest.mark.parametrize("size", [(1, 1), (1, 40), (37, 53), (7, 3), (32, 32)])
@pytest.mark.parametrize("scale", [1.0, 1.37, 2.5, 4.0])
def test_output_size_is_input_times_scale(tiny, size, scale):
    y = tiny.restore(picture(*size), scale=scale)
    assert y.shape == (1, 3, *(in_decimals(side, scale) for side in size))
    assert y.dtype == torch.float32
    assert float(y.min()) >= 0
    assert float(y.max()) <= 1


def test_panorama_and_largest_scale(tiny):
    assert tiny.restore(picture(1, 400), scale=4).shape == (1, 3, 4, 1600)
    assert tiny.restore(picture(9, 5), scale=8).shape == (1, 3, 72, 40)


@pytest.mark.parametrize(
    ("settings", "size"),
    [
        ({"long_side": 100}, (64, 100)),
        ({"short_side": 100}, (100, 156)),
        ({"megapixels": 0.01}, (80, 125)),
        ({"long_side": 25}, (16, 25)),
    ],
)
def test_target_sizes(tiny, settings, size):
    assert tiny.restore(picture(32, 50), **settings).shape[-2:] == size


def test_same_input_same_output(tiny):
    x = picture(20, 30)
    assert torch.equal(tiny.restore(x, scale=2), tiny.restore(x, scale=2))


@pytest.mark.parametrize("settings", [{}, {"tile": 64, "overlap": 16, "tile_batch": 3}])
def test_batch_equals_singles(tiny, settings):
    x = picture(30, 40, b=3)
    whole = tiny.restore(x, scale=3, **settings)
    for index in range(3):
        assert torch.equal(
            whole[index : index + 1], tiny.restore(x[index : index + 1], 3, **settings)
        )


def test_input_is_left_alone(tiny):
    x = picture(16, 16)
    before = x.clone()
    tiny.restore(x, scale=2, fidelity=0.5, seamless=True)
    assert torch.equal(x, before)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_any_float_dtype(tiny, dtype):
    x = picture(16, 16).to(dtype)
    assert torch.allclose(tiny.restore(x, 2), tiny.restore(x.float(), 2), atol=1e-6)


def test_grey_stays_grey_and_equals_grey_colours(tiny):
    x = picture(16, 20, c=1)
    y = tiny.restore(x, scale=2)
    assert y.shape[1] == 1
    weights = torch.tensor([0.299, 0.587, 0.114])[:, None, None]
    colours = tiny.restore(x.expand(-1, 3, -1, -1), scale=2)
    assert torch.allclose(y, (colours * weights).sum(1, keepdim=True), atol=1e-5)


def test_alpha_is_kept(tiny):
    rgb = picture(16, 16)
    opaque = torch.cat([rgb, torch.ones(1, 1, 16, 16)], 1)
    y = tiny.restore(opaque, scale=3)
    assert y.shape[1] == 4
    assert bool((y[:, 3] == 1).all())
    assert torch.equal(y[:, :3], tiny.restore(rgb, scale=3))
    opaque[:, 3, :, :8] = 0
    assert float(tiny.restore(opaque, scale=3)[:, 3, :, :15].max()) < 0.1
    assert tiny.restore(picture(8, 8, c=2), scale=2).shape == (1, 2, 16, 16)


def test_what_is_hidden_does_not_shine_through(tiny):
    a = torch.cat([picture(16, 16), torch.ones(1, 1, 16, 16)], 1)
    a[:, 3, 4:9, 5:11] = 0
    b = a.clone()
    b[:, :3, 4:9, 5:11] = 1
    assert torch.equal(tiny.restore(a, 2), tiny.restore(b, 2))


def test_filling_leaves_the_visible_alone():
    colours, alpha = picture(13, 9), torch.ones(1, 1, 13, 9)
    alpha[..., 3:8, 2:5] = 0
    filled = fill_transparent(colours, alpha)
    seen = alpha.expand(-1, 3, -1, -1) > 0
    assert torch.equal(filled[seen], colours[seen])
    flat = fill_transparent(torch.full_like(colours, 0.3) * alpha, alpha)
    assert torch.allclose(flat, torch.full_like(flat, 0.3), atol=1e-6)


def disc(ground: float, alpha: float) -> torch.Tensor:
    """A bright opaque disc on a ground of that grey and alpha, 1 4 h w."""
    rows, columns = torch.meshgrid(torch.arange(40.0), torch.arange(48.0), indexing="ij")
    inside = ((rows - 20) ** 2 + (columns - 24) ** 2 <= 144)[None, None]
    colours = torch.where(inside, 0.9, ground).expand(-1, 3, -1, -1)
    return torch.cat([colours, torch.where(inside, 1.0, alpha)], 1)


@pytest.mark.parametrize("alpha", [1 / 255, 8 / 255])
def test_a_nearly_invisible_ground_draws_no_outline(alpha):
    model = gendr.load(device="cpu", dtype="fp32")
    hidden, faint = (model.restore(disc(0.0, a), 2) for a in (0.0, alpha))
    # Over any background only what the ground itself shows differs, not an outline.
    for background in (0.0, 1.0):
        shown = [y[:, :3] * y[:, 3:] + background * (1 - y[:, 3:]) for y in (hidden, faint)]
        assert float((shown[0] - shown[1]).abs().max()) <= alpha + 1 / 255


def test_colours_of_what_is_seen_stay():
    for alpha in (1.0, 0.3, 0.125):
        shadow = disc(0.2, alpha)
        assert torch.equal(fill_transparent(shadow[:, :3], shadow[:, 3:]), shadow[:, :3])
    faint = torch.cat([picture(20, 20), torch.full((1, 1, 20, 20), 2 / 255)], 1)
    assert torch.equal(fill_transparent(faint[:, :3], faint[:, 3:]), faint[:, :3])


def test_what_is_shown_changes_little_by_filling():
    """A colour may change by its whole range only where next to nothing is seen of it."""
    for alpha in torch.linspace(0, 1, 65).tolist():
        x = disc(0.0, alpha)
        changed = (fill_transparent(x[:, :3], x[:, 3:]) - x[:, :3]) * x[:, 3:]
        # The largest value of alpha (1 - (8 alpha)^2).
        assert float(changed.abs().max()) <= 0.9 * 0.0482


def test_out_of_range_values_are_clamped(tiny):
    x = picture(16, 16) * 3 - 1
    assert torch.equal(tiny.restore(x, 2), tiny.restore(x.clamp(0, 1), 2))


@pytest.mark.parametrize(
    ("image", "words"),
    [
        (torch.rand(0, 3, 8, 8), "batch is empty"),
        (torch.rand(1, 3, 0, 8), "empty"),
        (torch.rand(3, 8, 8), "b c h w"),
        (torch.rand(1, 8, 8, 3), "b c h w, not b h w c"),
        (torch.full((1, 3, 8, 8), float("nan")), "192 values that are NaN"),
        (torch.zeros(1, 3, 8, 8, dtype=torch.uint8), "divide 8-bit values by 255"),
        (torch.rand(1, 3, 8, 8, device="meta"), "without its numbers"),
        (torch.rand(1, 3, 8, 8).to_sparse(), "sparse"),
    ],
)
def test_bad_input_is_named(tiny, image, words):
    with pytest.raises(ValueError, match=words):
        tiny.restore(image)


@pytest.mark.parametrize(
    "settings",
    [
        {"scale": 0.5},
        {"scale": 9},
        {"scale": float("nan")},
        {"detail": 2.0},
        {"fidelity": -0.1},
        {"color_fix": "sepia"},
        {"tile": -64},
        {"tile": 64.5},
        {"long_side": 100, "megapixels": 1.0},
        {"scale": "4"},
        {"scale": 10**400},
        {"scale": None},
        {"detail": None},
        {"fidelity": None},
        {"tile": float("nan")},
        {"tile": 10**400},
        {"seamless": "no"},
        {"seamless": None},
        {"steady": 0.5},
    ],
)
def test_bad_settings_are_named(settings):
    with pytest.raises(ValueError, match=next(iter(settings))):
        Settings(**settings)


def test_numbers_of_numpy_are_numbers():
    given = Settings(scale=np.float32(1.5), tile=np.int64(64), seamless=np.bool_(True))
    assert given == Settings(scale=1.5, tile=64, seamless=True)
    assert {type(v) for v in (given.scale, given.tile, given.seamless)} == {float, int, bool}


@pytest.mark.parametrize(("low", "high"), [(0, 255), (-1, 1)])
def test_another_range_of_values_is_told(tiny, low, high):
    x = picture(8, 8)
    assert tiny.restore_with_report(x * 1.2 - 0.1, 1)[1].events == []
    told = tiny.restore_with_report(low + (high - low) * x, 1)[1].events[0]
    assert "were clipped to 0 to 1: divide 8-bit values by 255" in told


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"mask": [1]}, "A mask must be a tensor h w or b h w, got list"),
        ({"prompt": [1]}, "a prompt must be a tensor 1 n d, got list"),
    ],
)
def test_what_is_no_tensor_is_named(tiny, options, words):
    with pytest.raises(ValueError, match=words):
        tiny.restore(picture(8, 8), 1, **options)


@pytest.mark.parametrize("size", [(0, 5), (-1, 5), (5, 5.5), ("5", 5)])
def test_no_plan_is_made_for_what_is_no_size(tiny, size):
    with pytest.raises(ValueError, match="must be whole numbers from 1 up"):
        tiny.plan(*size)


def test_too_large_a_target_is_refused(tiny):
    with pytest.raises(ValueError, match=r"25\.0 times the input"):
        tiny.restore(picture(4, 4), long_side=100)


def test_a_tile_that_covers_all_changes_nothing(tiny):
    x = picture(24, 40)
    assert torch.equal(tiny.restore(x, 2), tiny.restore(x, 2, tile=128))


def test_modes_agree_without_normalisation(plain):
    """Without GroupNorm only the UNet sees where tiles end; autoencoder alone: all modes equal."""
    x = picture(50, 70)
    whole = plain.restore(x, 4, tile=512, detail=0.0)
    strips, report = plain.restore_with_report(x, 4, detail=0.0)
    assert report.mode == "latent_tiles"
    assert torch.allclose(whole, strips, atol=1e-5)
    tiles, report = plain.restore_with_report(x, 4, tile=128, overlap=64, detail=0.0)
    assert report.mode == "tiles"
    assert report.tiles > 1
    # In the middle of a tile nothing is seen of its edges.
    assert torch.allclose(whole[..., :30, :30], tiles[..., :30, :30], atol=1e-4)


@pytest.mark.parametrize("settings", [{}, {"tile": 64, "overlap": 16}, {"tile": 512}])
def test_progress_counts_all_work(tiny, settings):
    seen = []
    tiny.restore(picture(40, 50, b=2), 3, progress=seen.append, **settings)
    assert sorted({p.done for p in seen} - {0}) == list(range(1, seen[-1].total + 1))
    assert {p.image_index for p in seen} == {0, 1}
    last = seen[-1].preview()
    assert last.shape[0] == 3
    assert max(last.shape[1:]) <= 256


@pytest.mark.parametrize("settings", [{}, {"tile": 64, "overlap": 16}])
def test_cancel_takes_effect_at_once(tiny, settings):
    seen = []
    with pytest.raises(gendr.Cancelled):
        tiny.restore(
            picture(40, 50), 3, progress=seen.append, cancelled=lambda: len(seen) >= 2, **settings
        )
    assert len(seen) == 2


def test_what_callbacks_raise_passes_through(tiny):
    class Stop(BaseException):
        pass

    def progress(_):
        raise Stop

    with pytest.raises(Stop):
        tiny.restore(picture(8, 8), 2, progress=progress)


def test_out_of_memory_goes_on_with_smaller_tiles(tiny, monkeypatch):
    x = picture(32, 48)
    calls = []
    real = tiny.network.decode

    def small_card(z):
        calls.append(tuple(z.shape[-2:]))
        if z.shape[-1] > 10:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return real(z)

    monkeypatch.setattr(tiny.network, "decode", small_card)
    y, report = tiny.restore_with_report(x, 4, tile=128, overlap=32)
    assert y.shape == (1, 3, 128, 192)
    assert any("out of memory" in event for event in report.events)
    failed = [c for c in calls if c[1] > 10]
    assert len(failed) == 1
    assert "out of memory" in str(report)


def test_out_of_memory_in_strips_goes_on_in_tiles(plain, monkeypatch):
    x = picture(50, 70)

    real = Strips.decode

    def little_room(self, z):
        if z.shape[-1] > 20:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return real(self, z)

    monkeypatch.setattr(Strips, "decode", little_room)
    y, report = plain.restore_with_report(x, 4)
    assert y.shape == (1, 3, 200, 280)
    assert any("going on in tiles" in event for event in report.events)
    assert report.mode == "tiles"
    assert report.plan.strips is False


def test_nan_in_low_precision_is_computed_again(tiny_checkpoint, monkeypatch):
    x = picture(16, 16)
    good = gendr.load(tiny_checkpoint, device="cpu", dtype="fp32").restore(x, 2)
    model = gendr.load(tiny_checkpoint, device="cpu", dtype="bf16")
    real = OneStep.predict

    def overflow(self, z, prompts):
        return real(self, z, prompts) * (float("nan") if z.dtype == torch.bfloat16 else 1.0)

    monkeypatch.setattr(OneStep, "predict", overflow)
    y, report = model.restore_with_report(x, 2)
    # The weights keep their bf16 rounding.
    assert float((y - good).abs().mean()) < 0.01
    assert any("again in fp32" in event for event in report.events)
    assert model.network.compute == (torch.bfloat16, torch.bfloat16)


def test_nan_in_every_precision_is_an_error(tiny):
    tiny.network.decoder.conv_out.weight.fill_(float("nan"))
    with pytest.raises(gendr.NotFinite, match="not finite even in fp32"):
        tiny.restore(picture(8, 8), 2)


def test_detail_moves_in_a_straight_line(tiny):
    x = picture(16, 16)
    latents = {}

    def remember(detail):
        z = tiny.network.encode(2 * x - 1)
        latents[detail] = tiny.network.step(z, detail=detail)

    for detail in (0.0, 0.5, 1.0, 1.5):
        remember(detail)
    step = latents[1.0] - latents[0.0]
    assert torch.allclose(latents[0.5], latents[0.0] + 0.5 * step, atol=1e-5)
    assert torch.allclose(latents[1.5], latents[0.0] + 1.5 * step, atol=1e-5)


@pytest.mark.parametrize("scale", [2.0, 3.3])
def test_full_fidelity_gives_the_input_back(tiny, scale):
    x = picture(24, 31) * 0.6 + 0.2
    x = torch.nn.functional.avg_pool2d(x, 3, 1, 1, count_include_pad=False)
    y = tiny.restore(x, scale, fidelity=1.0)
    assert float((reduce(y, (24, 31)) - x).abs().max()) <= 1 / 255
    plain = tiny.restore(x, scale, fidelity=0.0)
    half = tiny.restore(x, scale, fidelity=0.5)
    middle = (reduce(plain, (24, 31)) + x) / 2
    assert float((reduce(half, (24, 31)) - middle).abs().max()) <= 1 / 255


def test_full_fidelity_at_the_same_size_is_the_input(tiny):
    x = picture(24, 31)
    assert torch.allclose(tiny.restore(x, 1.0, fidelity=1.0), x, atol=1e-6)


def test_by_default_the_report_says_what_was_found_of_each_picture(tiny):
    x = torch.cat([torch.full((1, 3, 64, 64), 0.5), picture(64, 64)])
    _, report = tiny.restore_with_report(x, 2.0)
    assert "input 1: clean; fidelity " in str(report)
    assert "input 2: noise of about " in str(report)
    assert [set(one) for one in report.as_dict()["found"]] == [
        {"noise", "quantisation", "compression", "blur", "fidelity"}
    ] * 2
    _, told = tiny.restore_with_report(x, 2.0, fidelity=0.5)
    assert told.found == []


def test_a_picture_is_measured_alone_whatever_is_in_the_batch(tiny):
    noisy, clean = picture(40, 40), torch.full((1, 3, 40, 40), 0.5)
    both = tiny.restore(torch.cat([noisy, clean]), 2.0)
    assert torch.equal(both[:1], tiny.restore(noisy, 2.0))
    assert torch.equal(both[1:], tiny.restore(clean, 2.0))


@pytest.mark.parametrize("channels", [1, 2, 3, 4])
@pytest.mark.parametrize("options", [{}, {"seamless": True}])
@pytest.mark.parametrize("scale", [1.0, 2.5])
def test_a_flat_picture_comes_out_as_it_is(tiny, channels, options, scale):
    x = torch.ones(1, channels, 33, 40)
    assert torch.allclose(tiny.restore(x, scale, **options), torch.ones(1), atol=1e-5)


@pytest.mark.parametrize("preset", PRESETS)
def test_a_preset_fills_in_what_is_left_at_its_default(preset):
    plain = Settings()
    for name, value in PRESETS[preset].items():
        assert getattr(Settings(preset=preset), name) == value
        other = 0.4 if isinstance(value, float) else value
        assert getattr(Settings(preset=preset, **{name: other}), name) == other
    untouched = set(NAMES) - set(PRESETS[preset]) - {"preset"}
    assert all(getattr(Settings(preset=preset), n) == getattr(plain, n) for n in untouched)


@pytest.mark.parametrize("fix", ["none", "wavelet", "adain", "lab"])
def test_every_colour_fix_keeps_the_promises(tiny, fix):
    y = tiny.restore(picture(17, 19), 2, color_fix=fix)
    assert y.shape == (1, 3, 34, 38)
    assert bool(torch.isfinite(y).all())


def test_seamless_edges_meet(plain):
    """The step across the edge of a repeating picture is no larger than inside."""
    h, w = 24, 36
    rows, columns = torch.meshgrid(torch.arange(h) / h, torch.arange(w) / w, indexing="ij")
    wave = 0.5 + 0.2 * torch.sin(6.2832 * rows) * torch.cos(6.2832 * columns)
    x = wave.expand(1, 3, h, w)

    def steps(y):
        inside = max((y[..., 1:, :] - y[..., :-1, :]).abs().max(), (y.diff(dim=-1)).abs().max())
        across = max(
            (y[..., 0, :] - y[..., -1, :]).abs().max(), (y[..., 0] - y[..., -1]).abs().max()
        )
        return float(across / inside)

    assert steps(plain.restore(x, 4, seamless=True)) <= 1.0
    assert plain.restore(x, 2.3, seamless=True).shape == (1, 3, 55, 83)


def test_guidance_needs_a_negative_prompt(tiny, plain):
    x = picture(8, 8)
    assert not torch.equal(tiny.restore(x, 2, guidance=3.0), tiny.restore(x, 2))
    assert torch.equal(tiny.restore(x, 2, guidance=1.0), tiny.restore(x, 2))
    with pytest.raises(ValueError, match="no negative prompt"):
        plain.restore(x, 2, guidance=3.0)


def test_plan_is_what_runs(tiny):
    for settings in ({}, {"tile": 64, "overlap": 16}, {"tile": 512}):
        plan = tiny.plan(40, 50, Settings(scale=4, **settings))
        y, report = tiny.restore_with_report(picture(40, 50), 4, **settings)
        assert (plan.mode, plan.tiles, plan.tile) == (report.mode, report.tiles, report.tile)
        assert tuple(y.shape[-2:]) == plan.output_size
        assert str(plan.output_size[1]) in str(plan)


def test_plan_follows_free_memory(tiny):
    plans = [tiny.plan(512, 512, Settings(), free_bytes=int(n * 2**30)) for n in (64, 0.5)]
    assert [p.mode for p in plans] == ["latent_tiles", "tiles"]
    assert plans[0].bytes_needed > plans[1].bytes_needed
    assert all(p.bytes_needed <= p.free_bytes for p in plans)


def test_report_tells_what_was_done(tiny):
    x = picture(20, 20)
    _, report = tiny.restore_with_report(x, 2)
    text = str(report)
    assert "20x20 -> 40x40" in text
    assert report.as_dict()["output_size"] == (40, 40)
    assert text == text.strip()
    assert report.lr_psnr > 5


def test_difference_shows_where_detail_was_invented(tiny):
    x = picture(16, 16)
    y = gendr.resize(x, (32, 32))
    assert float(gendr.difference(y, x).max()) == 0
    y[..., 5:9, 5:9] = 1 - y[..., 5:9, 5:9]
    assert gendr.difference(y, x).shape == (1, 1, 32, 32)
    assert float(gendr.difference(y, x)[..., 20:, :].max()) == 0


def test_twenty_runs_leave_no_tensors(tiny):
    import gc

    x = picture(12, 12)
    tiny.restore(x, 2)

    def alive():
        gc.collect()
        return sum(type(o) is torch.Tensor for o in gc.get_objects())

    before = alive()
    for _ in range(20):
        tiny.restore(x, 2)
    assert alive() <= before


def test_repr_tells_what_it_is(tiny):
    text = repr(tiny)
    for word in ("Random", "M parameters", "x4", "Apache-2.0"):
        assert word in text


def test_memory_is_given_back_when_the_size_changes(tiny, monkeypatch):
    """A batch or a film of one size keeps what it will need again."""
    calls = []
    monkeypatch.setattr(gendr.devices, "give_back", lambda: calls.append(1))
    for side in (12, 12, 12, 40, 40, 12):
        tiny.restore(picture(side, side), 4)
    assert len(calls) == 3


def test_giving_memory_back_is_harmless():
    gendr.devices.give_back()
