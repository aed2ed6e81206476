"""The plan's estimates against the tensors that really live at once."""

from __future__ import annotations

import functools
import gc

import pytest
import torch
from conftest import UNET, VAE_, random_network
from torch import nn

from benchmarks.memory import FusedAttention, LiveBytes
from gendr import plan
from gendr.networks.blocks import Unset
from gendr.networks.onestep import OneStep, StepConfig, fold, folded_config
from gendr.networks.strips import Strips
from gendr.networks.unet import SD21, TINY_UNET
from gendr.networks.vae import SD_VAE, TINY_VAE

# More than this would send pictures to tiles that fit whole.
GENEROUS = 1.6
CONFIGS = {
    "full": StepConfig(),
    "four channels": StepConfig(unet=SD21, vae=SD_VAE),
    "tiny": StepConfig(unet=TINY_UNET, vae=TINY_VAE),
}


@functools.cache
def on_meta(name: str, dtype: torch.dtype) -> OneStep:
    with torch.device("meta"):
        config = folded_config(CONFIGS[name], 1, CONFIGS[name].unet.tokens)
        network = OneStep(config, operations=Unset).to(dtype)
    network.compute = (dtype, dtype)
    return network.requires_grad_(False).eval()


def peak(run, x: torch.Tensor) -> int:
    """Most bytes that live at once while run(x) makes its result."""
    with torch.no_grad(), FusedAttention(), LiveBytes() as live:
        run(x)
    return live.peak


def peaks(network: OneStep, size: int, device: str) -> dict[str, int]:
    config = network.config
    edge = size // config.vae.factor
    x = torch.zeros(1, 3, size, size, device=device)
    z = torch.zeros(1, config.vae.latent_channels, edge, edge, device=device)
    strips = Strips(network)
    return {
        "autoencoder": max(peak(network.encode, x), peak(network.decode, z)),
        "strips": max(peak(strips.encode, x), peak(strips.decode, z)),
        "unet": peak(network.step, z),
    }


@functools.cache
def full_size_peaks(name: str, dtype: torch.dtype, size: int) -> dict[str, int]:
    return peaks(on_meta(name, dtype), size, "meta")


def estimates(config: StepConfig, size: int, dtype: torch.dtype) -> dict[str, int]:
    each = dtype.itemsize
    return {
        "autoencoder": plan.autoencoder_bytes(config, size, size, bytes_each=each, strips=False),
        "strips": plan.autoencoder_bytes(config, size, size, bytes_each=each, strips=True),
        "unet": plan.unet_bytes(config, size, size, each),
    }


@pytest.mark.parametrize(
    ("name", "dtype", "size"),
    [
        ("full", torch.bfloat16, 512),
        ("full", torch.bfloat16, 1024),
        ("full", torch.float32, 2048),
        ("four channels", torch.bfloat16, 1024),
        ("tiny", torch.bfloat16, 1024),
        ("tiny", torch.float32, 4096),
    ],
)
def test_estimates_hold_and_do_not_exaggerate(name, dtype, size):
    measured = full_size_peaks(name, dtype, size)
    estimated = estimates(CONFIGS[name], size, dtype)
    for stage, bytes_ in measured.items():
        assert estimated[stage] >= bytes_, f"{stage}: {estimated[stage]} for {bytes_}"
    # What a plan turns on is the larger of both networks; a strip's own needs are a constant.
    largest = max(measured["autoencoder"], measured["unet"])
    assert max(estimated["autoencoder"], estimated["unet"]) <= GENEROUS * largest
    assert estimated["strips"] - plan.STRIP_EXTRA <= GENEROUS * measured["strips"]


def test_strips_save_a_third_of_the_peak_of_large_pictures():
    measured = full_size_peaks("full", torch.float32, 2048)
    assert measured["strips"] <= 0.7 * measured["autoencoder"]


def test_counted_without_values_as_with_them():
    network = fold(random_network())
    with torch.device("meta"):
        empty = OneStep(network.config)
    assert peaks(empty, 64, "meta") == pytest.approx(peaks(network, 64, "cpu"), rel=0.05)


def test_a_small_network_stays_below_its_estimate():
    config = StepConfig(unet=UNET, vae=VAE_)
    measured = peaks(fold(random_network()), 128, "cpu")
    for stage, bytes_ in estimates(config, 128, torch.float32).items():
        assert bytes_ >= measured[stage], stage


def test_live_bytes_count_what_lives():
    x = torch.zeros(256)
    with LiveBytes() as live:
        y = x + 1
        z = y.view(16, 16)[2:] + 0
        y.add_(1)
        assert live.live == 1024 + 896
        del y
        gc.collect()
        assert live.live == 896
        z = nn.Identity()(z) * 2
        assert live.live == 896
    assert live.peak == 1024 + 896
