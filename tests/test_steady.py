"""Frames of one clip: still parts are averaged, what moves is left alone, and nothing else is touched."""

import pytest
import torch

from gendr.steady import FRAMES, LIGHT, REACH, WINDOW, Steady

LEVEL = 1 / 255


def ground(side=64, seed=0):
    """A soft pattern with edges, 1 3 h w, well inside [0, 1]."""
    y, x = torch.meshgrid(torch.arange(side), torch.arange(side), indexing="ij")
    waves = (
        torch.sin(x / 5 + seed) * torch.cos(y / 7) * 0.15 + 0.5 + 0.1 * ((x // 16 + y // 16) % 2)
    )
    return torch.stack([waves, waves.flip(0), waves.flip(1)])[None].float()


def noisy(picture, levels=4.0, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return picture + torch.randn(picture.shape, generator=generator) * levels * LEVEL


def inner(picture):
    return picture[..., 8:-8, 8:-8]


def test_noise_on_a_still_picture_fades_as_a_mean_does():
    steady = Steady()
    cleaned = [steady(noisy(ground(), seed=n))[0] for n in range(3 * FRAMES)]
    late = torch.cat(cleaned[2 * FRAMES :])
    error = inner(late - ground()).std() / LEVEL
    # 1 / sqrt(2 n - 1) of 4 levels, and a fifth more for what the changes of light let through.
    assert error < 1.2 * 4 / (2 * FRAMES - 1) ** 0.5
    assert inner(late - ground()).mean().abs() < 0.1 * LEVEL


def test_the_noise_that_is_left_is_told():
    steady = Steady()
    for n in range(2 * FRAMES):
        cleaned, (damage, left) = steady(noisy(ground(), seed=n))
    # The deviation that a reader of the cleaned frame meets, within the measure's own error.
    assert float(left.mean()) == pytest.approx(float((cleaned - ground()).std() / LEVEL), rel=0.35)
    assert damage.noise == pytest.approx(4, rel=0.35)


def test_what_moves_is_the_frame_itself():
    steady, size = Steady(), 12
    for n in range(6):
        frame = ground()
        frame[..., 20 : 20 + size, 8 * n : 8 * n + size] = torch.tensor([1.0, 0, 0])[:, None, None]
        cleaned = steady(frame)[0]
        around = slice(max(0, 8 * n - 8), 8 * n + size)
        assert torch.allclose(
            cleaned[..., 20 : 20 + size, around], frame[..., 20 : 20 + size, around]
        )


def test_far_from_what_moves_the_mean_goes_on():
    steady = Steady()
    for n in range(FRAMES):
        frame = noisy(ground(), seed=n)
        frame[..., :16, :] = noisy(ground(seed=n), seed=n)[..., :16, :]
        cleaned = steady(frame)[0]
    far = 16 + REACH + WINDOW + LIGHT
    assert (cleaned - ground())[..., far:-8, 8:-8].std() < 0.5 * 4 * LEVEL


def test_light_that_changes_is_followed_at_once():
    steady = Steady()
    for n in range(12):
        wanted = ground() - 2 * n * LEVEL
        cleaned = steady(noisy(wanted, seed=n))[0]
        assert inner(cleaned - wanted).mean().abs() < 0.5 * LEVEL
    # And the noise fades all the same.
    assert inner(cleaned - wanted).std() < 0.6 * 4 * LEVEL


def test_a_first_frame_and_a_cut_are_left_alone():
    steady = Steady()
    first, other = noisy(ground()), noisy(1 - ground() ** 3)
    assert torch.equal(steady(first)[0], first)
    assert torch.equal(steady(other)[0], other)
    smaller = noisy(ground(side=40))
    assert torch.equal(steady(smaller)[0], smaller)


@pytest.mark.parametrize("size", [(1, 1), (1, 9), (5, 3)])
def test_any_size_and_the_same_frame_again(size):
    steady = Steady()
    frame = torch.rand(1, 3, *size, generator=torch.Generator().manual_seed(1))
    for _ in range(3):
        cleaned, (_, noise) = steady(frame)
        torch.testing.assert_close(cleaned, frame)
        assert noise.shape[-2:] == size


def test_a_clip_is_the_same_in_one_call_in_several_and_after_a_stop(tiny):
    frames = torch.cat([noisy(ground(side=24), seed=n).clamp(0, 1) for n in range(4)])
    options = {"scale": 2.0, "steady": True}
    whole = tiny.restore(frames, **options)
    clip = Steady()
    parts = [tiny.restore(frames[n : n + 1], clip=clip, **options) for n in range(2)]
    later = Steady()
    later.resume({name: tensor.clone() for name, tensor in clip.state().items()})
    parts += [tiny.restore(frames[n : n + 1], clip=later, **options) for n in (2, 3)]
    assert torch.equal(whole, torch.cat(parts))
    alone = tiny.restore(frames, scale=2.0)
    assert torch.equal(whole[:1], alone[:1])
    assert not torch.equal(whole[3:], alone[3:])
