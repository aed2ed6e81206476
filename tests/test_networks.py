"""The networks against diffusers, by count and by value; folded against unfolded."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from diffusers import AutoencoderKL, UNet2DConditionModel

from gendr.networks.blocks import Upsample, attend, phase_upsample
from gendr.networks.onestep import OneStep, StepConfig, Unfolded, fold, folded_config
from gendr.networks.unet import SD21, SD21_16, TINY_UNET, UNet, UNetConfig
from gendr.networks.vae import SD_VAE, TINY_VAE, VAE, VAE16, VAEConfig

pytestmark = pytest.mark.threads

SMALL_UNET = UNetConfig(
    block_out_channels=(32, 64),
    attention=(True, False),
    head_dim=16,
    cross_attention_dim=24,
    norm_num_groups=8,
)
SMALL_VAE = VAEConfig(block_out_channels=(16, 32, 32), norm_num_groups=8)


def count(module: torch.nn.Module) -> int:
    return sum(p.numel() for p in module.parameters())


def distance(a: torch.Tensor, b: torch.Tensor) -> float:
    return float((a.detach().double() - b.detach().double()).norm() / b.detach().double().norm())


@pytest.mark.parametrize(
    ("build", "parameters"),
    [
        (lambda: UNet(SD21_16), 865_979_856),
        (lambda: UNet(SD21), 865_910_724),
        (lambda: VAE(VAE16), 57_266_643),
        (lambda: VAE(SD_VAE), 83_653_863),
        (lambda: UNet(replace(SD21_16, prompts=1)), 812_545_296 + 1_921_920),
        (lambda: OneStep(folded_config(StepConfig(), 1, 77)), 871_659_059),
    ],
)
def test_full_size_counts(build, parameters):
    with torch.device("meta"):
        assert count(build()) == parameters


def test_tiny_stays_small():
    with torch.device("meta"):
        assert count(VAE(TINY_VAE)) + count(UNet(TINY_UNET)) <= 8_000_000


def diffusers_unet(c: UNetConfig) -> UNet2DConditionModel:
    down = ["CrossAttnDownBlock2D" if a else "DownBlock2D" for a in c.attention]
    up = ["CrossAttnUpBlock2D" if a else "UpBlock2D" for a in reversed(c.attention)]
    return UNet2DConditionModel(
        in_channels=c.latent_channels,
        out_channels=c.latent_channels,
        block_out_channels=c.block_out_channels,
        layers_per_block=c.layers_per_block,
        down_block_types=tuple(down),
        up_block_types=tuple(up),
        attention_head_dim=tuple(w // c.head_dim for w in c.block_out_channels),
        cross_attention_dim=c.cross_attention_dim,
        use_linear_projection=True,
        norm_num_groups=c.norm_num_groups,
    )


@pytest.mark.parametrize("channels", [4, 16])
@pytest.mark.parametrize("layers", [1, 2])
def test_unet_equals_diffusers(channels, layers):
    torch.manual_seed(0)
    config = replace(SMALL_UNET, latent_channels=channels, layers_per_block=layers)
    ours, theirs = UNet(config), diffusers_unet(config)
    theirs.load_state_dict(ours.state_dict(), strict=True)
    z, context = torch.randn(2, channels, 16, 24), torch.randn(2, 7, 24)
    for t in (torch.tensor([20, 979]), 500):
        expected = theirs(z, t, context).sample
        assert distance(ours(z, t, context), expected) <= 1e-6


@pytest.mark.parametrize("channels", [4, 16])
def test_vae_equals_diffusers(channels):
    torch.manual_seed(0)
    config = replace(SMALL_VAE, latent_channels=channels, scaling_factor=1.0)
    ours = VAE(config)
    theirs = AutoencoderKL(
        latent_channels=channels,
        block_out_channels=config.block_out_channels,
        norm_num_groups=8,
        down_block_types=("DownEncoderBlock2D",) * 3,
        up_block_types=("UpDecoderBlock2D",) * 3,
        layers_per_block=2,
    )
    theirs.load_state_dict(ours.state_dict(), strict=True)
    x = torch.rand(2, 3, 32, 48) * 2 - 1
    posterior = theirs.encode(x).latent_dist
    mean, logvar = ours.moments(x)
    assert distance(mean, posterior.mean) <= 1e-6
    assert distance(logvar, posterior.logvar) <= 1e-6
    # In float64, where the order of sums (the layouts of the two differ) can't hide a difference.
    z = torch.randn(2, channels, 8, 12).double()
    assert distance(ours.double().decode(z), theirs.double().decode(z).sample) <= 1e-12


def test_scale_and_shift_stand_between_latent_and_vae():
    torch.manual_seed(0)
    plain = VAE(replace(SMALL_VAE, scaling_factor=1.0))
    scaled = VAE(replace(SMALL_VAE, scaling_factor=0.25, shift_factor=0.5))
    scaled.load_state_dict(plain.state_dict())
    x = torch.rand(1, 3, 16, 16) * 2 - 1
    assert torch.allclose(scaled.encode(x), (plain.encode(x) - 0.5) * 0.25, atol=1e-6)
    z = plain.encode(x)
    assert torch.allclose(scaled.decode((z - 0.5) * 0.25), plain.decode(z), atol=1e-5)


def test_posterior_sample_is_seeded():
    torch.manual_seed(0)
    vae, x = VAE(SMALL_VAE), torch.rand(1, 3, 16, 16)
    draws = [vae.encode(x, generator=torch.Generator().manual_seed(s)) for s in (1, 1, 2)]
    assert torch.equal(draws[0], draws[1])
    assert not torch.equal(draws[0], draws[2])


@pytest.mark.parametrize("size", [(1, 1), (5, 7), (8, 8)])
def test_phases_equal_nearest_and_convolution(size):
    torch.manual_seed(0)
    layer = Upsample(6).double()
    x = torch.randn(2, 6, *size, dtype=torch.float64)
    quick = phase_upsample(x, layer.conv.weight, layer.conv.bias)
    assert distance(quick, layer(x)) <= 1e-6


def test_attention_in_chunks_is_the_same(monkeypatch):
    q, k, v = torch.randn(3, 1, 1, 60, 512).unbind(0)
    whole = attend(q, k, v)
    monkeypatch.setattr("gendr.networks.blocks.ATTENTION_BYTES", 7 * 60 * 4)
    assert torch.allclose(attend(q, k, v), whole, atol=1e-6)


def random_network(prediction: str, *, quant: bool, shift: float | None) -> Unfolded:
    torch.manual_seed(3)
    vae = replace(
        SMALL_VAE, quant_conv=quant, linear_path=not quant, scaling_factor=0.3, shift_factor=shift
    )
    config = StepConfig(unet=SMALL_UNET, vae=vae, prediction_type=prediction, alpha=0.45, beta=0.55)
    embeds = {n: torch.randn(1, 7, 24) for n in ("positive", "negative", "null")}
    return Unfolded(config, VAE(vae), UNet(SMALL_UNET), embeds).requires_grad_(False)


@pytest.mark.parametrize("guidance", [1.0, 2.5])
@pytest.mark.parametrize(
    ("prediction", "quant", "shift"),
    [("epsilon", True, None), ("v_prediction", False, 0.1), ("epsilon", False, None)],
)
def test_folded_equals_unfolded(prediction, quant, shift, guidance):
    network = random_network(prediction, quant=quant, shift=shift)
    x = torch.rand(2, 3, 32, 64) * 2 - 1
    quick = fold(network)
    assert distance(quick(x, guidance=guidance), network(x, guidance=guidance)) <= 1e-5
    halfway = network(x, guidance=guidance, detail=0.5)
    assert distance(quick(x, guidance=guidance, detail=0.5), halfway) <= 1e-5


def test_folded_in_bf16_is_no_worse_than_unfolded():
    network = random_network("epsilon", quant=True, shift=None)
    x = torch.rand(2, 3, 32, 64) * 2 - 1
    exact = network(x)
    errors = [distance(n.bfloat16()(x.bfloat16()), exact) for n in (fold(network), network)]
    assert errors[0] <= 1.5 * errors[1]


def test_folding_freezes_the_timestep():
    network = fold(random_network("epsilon", quant=True, shift=None))
    z = torch.randn(1, 16, 8, 8)
    assert torch.equal(network.unet(z, 0, 1), network.unet(z, 999, 1))


def test_guidance_of_equal_prompts_changes_nothing():
    network = random_network("epsilon", quant=True, shift=None)
    network.embeds["negative"] = network.embeds["positive"]
    x = torch.rand(1, 3, 32, 32) * 2 - 1
    assert torch.allclose(network(x, guidance=4.0), network(x), atol=1e-5)


def test_detail_zero_is_the_autoencoder():
    network = random_network("epsilon", quant=True, shift=0.1)
    x = torch.rand(1, 3, 32, 32) * 2 - 1
    plain = network.vae.decode(network.vae.encode(x))
    assert distance(network(x, detail=0.0), plain) <= 1e-6
    assert distance(fold(network)(x, detail=0.0), plain) <= 1e-5


def test_mismatched_latents_are_named():
    with pytest.raises(ValueError, match=r"4 latent channels.*16"):
        StepConfig(unet=SD21, vae=VAE16)


def test_large_maps_are_enlarged_by_phases_small_ones_plainly(monkeypatch):
    torch.manual_seed(0)
    layer = Upsample(6, phases=True)
    calls = []
    real = phase_upsample
    monkeypatch.setattr(
        "gendr.networks.blocks.phase_upsample",
        lambda *a, **k: calls.append(a[0].shape) or real(*a, **k),
    )
    plain = Upsample(6)
    plain.load_state_dict(layer.state_dict())
    for side in (8, 40):
        x = torch.randn(1, 6, side, side)
        assert distance(layer(x), plain(x)) <= 1e-6
    assert [shape[-1] for shape in calls] == [40]
