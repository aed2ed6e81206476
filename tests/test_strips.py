"""Strips give what the whole gives."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from conftest import UNET, VAE_, random_network

import gendr
from gendr.networks.onestep import fold
from gendr.networks.strips import Strips
from gendr.resizing import pad, resize, roll_up, unroll

pytestmark = pytest.mark.threads

PLAIN = replace(VAE_, norm_num_groups=0, mid_attention=False, quant_conv=False, linear_path=True)
DEEP = replace(VAE_, patch_size=1, block_out_channels=(16, 16, 32, 32), shift_factor=0.1)


@pytest.mark.parametrize("vae", [VAE_, PLAIN, DEEP])
@pytest.mark.parametrize("rows", [1, 3, 8, 1000])
def test_strips_equal_the_whole(vae, rows):
    network = fold(random_network(vae, UNET))
    x = torch.rand(1, 3, 96, 64, generator=torch.Generator().manual_seed(0)) * 2 - 1
    z = network.encode(x)
    strips = Strips(network, rows=rows)
    for mine, whole in ((strips.encode(x), z), (strips.decode(z), network.decode(z))):
        assert float((mine - whole).norm() / whole.norm()) <= 1e-5


def test_strips_can_be_cancelled():
    network = fold(random_network(PLAIN, UNET))
    calls = []

    def check():
        calls.append(1)
        if len(calls) == 3:
            raise gendr.Cancelled

    with pytest.raises(gendr.Cancelled):
        Strips(network, rows=8, check=check).encode(torch.rand(1, 3, 96, 64))
    assert len(calls) == 3


@pytest.mark.parametrize("size", [(1, 1), (2, 5), (7, 16)])
def test_padding_continues_by_reflection(size):
    x = torch.rand(1, 1, *size)
    y = pad(x, (16, 32))
    assert y.shape == (1, 1, 16, 32)
    assert torch.equal(y[..., : size[0], : size[1]], x)
    if size[0] > 1:
        assert torch.equal(y[..., size[0], :], y[..., size[0] - 2, :])


def test_wrapped_resize_is_the_plain_one_inside_and_periodic_at_the_edge():
    x = torch.rand(1, 3, 12, 15, generator=torch.Generator().manual_seed(0))
    plain, wrapped = resize(x, (48, 51)), resize(x, (48, 51), wrap=True)
    assert torch.allclose(plain[..., 12:-12, 12:-12], wrapped[..., 12:-12, 12:-12], atol=1e-5)
    rolled = resize(x.roll((3, 5), (-2, -1)), (48, 60), wrap=True)
    assert torch.allclose(
        rolled, resize(x, (48, 60), wrap=True).roll((12, 20), (-2, -1)), atol=1e-5
    )


def test_rolling_up_undoes_unrolling():
    x = torch.rand(1, 3, 20, 31)
    y = roll_up(unroll(x, 16, (64, 64)), 16, (20, 31))
    assert torch.allclose(x, y, atol=1e-6)
