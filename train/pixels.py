"""Losses between pictures, used where a small network is trained in pixels."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


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


def psnr(y: Tensor, target: Tensor) -> float:
    """dB between pictures in [-1, 1], all channels."""
    error = torch.mean((y.float().clamp(-1, 1) - target.float()) ** 2) / 4
    return float(-10 * torch.log10(error.clamp_min(1e-12)))
