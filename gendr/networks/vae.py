"""The autoencoder: pictures to latents of unit variance and back, scale and shift inside.

One definition for ostris/vae-kl-f8-d16 (the paper's VAE16), Stable Diffusion's 4-channel VAE and
the small one of GenDR-Tiny. Parameter names are those of diffusers' AutoencoderKL.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from . import fused
from .blocks import Downsample, ResnetBlock, Upsample, attend, group_norm

EPS = 1e-6


@dataclass(frozen=True, kw_only=True)
class VAEConfig:
    """Shape of an autoencoder; the defaults are ostris/vae-kl-f8-d16.

    patch_size: pixels that one position of the first level covers, by pixel-unshuffle; 1 = none.
    norm_num_groups: 0 = no normalisation, and so no dependence on the size of the picture.
    linear_path: a linear map of whole latent cells runs beside the networks.
    quant_conv: the 1x1 convolutions on both sides of the latent.
    """

    latent_channels: int = 16
    block_out_channels: tuple[int, ...] = (128, 128, 256, 512)
    layers_per_block: int = 2
    norm_num_groups: int = 32
    mid_attention: bool = True
    quant_conv: bool = True
    patch_size: int = 1
    linear_path: bool = False
    # Read from the checkpoint's header or config.json: published copies differ.
    scaling_factor: float = 0.24447420268654824
    shift_factor: float | None = None

    def __post_init__(self) -> None:
        object.__setattr__(self, "block_out_channels", tuple(self.block_out_channels))
        if self.linear_path and self.quant_conv:
            raise ValueError("linear_path and quant_conv exclude each other: the path is the mean")

    @property
    def factor(self) -> int:
        """Pixels per latent position along one side."""
        return self.patch_size * 2 ** (len(self.block_out_channels) - 1)


VAE16 = VAEConfig()
SD_VAE = VAEConfig(
    latent_channels=4, block_out_channels=(128, 256, 512, 512), scaling_factor=0.18215
)
TINY_VAE = VAEConfig(
    block_out_channels=(64, 128),
    norm_num_groups=0,
    mid_attention=False,
    quant_conv=False,
    patch_size=4,
    linear_path=True,
    scaling_factor=1.0,
)


class Attention(nn.Module):
    """Self-attention of one head over all positions: b c h w -> b c h w."""

    fast = False

    def __init__(self, channels: int, *, groups: int, operations: Any = nn):
        super().__init__()
        self.group_norm = group_norm(operations, groups, channels, EPS)
        self.to_q = operations.Linear(channels, channels)
        self.to_k = operations.Linear(channels, channels)
        self.to_v = operations.Linear(channels, channels)
        self.to_out = nn.ModuleList([operations.Linear(channels, channels)])

    def forward(self, x: Tensor) -> Tensor:
        h, w = x.shape[-2:]
        fast = self.fast
        normed = fused.norm(x, self.group_norm, silu=False) if fast else self.group_norm(x)
        tokens = rearrange(normed, "b c h w -> b 1 (h w) c")
        if fast and (joined := fused.joined(self.to_q, self.to_k, self.to_v)) is not None:
            q, k, v = F.linear(tokens, *joined).chunk(3, dim=-1)
        else:
            q, k, v = self.to_q(tokens), self.to_k(tokens), self.to_v(tokens)
        out = rearrange(self.to_out[0](attend(q, k, v)), "b 1 (h w) c -> b c h w", h=h, w=w)
        # Same memory order as x: a channels-last tensor left here slows all that follows on a CPU.
        return x + (out if fast else out.contiguous())


class Level(nn.Module):
    """Residual blocks of one resolution and the step to the next one, if there is one."""

    def __init__(
        self,
        inputs: int,
        outputs: int,
        layers: int,
        *,
        groups: int,
        down: bool = False,
        up: bool = False,
        phases: bool = False,
        operations: Any = nn,
    ):
        super().__init__()
        widths = [inputs, *[outputs] * layers]
        self.resnets = nn.ModuleList(
            ResnetBlock(i, o, temb=None, groups=groups, eps=EPS, operations=operations)
            for i, o in pairwise(widths)
        )
        if down:
            self.downsamplers = nn.ModuleList(
                [Downsample(outputs, padding=0, operations=operations)]
            )
        if up:
            self.upsamplers = nn.ModuleList(
                [Upsample(outputs, phases=phases, operations=operations)]
            )

    @property
    def resample(self) -> nn.Module | None:
        """The step to the next resolution."""
        steps = getattr(self, "downsamplers", None) or getattr(self, "upsamplers", None)
        return steps[0] if steps else None


def steps(levels: Iterable[Level]) -> list[nn.Module]:
    """Blocks and resamplings of all levels in a row.

    Run one by one, the input of a level is freed after its first block.
    """
    flat: list[nn.Module] = []
    for level in levels:
        flat += [*level.resnets, *([level.resample] if level.resample is not None else [])]
    return flat


class Middle(nn.Module):
    """The coarsest level: block, attention, block."""

    def __init__(self, channels: int, *, groups: int, attention: bool, operations: Any = nn):
        super().__init__()
        self.resnets = nn.ModuleList(
            ResnetBlock(
                channels, channels, temb=None, groups=groups, eps=EPS, operations=operations
            )
            for _ in range(2)
        )
        if attention:
            self.attentions = nn.ModuleList(
                [Attention(channels, groups=groups, operations=operations)]
            )

    def forward(self, x: Tensor) -> Tensor:
        x = self.resnets[0](x)
        if hasattr(self, "attentions"):
            x = self.attentions[0](x)
        return self.resnets[1](x)


class Encoder(nn.Module):
    """Picture b 3 h w in [-1, 1] -> b outputs h/f w/f."""

    fast = False

    def __init__(self, config: VAEConfig, outputs: int, *, operations: Any = nn):
        super().__init__()
        c, widths = config, config.block_out_channels
        self.patch_size = c.patch_size
        self.conv_in = operations.Conv2d(3 * c.patch_size**2, widths[0], 3, padding=1)
        pairs = list(pairwise([widths[0], *widths]))
        self.down_blocks = nn.ModuleList(
            Level(
                i,
                o,
                c.layers_per_block,
                groups=c.norm_num_groups,
                down=n < len(pairs) - 1,
                operations=operations,
            )
            for n, (i, o) in enumerate(pairs)
        )
        self.mid_block = Middle(
            widths[-1],
            groups=c.norm_num_groups,
            attention=c.mid_attention,
            operations=operations,
        )
        self.conv_norm_out = group_norm(operations, c.norm_num_groups, widths[-1], EPS)
        self.conv_out = operations.Conv2d(widths[-1], outputs, 3, padding=1)
        self.linear = (
            operations.Conv2d(3, c.latent_channels, c.factor, stride=c.factor)
            if c.linear_path
            else None
        )

    def forward(self, x: Tensor) -> Tensor:
        h = self.conv_in(F.pixel_unshuffle(x, self.patch_size) if self.patch_size > 1 else x)
        for step in steps(self.down_blocks):
            h = step(h)
        for step in (self.mid_block, *ending(self)):
            h = step(h)
        return add_linear(h, self.linear, x)


class Decoder(nn.Module):
    """Latent b c h w in the VAE's own units -> picture b 3 fh fw, about [-1, 1]."""

    fast = False

    def __init__(self, config: VAEConfig, *, phases: bool = False, operations: Any = nn):
        super().__init__()
        c, widths = config, tuple(reversed(config.block_out_channels))
        self.patch_size, self.factor = c.patch_size, c.factor
        self.conv_in = operations.Conv2d(c.latent_channels, widths[0], 3, padding=1)
        self.mid_block = Middle(
            widths[0],
            groups=c.norm_num_groups,
            attention=c.mid_attention,
            operations=operations,
        )
        pairs = list(pairwise([widths[0], *widths]))
        self.up_blocks = nn.ModuleList(
            Level(
                i,
                o,
                c.layers_per_block + 1,
                groups=c.norm_num_groups,
                up=n < len(pairs) - 1,
                phases=phases,
                operations=operations,
            )
            for n, (i, o) in enumerate(pairs)
        )
        self.conv_norm_out = group_norm(operations, c.norm_num_groups, widths[-1], EPS)
        self.conv_out = operations.Conv2d(widths[-1], 3 * c.patch_size**2, 3, padding=1)
        self.linear = (
            operations.Conv2d(c.latent_channels, 3 * c.factor**2, 1) if c.linear_path else None
        )

    def forward(self, z: Tensor) -> Tensor:
        h = self.mid_block(self.conv_in(z))
        for step in (*steps(self.up_blocks), *ending(self)):
            h = step(h)
        return self.to_picture(h, z)

    def to_picture(self, h: Tensor, z: Tensor) -> Tensor:
        """Positions of the last level to pixels, and the linear path added."""
        if self.patch_size > 1:
            h = F.pixel_shuffle(h, self.patch_size)
        return h if self.linear is None else h + F.pixel_shuffle(self.linear(z), self.factor)


