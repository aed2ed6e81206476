"""What is told while a run goes: how much is done, and how it looks so far."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from gendr.networks.strips import Strips
from gendr.networks.work import stages
from gendr.preview import SIDE, LatentColours, Preview
from gendr.tiles import Box

# Large enough for the default path: the autoencoder by strips, the UNet in tiles.
SIZE = (50, 70)


def picture(height=SIZE[0], width=SIZE[1], batch=1, channels=3):
    """A smooth picture with an edge: something to see in a preview."""
    rows = torch.linspace(0, 1, height)[:, None].expand(height, width)
    columns = torch.linspace(1, 0, width)[None].expand(height, width)
    edge = (torch.arange(width) > width // 2).float()[None].expand(height, width)
    planes = torch.stack([rows, columns, edge, torch.ones(height, width)])
    return planes[:channels][None].repeat(batch, 1, 1, 1).contiguous()


def watched(model, image, **options):
    """Every Progress of a run, each with its preview as it was then."""
    seen, looks = [], []

    def see(progress):
        seen.append(progress)
        looks.append(None if progress.preview is None else progress.preview().clone())

    options.setdefault("scale", 4)
    result, report = model.restore_with_report(image, progress=see, **options)
    return result, report, seen, looks


@pytest.mark.parametrize("stage", ["encode", "decode"])
def test_strips_count_what_the_stage_holds(plain, stage):
    counted = []
    strips = Strips(plain.network, rows=4, worked=counted.append)
    config = plain.network.config.vae
    shape = (
        (3, 64, 96)
        if stage == "encode"
        else (config.latent_channels, *(s // config.factor for s in (64, 96)))
    )
    getattr(strips, stage)(torch.zeros(1, *shape))
    assert len(counted) > 10
    # The decoder's first convolution and the encoder's linear path are not done by counted strips.
    assert sum(counted) == pytest.approx(stages(plain.network)[stage] * 64 * 96, rel=0.1)


def test_an_unfolded_network_holds_the_same_work_but_for_what_folding_saves(tiny):
    assert set(stages(tiny.network)) == {"encode", "step", "decode"}
    assert all(work > 0 for work in stages(tiny.network).values())
    assert stages(tiny.network, passes=2)["step"] == 2 * stages(tiny.network)["step"]


@pytest.mark.parametrize("settings", [{}, {"tile": 128, "overlap": 32}, {"tile": 512}])
@pytest.mark.parametrize("batch", [1, 3])
def test_the_share_grows_to_one_and_never_goes_back(plain, settings, batch):
    _, _, seen, _ = watched(plain, picture(batch=batch), **settings)
    shares = [progress.share for progress in seen]
    assert shares == sorted(shares)
    assert shares[0] == 0
    assert shares[-1] == pytest.approx(1)
    assert seen[-1].done == seen[-1].total
    assert [p.image_index for p in seen] == sorted(p.image_index for p in seen)


def test_in_the_default_path_no_step_is_large(plain):
    _, report, seen, _ = watched(plain, picture())
    assert report.mode == "latent_tiles"
    shares = torch.tensor([0.0] + [progress.share for progress in seen])
    # The last one is for what follows the network, which is much beside so small a network.
    assert shares[:-1].diff().max() < 0.25
    # Before the first tile of the UNet there is something to see on the bar already.
    assert sum(progress.done == 0 for progress in seen) > 3


def test_running_out_of_memory_moves_the_bar_only_forward(plain, monkeypatch):
    def little_room(self, z):
        raise torch.cuda.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(Strips, "decode", little_room)
    _, report, seen, _ = watched(plain, picture())
    assert any("out of memory" in event for event in report.events)
    shares = [progress.share for progress in seen]
    assert shares == sorted(shares)
    assert shares[-1] == pytest.approx(1)


@pytest.mark.parametrize("channels", [1, 2, 3, 4])
@pytest.mark.parametrize("settings", [{}, {"tile": 128, "overlap": 32}])
def test_previews_begin_as_the_input_and_end_as_the_result(plain, settings, channels):
    image = picture(channels=4)[:, {1: [2], 2: [2, 3], 3: [0, 1, 2], 4: [0, 1, 2, 3]}[channels]]
    result, _, _, looks = watched(plain, image, **settings)
    assert all(look.shape[0] == 3 and max(look.shape[1:]) <= SIDE for look in looks)
    assert all(0 <= look.min() <= look.max() <= 1 for look in looks)
    colours = 3 if channels >= 3 else 1
    start = F.interpolate(image[:, :colours], size=looks[0].shape[1:], mode="bilinear")[0]
    end = F.interpolate(result[:, :colours], size=looks[-1].shape[1:], mode="area")[0]
    # Padding never shows, but for the rounding of its edge.
    assert all(abs(a - b) <= 1 for a, b in zip(looks[0].shape, looks[-1].shape, strict=True))
    assert (looks[0] - start).abs().mean() < 0.05
    assert (looks[-1] - end).abs().max() < 1e-5


def test_finished_tiles_are_laid_where_they_belong():
    preview = Preview(-torch.ones(1, 3, 512, 1024))
    preview.lay(torch.ones(1, 3, 128, 256), Box(128, 512, 256, 768), (512, 1024))
    seen = preview()
    assert seen.shape == (3, 128, 256)
    assert (seen[:, 32:64, 128:192] == 1).all()
    seen[:, 32:64, 128:192] = 0
    assert not seen.any()


@pytest.mark.parametrize("size", [(1, 1), (1, 3000), (7, 5)])
def test_a_preview_of_any_size(size):
    preview = Preview(torch.zeros(1, 3, *size))
    preview.lay(torch.ones(1, 3, 1, 1), Box(size[0] - 1, size[1] - 1, *size), size)
    seen = preview()
    assert max(seen.shape) <= SIDE
    assert (seen[:, -1, -1] == 1).all()


def test_a_latent_is_seen_in_its_picture_s_colours():
    """A latent that holds the colours, mixed: the map finds them, also for a latent it never saw."""
    generator = torch.Generator().manual_seed(0)
    mix = torch.randn(16, 3, generator=generator)
    colours = torch.rand(1, 3, 12, 16, generator=generator) * 2 - 1
    enlarged = F.interpolate(colours, scale_factor=8, mode="nearest")
    seen = LatentColours(torch.einsum("lc,bchw->blhw", mix, colours), enlarged)
    other = torch.rand(1, 3, 5, 5, generator=generator) * 2 - 1
    assert (seen(torch.einsum("lc,bchw->blhw", mix, other)) - other).abs().max() < 0.01


def test_the_report_names_the_settings(plain):
    _, report = plain.restore_with_report(picture(), long_side=100, detail=0.7, seamless=True)
    words = str(report.settings)
    assert words in str(report)
    assert words.startswith("long side 100, color fix wavelet, detail 0.7, fidelity ")
    assert words.endswith("seamless on")
    assert report.as_dict()["settings"]["long_side"] == 100
