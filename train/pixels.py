"""Pictures as training sees them: the enlarged input, and losses where a network is trained in pixels."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor

# Pixels that the autoencoder and DINOv2 see at a time; their maps are the largest of all.
AT_A_TIME = 2**20


def enlarge(lr: Tensor, scale: int) -> Tensor:
    """What `restore` hands to the network: bicubic, b 3 h w -> b 3 sh sw, in [-1, 1]."""
    return F.interpolate(lr, scale_factor=scale, mode="bicubic").clamp(-1, 1)


def in_parts(x: Tensor) -> tuple[Tensor, ...]:
    """Pictures b 3 h w in parts that a network with maps of their own size can take: with 128
    channels 64 pictures of 512 px have 2^31 elements, which some kernels can't count."""
    return x.split(max(1, AT_A_TIME // (x.shape[-2] * x.shape[-1])))


def gradients(x: Tensor) -> tuple[Tensor, Tensor]:
    """Differences to the right and lower neighbour: b c h w -> b c h w-1, b c h-1 w."""
    return x[..., :, 1:] - x[..., :, :-1], x[..., 1:, :] - x[..., :-1, :]


def pixel_loss(y: Tensor, target: Tensor, *, gradient: float) -> Tensor:
    """Mean absolute difference of values plus `gradient` times that of their differences.

    The second term keeps edges from being paid for with blur.
    """
    y, target = y.float(), target.float()
    loss = F.l1_loss(y, target)
    if gradient:
        for a, b in zip(gradients(y), gradients(target), strict=True):
            loss = loss + gradient * F.l1_loss(a, b)
    return loss


def grid_loss(y: Tensor, target: Tensor, *, cell: int = 8, window: int = 64) -> Tensor:
    """Mean absolute height of a grid of `cell` pixels in the error: b c h w twice -> a scalar.

    A decoder that makes `cell` x `cell` pixels out of one position can leave the same pattern in
    all of them, which hardly counts in a pixel loss and shows in flat areas. GenDR-Tiny's makes
    8 x 8 pixels of each position of the latent, in cells of 4; a pattern of 4 px is one of 8, too.
    In each window the error is averaged per place in the cell: what these means differ by is the
    pattern. The sides are multiples of `window`.
    """
    error = rearrange(
        y.float() - target.float(),
        "b c (i m p) (j n q) -> b c i j (m n) (p q)",
        m=window // cell,
        n=window // cell,
        p=cell,
        q=cell,
    ).mean(-2)
    return (error - error.mean(-1, keepdim=True)).abs().mean()


def psnr(y: Tensor, target: Tensor) -> float:
    """dB between pictures in [-1, 1], all channels."""
    error = torch.mean((y.float().clamp(-1, 1) - target.float()) ** 2) / 4
    return float(-10 * torch.log10(error.clamp_min(1e-12)))
