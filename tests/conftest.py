"""Tiny random models, the same for every test."""

from __future__ import annotations

import os
import signal

# Idle threads that spin would slow the test processes that run side by side.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")

from dataclasses import replace

import pytest
import torch

import gendr
from gendr.files import checkpoint
from gendr.files.header import Header
from gendr.model import GenDR
from gendr.networks.onestep import StepConfig, Unfolded
from gendr.networks.unet import UNet, UNetConfig
from gendr.networks.vae import VAE, VAEConfig

UNET = UNetConfig(
    block_out_channels=(16, 32),
    attention=(False, True),
    layers_per_block=1,
    head_dim=16,
    cross_attention_dim=12,
    norm_num_groups=8,
)
# Narrower still, for what is trained in float64.
NARROW = replace(
    UNET, block_out_channels=(8, 16), head_dim=8, cross_attention_dim=6, norm_num_groups=4
)
VAE_ = VAEConfig(
    block_out_channels=(16, 32),
    layers_per_block=1,
    norm_num_groups=8,
    patch_size=4,
    scaling_factor=0.5,
)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Slow tests run where they are asked for, and say so elsewhere."""
    if os.environ.get("GENDR_SLOW"):
        return
    for item in items:
        if item.get_closest_marker("slow"):
            item.add_marker(pytest.mark.skip(reason="slow: set GENDR_SLOW=1 to run it"))


@pytest.fixture(autouse=True)
def own_signals():
    """A training run takes over Ctrl-C and a polite kill for as long as its process lives."""
    names = (signal.SIGINT, signal.SIGTERM)
    before = [signal.getsignal(name) for name in names]
    yield
    for name, handler in zip(names, before, strict=True):
        signal.signal(name, handler)


def random_network(
    vae: VAEConfig = VAE_, unet: UNetConfig = UNET, *, prompts: tuple[str, ...] = ("positive",)
) -> Unfolded:
    """A tiny network with random weights, the same every time."""
    # A generator of its own: the order of tests must not change what they see.
    with torch.random.fork_rng():
        torch.manual_seed(7)
        config = StepConfig(unet=unet, vae=vae)
        embeds = {n: torch.randn(1, 5, unet.cross_attention_dim) for n in prompts}
        return Unfolded(config, VAE(vae), UNet(unet), embeds).requires_grad_(False).eval()


def header(network: Unfolded, **facts) -> Header:
    facts = {"name": "Random", "licence": "Apache-2.0", "tile": 64, **facts}
    return Header(config=network.config, **facts)


@pytest.fixture(scope="session")
def tiny_checkpoint(tmp_path_factory):
    """Path of a tiny random GenDR checkpoint (tile 64 px, positive and negative prompt)."""
    path = tmp_path_factory.mktemp("models") / "random.safetensors"
    network = random_network(prompts=("positive", "negative"))
    checkpoint.save(path, network, header(network), dtype="fp32")
    return path


@pytest.fixture(scope="session")
def plain_checkpoint(tmp_path_factory):
    """The same without normalisation in the autoencoder and without a negative prompt."""
    path = tmp_path_factory.mktemp("models") / "plain.safetensors"
    vae = replace(VAE_, norm_num_groups=0, mid_attention=False, quant_conv=False, linear_path=True)
    network = random_network(vae)
    checkpoint.save(path, network, header(network), dtype="fp32")
    return path


@pytest.fixture
def tiny(tiny_checkpoint) -> GenDR:
    """A tiny random model, loaded in float32 on the CPU."""
    return gendr.load(tiny_checkpoint, device="cpu", dtype="fp32")


@pytest.fixture
def plain(plain_checkpoint) -> GenDR:
    """A tiny random model like GenDR-Tiny, loaded in float32 on the CPU."""
    return gendr.load(plain_checkpoint, device="cpu", dtype="fp32")
