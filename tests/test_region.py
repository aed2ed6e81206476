"""A mask: what is restored, what is only enlarged, and where both meet."""

from __future__ import annotations

import pytest
import torch

from gendr import Settings, region, resize
from gendr.restoration import Restoration


def picture(h: int = 24, w: int = 20, b: int = 1) -> torch.Tensor:
    return torch.rand(b, 3, h, w, generator=torch.Generator().manual_seed(0))


def masked(height=200, width=240, box=(80, 120, 100, 140)):
    mask = torch.zeros(height, width)
    mask[box[0] : box[1], box[2] : box[3]] = 1
    return mask


@pytest.mark.parametrize("scale", [1.0, 1.35, 2.0, 1.2345])
def test_outside_the_mask_nothing_is_restored(tiny, scale):
    image = picture(200, 240)
    result, report = tiny.restore_with_report(image, scale, mask=masked())
    size = tuple(result.shape[-2:])
    changed = (result - resize(image, size)).abs().amax(1)[0] > 1e-6
    rows, columns = changed.any(1).nonzero() / scale, changed.any(0).nonzero() / scale
    edge = region.FEATHER + 2
    assert 80 - edge <= rows.min() <= 82
    assert 118 <= rows.max() <= 120 + edge
    assert 100 - edge <= columns.min() <= 102
    assert 138 <= columns.max() <= 140 + edge
    assert str(report).startswith("mask: columns ")
    assert "of 240x200 were restored" in str(report)
    assert (report.input_size, report.output_size) == ((200, 240), size)


def test_a_white_mask_is_no_mask(tiny):
    assert torch.equal(
        tiny.restore(picture(), 2, mask=torch.ones(24, 20)), tiny.restore(picture(), 2)
    )


def test_a_black_mask_only_enlarges(tiny):
    result, report = tiny.restore_with_report(picture(), 2, mask=torch.zeros(24, 20))
    assert torch.equal(result, resize(picture(), (48, 40)))
    assert str(report) == "mask: empty, so nothing was restored, only enlarged"
    assert report.as_dict()["tiles"] == 0
    assert report.as_dict()["output_size"] == (48, 40)


def test_only_the_masked_part_is_computed(tiny, monkeypatch):
    seen = []
    run = Restoration.run

    def spy(self, image):
        seen.append(tuple(image.shape))
        return run(self, image)

    monkeypatch.setattr(Restoration, "run", spy)
    tiny.restore(picture(200, 240), 2, mask=masked())
    margin = 2 * (region.CONTEXT + region.FEATHER) + 4
    ((_, _, height, width),) = seen
    assert height <= 40 + margin < 200
    assert width <= 40 + margin < 240


@pytest.mark.parametrize("settings", [{"long_side": 150}, {"megapixels": 0.02}, {"seamless": True}])
def test_a_mask_goes_with_every_way_to_give_a_size(tiny, settings):
    image = picture(60, 70)
    result = tiny.restore(image, mask=masked(60, 70, (20, 40, 30, 50)), **settings)
    assert tuple(result.shape[-2:]) == Settings(**settings).target_size(60, 70)


@pytest.mark.parametrize("scale", [1.35, 2.0, 2.55])
def test_the_part_lies_where_it_belongs(scale):
    """With an identity instead of a network the seam between the two ways cannot be seen."""
    image = torch.linspace(0, 1, 233)[None, None, None].expand(1, 3, 187, -1).contiguous()
    settings = Settings(scale=scale)

    def enlarge(part):
        return resize(part, settings.target_size(*part.shape[-2:])), None

    mask = masked(187, 233, (100, 187, 150, 233))
    result, _, _ = region.restore_within(mask, image, settings, enlarge)
    whole = resize(image, settings.target_size(187, 233))
    assert result.shape == whole.shape
    assert (result - whole).abs().max() < 0.004


@pytest.mark.parametrize("level", [0.1, 0.5, 0.9])
def test_what_the_mask_says_is_the_weight(tiny, level):
    """Halfway between enlarged and restored where the mask is one half."""
    image = picture(40, 50)
    result = tiny.restore(image, 2, mask=torch.full((40, 50), level))
    expected = torch.lerp(resize(image, (80, 100)), tiny.restore(image, 2), level)
    assert torch.allclose(result, expected, atol=1e-6)


def test_soft_edges_stay_as_they_were_painted():
    ramp = torch.linspace(0, 1, 60).expand(1, 1, 40, 60)
    brush = torch.zeros(1, 1, 80, 80)
    brush[..., 30:50, 30:50] = 1
    for _ in range(3):
        brush = torch.nn.functional.avg_pool2d(brush, 9, stride=1, padding=4)
    for mask in (ramp, brush, 0.4 * ramp):
        assert torch.equal(region.feather(mask), mask)


@pytest.mark.parametrize("level", [0.6, 1.0])
def test_a_hard_edge_falls_off_outside(level):
    mask = torch.zeros(1, 1, 60, 60)
    mask[..., 20:40, 20:40] = level
    soft = region.feather(mask)[0, 0]
    assert (soft[20:40, 20:40] == level).all()
    line = soft[30, : 20 + 1]
    assert (line.diff() >= 0).all()
    assert line[19] > 0.7 * level
    assert not line[: 20 - region.FEATHER].any()


def test_a_thin_line_does_not_fade():
    mask = torch.zeros(1, 1, 40, 40)
    mask[..., 20, :] = 1
    soft = region.feather(mask)
    assert (soft[..., 20, :] == 1).all()
    assert (soft[..., 20 - region.FEATHER - 1, :] == 0).all()
    assert (soft[0, 0, :20, 5].diff() >= 0).all()


@pytest.mark.parametrize(
    ("shape", "words"),
    [
        ((1, 64, 64), "mask is 64x64, the picture 20x24"),
        ((24, 21), "scale the mask"),
        ((2, 24, 20), "2 masks for 3 pictures"),
        ((3, 3, 24, 20), "must be h w or b h w"),
    ],
)
def test_a_mask_that_does_not_fit_is_named(tiny, shape, words):
    with pytest.raises(ValueError, match=words):
        tiny.restore(picture(b=3), 2, mask=torch.zeros(shape))


@pytest.mark.parametrize("extra", [(), (1,)])
def test_one_mask_each(tiny, extra):
    images = picture(b=2)
    masks = torch.stack([torch.zeros(*extra, 24, 20), torch.ones(*extra, 24, 20)])
    result = tiny.restore(images, 2, mask=masks)
    assert torch.equal(result[:1], resize(images[:1], (48, 40)))
    assert torch.equal(result[1:], tiny.restore(images[1:], 2))