def ending(network: Encoder | Decoder) -> tuple[Callable[[Tensor], Tensor], ...]:
    """From the last block to the last convolution's result, one by one."""
    if network.fast:
        return (lambda h: fused.norm(h, network.conv_norm_out)), network.conv_out
    return network.conv_norm_out, F.silu, network.conv_out


def add_linear(h: Tensor, linear: nn.Module | None, x: Tensor) -> Tensor:
    """Add the linear path to the mean; a log-variance beside it stays as it is."""
    if linear is None:
        return h
    mean = linear(x)
    rest = h.shape[1] - mean.shape[1]
    return h + (F.pad(mean, (0, 0, 0, 0, 0, rest)) if rest else mean)


class VAE(nn.Module):
    """Autoencoder whose callers see latents of unit variance only.

    Sides of pictures must be multiples of `config.factor`.
    """

    def __init__(self, config: VAEConfig = VAE16, *, operations: Any = nn):
        super().__init__()
        self.config = c = config
        self.encoder = Encoder(c, 2 * c.latent_channels, operations=operations)
        self.decoder = Decoder(c, operations=operations)
        if c.quant_conv:
            self.quant_conv = operations.Conv2d(2 * c.latent_channels, 2 * c.latent_channels, 1)
            self.post_quant_conv = operations.Conv2d(c.latent_channels, c.latent_channels, 1)

    def moments(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and log-variance of the posterior in the VAE's own units, each b c h/f w/f."""
        h = self.encoder(x)
        mean, logvar = (self.quant_conv(h) if self.config.quant_conv else h).chunk(2, dim=1)
        return mean, logvar.clamp(-30, 20)

    def encode(self, x: Tensor, *, generator: torch.Generator | None = None) -> Tensor:
        """Picture in [-1, 1], b 3 h w -> latent of unit variance, b c h/f w/f.

        The posterior's mode (section 1.1 of the method), or a sample when a generator is given.
        """
        mean, logvar = self.moments(x)
        if generator is not None:
            noise = torch.randn(mean.shape, generator=generator, device=generator.device)
            mean = mean + (0.5 * logvar).exp() * noise.to(mean)
        return (mean - (self.config.shift_factor or 0.0)) * self.config.scaling_factor

    def decode(self, z: Tensor) -> Tensor:
        """Latent of unit variance, b c h w -> picture, about [-1, 1], b 3 fh fw."""
        z = z / self.config.scaling_factor + (self.config.shift_factor or 0.0)
        return self.decoder(self.post_quant_conv(z) if self.config.quant_conv else z)
