"""The autoencoder in rows of strips: the same result, a fraction of the memory.

GroupNorm's statistics are those of the whole picture, gathered strip by strip; each convolution
sees one row more on both sides and its surplus rows are dropped. A residual block holds two tensors
of the full size instead of five. Works for a batch of one.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .blocks import Downsample, ResnetBlock, Upsample
from .onestep import OneStep
from .vae import Attention, Level, Middle, add_linear
from .work import parameters

# Size of the largest tensor of one strip.
STRIP_BYTES = 48 * 2**20

Check = Callable[[], None]
Worked = Callable[[int], None]


def nothing(*_: int) -> None:
    """The check of a run that nobody cancels, and the count of one that nobody watches."""


class Strips:
    """A folded network with the interface of `Step`, its autoencoder by strips of `rows` rows.

    rows: at most so many; None = by the size of a strip's tensors.
    check: called before every strip; may raise to cancel.
    worked: called after every strip with its multiply-adds, as `work.stages` counts them.
    """

    def __init__(
        self,
        network: OneStep,
        *,
        rows: int | None = None,
        check: Check = nothing,
        worked: Worked = nothing,
    ):
        self.network, self.rows, self.check, self.worked = network, rows, check, worked

    def encode(self, x: Tensor) -> Tensor:
        """As `OneStep.encode`: 1 3 h w in [-1, 1] -> 1 c h/f w/f."""
        encoder, dtype = self.network.encoder, self.network.compute[0] or x.dtype
        p = encoder.patch_size
        h = self.convolve(
            x,
            lambda s: encoder.conv_in(_unshuffle(s.to(dtype), p)),
            halo=p,
            ratio=p,
            weights=parameters(encoder.conv_in),
        )
        for level in encoder.down_blocks:
            h = self.level(h, level)
        h = self.middle(h, encoder.mid_block)
        h = self.norm_silu_conv(h, encoder.conv_norm_out, encoder.conv_out)
        if encoder.linear is not None:
            f = self.network.config.vae.factor
            path = self.convolve(
                x, lambda s: encoder.linear(s.to(dtype)), halo=0, ratio=f, weights=0
            )
            h = add_linear(h, lambda _: path, x)
        return h.to(x.dtype) - (self.network.config.vae.shift_factor or 0.0)

    def decode(self, z: Tensor) -> Tensor:
        """As `OneStep.decode`: 1 c h w -> 1 3 fh fw."""
        decoder, dtype = self.network.decoder, z.dtype
        z = self.network.latent_in(z)
        h = self.middle(decoder.conv_in(z), decoder.mid_block)
        for level in decoder.up_blocks:
            h = self.level(h, level)
        norm = self.normaliser(h, decoder.conv_norm_out)
        f, per_row = self.network.config.vae.factor, self.network.config.vae.factor
        per_row //= decoder.patch_size
        rows_out = z.shape[-2] * f
        out = z.new_empty(1, 3, rows_out, z.shape[-1] * f, dtype=dtype)
        # Strips of whole latent rows, so that the linear path has its cells complete.
        step = max(1, self.strip_rows(h) // per_row)
        for top in range(0, z.shape[-2], step):
            self.check()
            bottom = min(top + step, z.shape[-2])
            window, cut = halo(h, top * per_row, bottom * per_row, 1)
            part = cut(decoder.conv_out(F.silu(norm(window))))
            part = decoder.to_picture(part, z[..., top:bottom, :])
            out[..., top * f : bottom * f, :] = part.to(dtype)
            self.worked(parameters(decoder.conv_out) * (bottom - top) * per_row * h.shape[-1])
        return out

    def step(self, z: Tensor, **options: Any) -> Tensor:
        """As `OneStep.step`, of the whole latent at once."""
        return self.network.step(z, **options)

    def forward(self, x: Tensor, **options: Any) -> Tensor:
        """As `OneStep.forward`."""
        return self.decode(self.step(self.encode(x), **options))

    def strip_rows(self, x: Tensor) -> int:
        """Rows of a strip of this tensor."""
        if self.rows:
            return self.rows
        return max(8, STRIP_BYTES // max(1, x.shape[1] * x.shape[3] * x.element_size()))

    def convolve(
        self,
        x: Tensor,
        fn: Callable[[Tensor], Tensor],
        *,
        halo: int,
        weights: int,
        ratio: int = 1,
    ) -> Tensor:
        """fn by strips; it makes h/ratio rows of h and needs `halo` rows around them.

        weights: multiply-adds of a position.
        """
        out: Tensor | None = None
        total = x.shape[-2] // ratio
        step = max(1, self.strip_rows(x) // ratio)
        for top in range(0, total, step):
            self.check()
            bottom = min(top + step, total)
            first, last = max(0, top * ratio - halo), min(x.shape[-2], bottom * ratio + halo)
            part = fn(x[..., first:last, :])
            start = (top * ratio - first) // ratio
            part = part[..., start : start + bottom - top, :]
            if out is None:
                out = room(part, part.shape[1], total, part.shape[-1])
            out[..., top:bottom, :] = part
            self.worked(weights * (bottom - top) * part.shape[-1])
        assert out is not None
        return out

    def level(self, x: Tensor, level: Level) -> Tensor:
        for block in level.resnets:
            x = self.resnet(x, block)
        step = level.resample
        if isinstance(step, Upsample):
            return self.upsample(x, step)
        return x if step is None else self.downsample(x, step)

    def middle(self, x: Tensor, middle: Middle) -> Tensor:
        x = self.resnet(x, middle.resnets[0])
        if hasattr(middle, "attentions"):
            self.check()
            x = self.attention(x, middle.attentions[0])
        return self.resnet(x, middle.resnets[1])

    def attention(self, x: Tensor, block: Attention) -> Tensor:
        y = block(x)
        self.worked(parameters(block) * x.shape[-2] * x.shape[-1])
        return y

    def resnet(self, x: Tensor, block: ResnetBlock) -> Tensor:
        """Changes x in place where the number of channels allows it."""
        h = self.norm_silu_conv(x, block.norm1, block.conv1)
        norm = self.normaliser(h, block.norm2)
        same = block.conv_shortcut is None
        out = x if same else room(h, *h.shape[1:])
        step = self.strip_rows(h)
        weights = parameters(block.conv2) + (0 if same else parameters(block.conv_shortcut))
        for top in range(0, h.shape[-2], step):
            self.check()
            bottom = min(top + step, h.shape[-2])
            window, cut = halo(h, top, bottom, 1)
            part = cut(block.conv2(F.silu(norm(window))))
            rows = x[..., top:bottom, :]
            out[..., top:bottom, :] = part + (rows if same else block.conv_shortcut(rows))
            self.worked(weights * (bottom - top) * h.shape[-1])
        return out

    def norm_silu_conv(self, x: Tensor, norm: nn.Module, conv: nn.Module) -> Tensor:
        normalise = self.normaliser(x, norm)
        return self.convolve(
            x, lambda s: conv(F.silu(normalise(s))), halo=1, weights=parameters(conv)
        )

    def normaliser(self, x: Tensor, norm: nn.Module) -> Callable[[Tensor], Tensor]:
        """GroupNorm with the statistics of all of x, as a function of its strips."""
        if isinstance(norm, nn.Identity):
            return lambda s: s
        groups, count = norm.num_groups, 0
        # Apple's devices have no float64.
        exact = torch.float32 if x.device.type == "mps" else torch.float64
        total = square = torch.zeros(groups, device=x.device, dtype=exact)
        # Around a first estimate of the mean: sums of squares would cancel.
        shift = x[..., :1, :].float().reshape(groups, -1).mean(1)
        for strip in x.split(self.strip_rows(x), dim=-2):
            values = strip.float().reshape(groups, -1) - shift[:, None]
            total = total + values.sum(1).to(exact)
            square = square + values.square().sum(1).to(exact)
            count += values.shape[1]
        mean = total / count
        variance = (square / count - mean**2).clamp_min(0).float()
        mean = (mean.float() + shift).repeat_interleave(x.shape[1] // groups)
        variance = variance.repeat_interleave(x.shape[1] // groups)
        weight, bias = (p.to(x.device, torch.float32) for p in (norm.weight, norm.bias))
        scale = (variance + norm.eps).rsqrt() * weight
        offset = bias - mean * scale
        scale, offset = scale[:, None, None], offset[:, None, None]
        return lambda s: torch.addcmul(offset, s.float(), scale).to(s.dtype)

    def downsample(self, x: Tensor, block: Downsample) -> Tensor:
        total = x.shape[-2] // 2
        out = room(x, x.shape[1], total, x.shape[-1] // 2)
        step = max(1, self.strip_rows(x) // 2)
        for top in range(0, total, step):
            self.check()
            bottom = min(top + step, total)
            rows = x[..., 2 * top : min(2 * bottom + 1, x.shape[-2]), :]
            # The block itself adds the missing row below; only the last strip needs it.
            out[..., top:bottom, :] = block(rows)[..., : bottom - top, :]
            self.worked(parameters(block) * (bottom - top) * out.shape[-1])
        return out

    def upsample(self, x: Tensor, block: Upsample) -> Tensor:
        out = room(x, x.shape[1], 2 * x.shape[-2], 2 * x.shape[-1])
        step = max(1, self.strip_rows(x) // 4)
        for top in range(0, x.shape[-2], step):
            self.check()
            bottom = min(top + step, x.shape[-2])
            first = max(0, top - 1)
            part = block(x[..., first : min(bottom + 1, x.shape[-2]), :])
            start = 2 * (top - first)
            out[..., 2 * top : 2 * bottom, :] = part[..., start : start + 2 * (bottom - top), :]
            self.worked(parameters(block) * 2 * (bottom - top) * out.shape[-1])
        return out


def room(like: Tensor, c: int, h: int, w: int) -> Tensor:
    """An empty 1 c h w in the memory order of `like`: a change of order costs as much as a layer."""
    last = like.is_contiguous(memory_format=torch.channels_last) and like.shape[1] > 1
    order = torch.channels_last if last else torch.contiguous_format
    return torch.empty((1, c, h, w), dtype=like.dtype, device=like.device, memory_format=order)


def _unshuffle(x: Tensor, patch: int) -> Tensor:
    return F.pixel_unshuffle(x, patch) if patch > 1 else x


def halo(x: Tensor, top: int, bottom: int, rows: int) -> tuple[Tensor, Callable[[Tensor], Tensor]]:
    """Rows top..bottom with their neighbours, and what cuts the neighbours' rows off again."""
    first, last = max(0, top - rows), min(x.shape[-2], bottom + rows)
    start = top - first
    return x[..., first:last, :], lambda y: y[..., start : start + bottom - top, :]
