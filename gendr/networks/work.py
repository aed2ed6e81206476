"""How much there is to compute: multiply-adds of each stage, by which a bar can be drawn."""

from __future__ import annotations

from torch import nn

from .onestep import Step
from .unet import UNet
from .vae import Decoder, Encoder


def parameters(module: nn.Module) -> int:
    """Multiply-adds per position of what convolves, or is linear, in here."""
    return sum(p.numel() for p in module.parameters())


def stages(network: Step, *, passes: int = 1) -> dict[str, float]:
    """Multiply-adds per pixel of encode, step and decode. passes: of the UNet, with guidance two."""
    unfolded = hasattr(network, "vae")
    encoder = network.vae.encoder if unfolded else network.encoder
    decoder = network.vae.decoder if unfolded else network.decoder
    return {
        "encode": _encoder(encoder),
        "step": _unet(network.unet, network.config.vae.factor) * passes,
        "decode": _decoder(decoder),
    }


def _encoder(encoder: Encoder) -> float:
    cell = encoder.patch_size
    total = parameters(encoder.conv_in) / cell**2
    for level in encoder.down_blocks:
        total += parameters(level.resnets) / cell**2
        if level.resample is not None:
            cell *= 2
            total += parameters(level.resample) / cell**2
    return total + (parameters(encoder.mid_block) + parameters(encoder.conv_out)) / cell**2


def _decoder(decoder: Decoder) -> float:
    cell = decoder.factor
    total = (parameters(decoder.conv_in) + parameters(decoder.mid_block)) / cell**2
    for level in decoder.up_blocks:
        total += parameters(level.resnets) / cell**2
        if level.resample is not None:
            cell //= 2
            total += parameters(level.resample) / cell**2
    return total + parameters(decoder.conv_out) / cell**2


def _unet(unet: UNet, factor: int) -> float:
    cell = factor
    total = (parameters(unet.conv_in) + parameters(unet.conv_out)) / cell**2
    for level in unet.down_blocks:
        total += parameters(level) / cell**2
        cell *= 2
    cell //= 2
    total += parameters(unet.mid_block) / cell**2
    for level in unet.up_blocks:
        total += parameters(level) / cell**2
        cell //= 2
    return total
