"""Tiles: they cover, they fit, they cannot be seen, and they survive a lack of memory."""

import random
from itertools import pairwise

import pytest
import torch
import torch.nn.functional as F

from gendr.tiles import fit_grid, recovering, seam_score, tiled


class OutOfMemory(RuntimeError):
    """What a device raises."""


def is_oom(error):
    return isinstance(error, OutOfMemory)


def up(side, multiple):
    return -(-side // multiple) * multiple


def picture(height, width, *, batch=1, channels=3, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.rand(batch, channels, height, width, generator=generator)


def steps(image, dim):
    """Size of the step from every line to the next one, its mean over the line."""
    moved = image.movedim(dim, 0)
    return (moved[1:] - moved[:-1]).abs().flatten(1).mean(1)


# fit_grid


def check(grid, length, tile, overlap, multiple, edge, starts):
    assert edge % multiple == 0
    assert starts[0] == 0
    assert all(a < b for a, b in pairwise(starts))
    following = [*starts[1:], length if grid.wrap else None]
    for start, after in zip(starts, following, strict=True):
        if after is None:
            assert start + edge == length
        else:
            assert after - start <= edge - overlap
    assert edge <= tile or (len(starts) == 1 and edge <= 1.25 * tile)


@pytest.mark.parametrize("wrap", [False, True])
def test_grids_of_any_size_cover_and_fit(wrap):
    rng = random.Random(0)
    for _ in range(400):
        multiple = rng.choice([1, 8, 16, 64, 24])
        tile = multiple * rng.randint(3, 16)
        overlap = rng.randint(0, tile // 2 - multiple // 2)
        height, width = (multiple * rng.randint(1, 100) for _ in range(2))
        grid = fit_grid(height, width, tile, overlap, multiple, wrap)
        check(grid, height, tile, overlap, multiple, grid.tile_height, grid.tops)
        check(grid, width, tile, overlap, multiple, grid.tile_width, grid.lefts)
        assert len(grid) == len(list(grid.boxes())) == len(grid.tops) * len(grid.lefts)
        if not wrap:
            assert (len(grid.tops) == 1) == (height <= 1.25 * tile)


@pytest.mark.parametrize(
    ("size", "overlap", "count", "edge"),
    [(1024, 128, 2, 576), (2048, 128, 3, 768), (4096, 128, 7, 704), (4096, 192, 7, 768)],
)
def test_grids_compute_little(size, overlap, count, edge):
    grid = fit_grid(size, size, 768, overlap, 64)
    assert (len(grid.tops), grid.tile_height) == (count, edge)
    assert all(top % 64 == 0 for top in grid.tops)


def test_no_grid_of_the_wished_edge_computes_less():
    for length in range(320, 4096, 64):
        grid = fit_grid(length, 64, 512, 64, 64)
        if len(grid.tops) > 1:
            fixed = 512 * -(-(length - 64) // (512 - 64))
            assert len(grid.tops) * grid.tile_height <= fixed


def test_boxes_run_row_by_row():
    boxes = list(fit_grid(1024, 1024, 576, 128, 64).boxes())
    assert boxes == [
        (0, 0, 576, 576),
        (0, 448, 576, 1024),
        (448, 0, 1024, 576),
        (448, 448, 1024, 1024),
    ]


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        ((1000, 1024, 512, 64, 64), "multiples of 64, got 1000"),
        ((1024, 1024, 128, 128, 64), "smaller overlap or a larger tile"),
        ((1024, 1024, 0, 0, 64), "at least 1"),
        ((1024, 1024, 512, -1, 64), "at least 0"),
    ],
)
def test_impossible_grids_say_what_to_do(arguments, text):
    with pytest.raises(ValueError, match=text):
        fit_grid(*arguments)


def test_an_overlap_too_large_does_not_matter_where_one_tile_does():
    assert len(fit_grid(128, 64, 128, 512, 64)) == 1


# tiled


@pytest.mark.parametrize("wrap", [False, True])
@pytest.mark.parametrize("batch", [1, 4])
@pytest.mark.parametrize(
    "size", [(1, 211), (211, 1), (97, 89), (24, 480), (480, 24), (64, 64), (1, 1)]
)
def test_identity_comes_back(size, batch, wrap):
    x = picture(*size, batch=2)
    grid = fit_grid(*size, 48, 13, 1, wrap)
    assert torch.allclose(tiled(lambda v: v, x, grid, batch=batch), x, atol=1e-6)


@pytest.mark.parametrize("overlap", [0, 1, 17, 40])
def test_identity_with_any_overlap(overlap):
    x = picture(136, 120)
    for wrap in (False, True):
        grid = fit_grid(136, 120, 48, overlap, 8, wrap)
        assert torch.allclose(tiled(lambda v: v, x, grid), x, atol=1e-6)


def test_a_torus_smaller_than_its_tile():
    x = picture(8, 16)
    grid = fit_grid(8, 16, 64, 24, 8, wrap=True)
    assert grid.tile_height > 8
    assert torch.allclose(tiled(lambda v: v * 2, x, grid), x * 2, atol=1e-6)


def test_one_tile_is_the_function_itself():
    x = picture(96, 160)
    grid = fit_grid(96, 160, 128, 32, 32)
    assert len(grid) == 1
    assert tiled(lambda v: v.sin() * 3, x, grid).equal(x.sin() * 3)


def test_channels_and_dtype_are_the_functions():
    x = picture(64, 64).half()
    out = tiled(lambda v: v[:, :1], x, fit_grid(64, 64, 32, 8, 8))
    assert out.shape == (1, 1, 64, 64)
    assert out.dtype == torch.float32
    assert torch.allclose(out, x[:, :1].float(), atol=1e-6)


def test_the_input_is_safe_from_functions_in_place():
    x = picture(64, 64)
    before = x.clone()
    for tile in (32, 64):
        tiled(lambda v: v.mul_(0), x, fit_grid(64, 64, tile, 8, 8))
    assert x.equal(before)


def test_tiles_are_stacked_in_order():
    x = picture(96, 96, batch=2)
    grid = fit_grid(96, 96, 40, 8, 8)
    shapes = []

    def fn(v):
        shapes.append(tuple(v.shape))
        return v * 0.5

    assert torch.allclose(tiled(fn, x, grid, batch=4), x * 0.5, atol=1e-6)
    n = len(grid)
    stacked = [4] * (n // 4) + ([n % 4] if n % 4 else [])
    assert shapes == [(2 * k, 3, grid.tile_height, grid.tile_width) for k in stacked]


def test_a_function_that_changes_the_size_is_refused():
    with pytest.raises(ValueError, match="must keep height and width"):
        tiled(lambda v: v[..., 1:], picture(64, 64), fit_grid(64, 64, 32, 8, 8))


def test_a_grid_of_another_picture_is_refused():
    with pytest.raises(ValueError, match="the grid is for 64x64"):
        tiled(lambda v: v, picture(32, 64), fit_grid(64, 64, 32, 8, 8))


@pytest.mark.parametrize("batch", [1, 3])
def test_callbacks_see_every_tile(batch):
    x = picture(80, 80)
    grid = fit_grid(80, 80, 32, 8, 8)
    seen = []
    tiled(
        lambda v: v + 1,
        x,
        grid,
        batch=batch,
        before=lambda i, n: seen.append(("before", i, n)),
        after=lambda i, n, out: seen.append(("after", i, n, out.shape[0], out.min().item() >= 1)),
    )
    n = len(grid)
    assert [s[1:] for s in seen if s[0] == "before"] == [(i, n) for i in range(n)]
    assert [s[1:] for s in seen if s[0] == "after"] == [(i, n, 1, True) for i in range(n)]
    if batch == 1:
        assert [s[1] for s in seen] == [i for i in range(n) for _ in range(2)]


class Stop(BaseException):
    """What a host raises to cancel: not even an Exception."""


@pytest.mark.parametrize("where", ["before", "after"])
@pytest.mark.parametrize("recover", [False, True])
def test_what_callbacks_raise_passes_through(where, recover):
    calls = []

    def fn(v):
        calls.append(v)
        return v

    def stop(i, n, *_):
        if i == 2:
            raise Stop

    if recover:
        fn = recovering(fn, minimum=8, multiple=8, is_oom=is_oom, on_event=pytest.fail)
    with pytest.raises(Stop):
        tiled(fn, picture(80, 80), fit_grid(80, 80, 32, 8, 8), **{where: stop})
    assert len(calls) == (2 if where == "before" else 3)


# seams


def smooth(height, width):
    y, x = torch.linspace(0.2, 0.5, height), torch.linspace(0.1, 0.4, width)
    return (y[:, None] + x).expand(1, 3, -1, -1)


def drifting():
    """A function whose tiles disagree in brightness by up to 0.02."""
    generator = torch.Generator().manual_seed(0)
    return lambda v: v + 0.02 * (torch.rand((), generator=generator) - 0.5)


def bordered(v):
    """A function that sees zeros beyond a tile, as convolutions do."""
    return F.avg_pool2d(v, 7, stride=1, padding=3)


@pytest.mark.parametrize("fn", [drifting(), bordered], ids=["drift", "zero padding"])
def test_no_step_shows_on_a_smooth_picture(fn):
    x = smooth(256, 320)
    grid = fit_grid(256, 320, 96, 32, 8)
    out = tiled(fn, x, grid)[..., 4:-4, 4:-4]
    for dim in (-2, -1):
        assert steps(out, dim).max() <= 2 * steps(x, dim).max()
    assert seam_score(tiled(fn, x, grid), grid) < 1.2


def test_a_texture_stays_seamless_across_its_edges():
    angle = torch.arange(96) * (2 * torch.pi / 96)
    x = (0.5 + 0.2 * angle.sin()[:, None] + 0.2 * angle.cos()).expand(1, 3, -1, -1)
    inner = max(steps(x, -2).max(), steps(x, -1).max())
    for tile in (128, 48):
        grid = fit_grid(96, 96, tile, 16, 8, wrap=True)
        out = tiled(bordered, x, grid)
        assert (out[..., 0, :] - out[..., -1, :]).abs().max() <= 2 * inner
        assert (out[..., :, 0] - out[..., :, -1]).abs().max() <= 2 * inner
        assert seam_score(out, grid) < 1.3


def test_a_shifted_texture_gives_the_shifted_result():
    x = picture(64, 64)
    grid = fit_grid(64, 64, 48, 16, 8, wrap=True)
    turn = {"shifts": (32, 32), "dims": (-2, -1)}
    assert all(start in grid.tops for start in (0, 32))

    def fn(v):
        return F.conv2d(v, torch.full((3, 1, 3, 3), 1 / 9), padding=1, groups=3)

    there = tiled(fn, x.roll(**turn), grid)
    assert torch.allclose(there, tiled(fn, x, grid).roll(**turn), atol=1e-6)


def test_seam_score_sees_a_seam():
    x = smooth(256, 256) + 0.01 * picture(256, 256)
    grid = fit_grid(256, 256, 96, 32, 8)
    assert seam_score(x, grid) == pytest.approx(1, abs=0.15)
    broken = x.clone()
    broken[..., grid.tops[1] :, :] += 0.05
    assert seam_score(broken, grid) > 2
    elsewhere = x.clone()
    elsewhere[..., grid.tops[1] + 30 :, :] += 0.05
    assert seam_score(elsewhere, grid) == pytest.approx(1, abs=0.15)


def test_content_that_crosses_a_border_is_no_seam():
    """A collage whose parts meet where tiles meet: the input says that the edge is its own."""
    grid = fit_grid(256, 256, 96, 32, 8)
    plain = smooth(256, 256) + 0.01 * picture(256, 256)
    plain[..., 64:128, grid.tops[1] - 1 :] *= 0.3
    plain[..., grid.tops[1] :, :] *= 0.5
    sharper = plain + 0.5 * (plain - F.avg_pool2d(plain, 5, stride=1, padding=2))
    assert seam_score(sharper, grid) > 1.8
    assert seam_score(sharper, grid, plain) < 1.15
    broken = sharper.clone()
    broken[..., :, grid.lefts[1] :] += 0.05
    assert seam_score(broken, grid, plain) > 2


def test_seam_score_without_seams_is_one():
    assert seam_score(picture(64, 64), fit_grid(64, 64, 64, 8, 8)) == 1
    assert seam_score(torch.full((1, 3, 128, 128), 0.5), fit_grid(128, 128, 64, 16, 8)) == 1
    grid = fit_grid(128, 128, 64, 16, 8)
    assert seam_score(picture(121, 3), grid) == pytest.approx(1, abs=0.3)


@pytest.mark.parametrize("factor", [4, 8, 16])
@pytest.mark.parametrize("seed", range(40))
def test_a_grid_of_the_picture_is_one_of_its_latent_too(factor, seed):
    draw = random.Random(seed)
    multiple = factor * draw.choice([1, 2, 4, 8])
    height, width = (multiple * draw.randint(1, 60) for _ in range(2))
    tile = multiple * draw.randint(4, 12)
    overlap = factor * draw.randint(0, tile // factor // 3)
    there = fit_grid(height, width, tile, overlap, multiple)
    here = fit_grid(
        height // factor, width // factor, tile // factor, overlap // factor, multiple // factor
    )
    assert there.reduced(factor) == here


def test_a_grid_off_the_latents_positions_is_refused():
    with pytest.raises(ValueError, match="multiples of 16"):
        fit_grid(64, 72, 48, 16, 8).reduced(16)


# recovering


class Device:
    """Doubles a window, unless it has more pixels than fit."""

    def __init__(self, room):
        self.room = room
        self.done, self.failed, self.events = [], [], []

    def __call__(self, v):
        size = (v.shape[0], *v.shape[-2:])
        if v[:, 0].numel() > self.room:
            self.failed.append(size)
            raise OutOfMemory("no room")
        self.done.append(size)
        return v * 2

    def recovering(self, minimum=32, multiple=8):
        return recovering(
            self, minimum=minimum, multiple=multiple, is_oom=is_oom, on_event=self.events.append
        )


@pytest.mark.parametrize("multiple", [8, 32])
@pytest.mark.parametrize("room", [128 * 128, 80 * 80, 64 * 64, 40 * 40])
def test_a_lack_of_memory_makes_smaller_tiles(room, multiple):
    device = Device(room)
    x = picture(256, 320)
    grid = fit_grid(256, 320, 128, 32, multiple)
    out = tiled(device.recovering(32, multiple), x, grid)
    assert torch.allclose(out, x * 2, atol=2e-6)
    for _, height, width in device.done:
        assert height % multiple == width % multiple == 0
        assert min(height, width) >= 32
    assert len(device.failed) == len(device.events)
    assert len(set(device.failed)) == len(device.failed), "a size that failed was tried again"


def test_finished_tiles_are_kept_and_the_limit_remembered():
    x = picture(64, 320)
    grid = fit_grid(64, 320, 128, 64, 64)
    sizes = [320 - left for left in grid.lefts]
    device = Device(64 * 128)
    run = device.recovering(32)

    def tightening(i, n):
        if i == 2:
            device.room = 48 * 80

    out = tiled(run, x, grid, before=tightening)
    assert torch.allclose(out, x * 2, atol=2e-6)
    assert len(sizes) == 4
    assert device.done[:2] == [(1, 64, 128)] * 2
    assert device.failed == [(1, 64, 128)]
    # Both later tiles in the same four parts; the second without another failure.
    assert device.done[2:] == [(1, 40, 72)] * 8
    assert device.events == ["out of memory with a tile of 128x64: going on with at most 72x40"]


def test_stacked_tiles_first_go_one_by_one():
    device = Device(64 * 64)
    x = picture(64, 256)
    grid = fit_grid(64, 256, 64, 16, 8)
    out = tiled(device.recovering(), x, grid, batch=4)
    assert torch.allclose(out, x * 2, atol=2e-6)
    assert device.failed == [(4, 64, 64)]
    assert device.done == [(1, 64, 64)] * len(grid)
    assert device.events == ["out of memory with 4 tiles at once: going on one by one"]


def test_at_the_smallest_tile_the_error_is_readable():
    device = Device(0)
    with pytest.raises(
        OutOfMemory, match=r"even with a tile of 64x64, the smallest.*no room"
    ) as info:
        device.recovering(64, 64)(picture(256, 256))
    assert info.value.__cause__ is not None
    assert device.failed == [(1, 256, 256), (1, 192, 192), (1, 128, 128), (1, 64, 64)]


def test_an_error_of_a_type_that_takes_no_text_becomes_a_memory_error():
    class Odd(RuntimeError):
        def __init__(self):
            super().__init__("odd")

    def fn(v):
        raise Odd

    run = recovering(fn, minimum=8, multiple=8, is_oom=lambda e: True, on_event=lambda text: None)
    with pytest.raises(MemoryError, match="smallest"):
        run(picture(8, 8))


def test_other_errors_pass_through_at_once():
    calls = []

    def fn(v):
        calls.append(v)
        raise RuntimeError("bad kernel")

    run = recovering(fn, minimum=8, multiple=8, is_oom=is_oom, on_event=pytest.fail)
    with pytest.raises(RuntimeError, match="bad kernel"):
        run(picture(64, 64))
    assert len(calls) == 1


def test_the_failed_pass_has_let_go_when_the_event_comes():
    import weakref

    held = []

    def fn(v):
        if v.shape[-1] > 32:
            big = torch.zeros(4)
            held.append(weakref.ref(big))
            raise OutOfMemory
        return v

    def event(text):
        assert held[-1]() is None

    recovering(fn, minimum=8, multiple=8, is_oom=is_oom, on_event=event)(picture(32, 64))
    assert held


def test_a_split_tile_shows_no_seam():
    x = smooth(256, 256)
    grid = fit_grid(256, 256, 160, 32, 8)
    offsets = drifting()

    def fn(v):
        if v.shape[-1] > 100:
            raise OutOfMemory
        return offsets(v)

    run = recovering(fn, minimum=32, multiple=8, is_oom=is_oom, on_event=lambda text: None)
    out = tiled(run, x, grid)
    for dim in (-2, -1):
        assert steps(out, dim).max() <= 2.5 * steps(x, dim).max()
