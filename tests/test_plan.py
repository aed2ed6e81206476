"""Plans for little memory: tiles of a useful size, or a sentence that says what would fit."""

from __future__ import annotations

import re

import pytest
import torch

from benchmarks.memory import LiveBytes
from gendr import NotEnoughMemory, Settings, plan
from gendr.networks.onestep import StepConfig
from gendr.networks.unet import TINY_UNET
from gendr.networks.vae import TINY_VAE

GIB = 2**30
CONFIGS = {"full": StepConfig(), "tiny": StepConfig(unet=TINY_UNET, vae=TINY_VAE)}
# Input height and width, and scale: photographs, a film frame, a scan.
PICTURES = [(3000, 4000, 4), (2000, 3000, 4), (1080, 1920, 4), (2160, 3840, 2), (6000, 4000, 8)]


def planned(picture, free, *, name="tiny", device="cpu", **facts):
    height, width, scale = picture
    settings = Settings(scale=scale, **facts.pop("settings", {}))
    fixed = {"images": 1, "train_tile": 512, "bytes_each": 2, "dtype": "bf16", "guidance": 1.0}
    return plan.make(
        CONFIGS[name],
        settings,
        height,
        width,
        free=int(free),
        device=device,
        batched=device != "cpu",
        **{**fixed, **facts},
    )


def lowest(fits) -> int:
    """The least free memory that is enough."""
    low, high = 0, 200 * GIB
    while high - low > 1:
        middle = (low + high) // 2
        try:
            fits(middle)
        except NotEnoughMemory:
            low = middle
        else:
            high = middle
    return high


def is_useful(made) -> bool:
    """Tiles are large enough to see something, and fade into each other."""
    return made.tiles == 1 or (min(made.tile) >= plan.LEAST_TILE * 0.75 and made.overlap >= 32)


@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize("picture", PICTURES)
@pytest.mark.parametrize("device", ["cpu", "mps"])
def test_main_memory_gives_useful_tiles_or_a_sentence(name, picture, device):
    least = lowest(lambda free: planned(picture, free, name=name, device=device))
    assert GIB // 4 < least < 120 * GIB
    for factor in (1.0, 1.01, 1.1, 1.3, 2, 8):
        made = planned(picture, least * factor, name=name, device=device)
        assert is_useful(made), made
        assert made.bytes_needed <= made.free_bytes
    for free in (0, least // 2, least - 1):
        with pytest.raises(NotEnoughMemory, match=re.escape(f"and {free / GIB:.1f} GiB are free")):
            planned(picture, free, name=name, device=device)


@pytest.mark.parametrize("on_device", [False, True])
@pytest.mark.parametrize("picture", PICTURES)
@pytest.mark.parametrize("free", [0, 1, 2, 4, 8, 12, 24, 80])
def test_a_card_of_any_size_gets_useful_tiles(picture, free, on_device):
    made = planned(picture, free * GIB, device="cuda", on_device=on_device)
    assert is_useful(made), made


def test_pictures_are_charged_where_they_lie():
    picture = (3000, 4000, 4)
    whole = 3 * 4 * 192e6
    tile = {"tile": 512}
    card = planned(picture, 12 * GIB, device="cuda", main_memory=64 * GIB, settings=tile)
    assert card.host_bytes > 5 * whole
    assert card.bytes_needed < whole
    on_card = planned(picture, 70 * GIB, device="cuda", on_device=True, main_memory=64 * GIB)
    assert on_card.on_device
    assert on_card.host_bytes == whole
    assert on_card.bytes_needed > 5 * whole
    host = planned(picture, 64 * GIB)
    assert host.host_bytes == 0
    assert host.bytes_needed > 5 * whole


def test_a_card_does_not_help_a_full_main_memory():
    with pytest.raises(NotEnoughMemory, match=r"of main memory, and 4\.0 GiB are free"):
        planned((3000, 4000, 4), 80 * GIB, device="cuda", main_memory=4 * GIB)


@pytest.mark.parametrize("picture", PICTURES)
@pytest.mark.parametrize("free", [3.5, 6])
def test_the_scale_that_is_named_fits_and_the_next_one_does_not(picture, free):
    try:
        planned(picture, free * GIB)
    except NotEnoughMemory as error:
        found = re.search(r"choose scale ([\d.]+) \((\d+)x(\d+)\)", str(error))
        scale = float(found[1])
        made = planned((*picture[:2], scale), free * GIB)
        assert made.output_size == (int(found[3]), int(found[2]))
        with pytest.raises(NotEnoughMemory):
            planned((*picture[:2], scale + 0.05), free * GIB)


def test_where_not_even_scale_1_fits_that_is_said():
    with pytest.raises(NotEnoughMemory, match="even scale 1 does not fit; use a smaller picture"):
        planned((3000, 65500, 1), 1 * GIB)


def test_every_result_of_a_batch_counts():
    picture = (1080, 1920, 4)
    assert planned(picture, 4 * GIB).tiles > 1
    with pytest.raises(NotEnoughMemory, match=r"100 pictures of .*choose fewer pictures at once"):
        planned(picture, 4 * GIB, images=100)


def test_a_target_size_is_refused_by_a_scale_too():
    with pytest.raises(NotEnoughMemory, match=r"choose scale [\d.]+ \(\d+x\d+\) or less"):
        planned((3000, 4000, 4), 4 * GIB, settings={"long_side": 16000})


def test_nothing_is_computed_where_memory_is_short(tiny, monkeypatch):
    monkeypatch.setattr(tiny.network, "encode", lambda x: pytest.fail("was computed"))
    x = torch.rand(1, 3, 64, 64)
    with pytest.raises(ValueError, match="GiB are free"):
        tiny.restore(x, 4, free_bytes=2**20)


def test_a_tile_asked_for_is_left_alone():
    made = planned((1000, 1000, 4), 4 * GIB, settings={"tile": 64, "overlap": 16})
    assert max(made.tile) <= 64


@pytest.mark.parametrize(
    ("channels", "color_fix", "fidelity"),
    [
        (3, "wavelet", 0.0),
        (4, "lab", 0.0),
        (4, "wavelet", 0.5),
        (3, "lab", "auto"),
    ],
)
def test_whole_pictures_stay_within_their_estimate(tiny, channels, color_fix, fidelity):
    """The network is left out, so that whole pictures are all that lives."""
    network = tiny.network
    network.encode = network.decode = lambda x: x
    network.step = lambda z, **options: z
    # Large enough for the strips of colour fixes to be small beside it.
    x = torch.rand(1, channels, 512, 512)
    settings = {"tile": 128, "color_fix": color_fix, "fidelity": fidelity}
    with LiveBytes() as live:
        tiny.restore(x, 3, free_bytes=8 * GIB, **settings)
    needed = tiny.plan(512, 512, Settings(scale=3, **settings), free_bytes=8 * GIB).bytes_needed
    assert 0.6 * needed <= live.peak <= needed
