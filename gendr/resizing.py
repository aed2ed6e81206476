"""Sizes: bicubic resizing, padding to a grid, and edges that repeat. Pure functions."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

# The cubic kernel of torch's own bicubic interpolation.
CUBIC = -0.75


def resize(image: Tensor, size: tuple[int, int], *, wrap: bool = False) -> Tensor:
    """Bicubic, b c h w -> b c H W, float32, clamped to [0, 1]; antialiased where it shrinks.

    wrap: the picture repeats, so that its edges take part in each other.
    """
    image = image.float()
    if tuple(image.shape[-2:]) == tuple(size):
        return image.clamp(0, 1)
    shrinks = size[0] < image.shape[-2] or size[1] < image.shape[-1]
    if wrap and not shrinks:
        return _wrapped(_wrapped(image, size[0], -2), size[1], -1).clamp(0, 1)
    out = F.interpolate(image, size=tuple(size), mode="bicubic", antialias=shrinks)
    return out.clamp(0, 1)


def _wrapped(x: Tensor, length: int, dim: int) -> Tensor:
    """Bicubic along one axis of a picture that repeats."""
    old = x.shape[dim]
    # On the CPU, where every machine has float64.
    place = (torch.arange(length, dtype=torch.float64) + 0.5) * old / length - 0.5
    base = place.floor()
    d = ((place - base)[:, None] + torch.tensor([1.0, 0.0, -1.0, -2.0]).double()).abs()
    near = ((CUBIC + 2) * d - (CUBIC + 3)) * d * d + 1
    far = ((CUBIC * d - 5 * CUBIC) * d + 8 * CUBIC) * d - 4 * CUBIC
    weights = torch.where(d <= 1, near, far).to(x)
    shape = [1] * x.dim()
    shape[dim] = length
    out = 0
    for k in range(4):
        index = ((base.long() + k - 1) % old).to(x.device)
        out = out + x.index_select(dim, index) * weights[:, k].reshape(shape)
    return out


def mirrored(length: int, padded: int, device: torch.device) -> Tensor:
    """Indices 0..length-1 continued to `padded` by reflection, as often as needed."""
    index = torch.arange(padded, device=device)
    if length == 1:
        return torch.zeros_like(index)
    period = 2 * (length - 1)
    index = index % period
    return torch.where(index < length, index, period - index)


def pad(image: Tensor, size: tuple[int, int]) -> Tensor:
    """Extend right and bottom by reflection to H x W; any size from 1x1 up."""
    for dim, length in ((-2, size[0]), (-1, size[1])):
        if image.shape[dim] != length:
            index = mirrored(image.shape[dim], length, image.device)
            image = image.index_select(dim, index)
    return image


def up_to_multiple(length: int, multiple: int) -> int:
    """The next multiple, at least one."""
    return max(1, math.ceil(length / multiple)) * multiple


def unroll(image: Tensor, margin: int, size: tuple[int, int]) -> Tensor:
    """A repeating picture with `margin` of itself before its start, continued to H x W."""
    for dim, length in ((-2, size[0]), (-1, size[1])):
        index = (torch.arange(length, device=image.device) - margin) % image.shape[dim]
        image = image.index_select(dim, index)
    return image


def roll_up(image: Tensor, margin: int, size: tuple[int, int]) -> Tensor:
    """The inverse of `unroll` after a change: what continued past the end fades into the start.

    The image must continue for at least `margin` past the period `size` H x W.
    """
    for dim, length in ((-2, size[0]), (-1, size[1])):
        fade = min(margin, length)
        image_start = image.narrow(dim, margin, length)
        if not fade:
            image = image_start
            continue
        beyond = image.narrow(dim, margin + length, fade)
        shape = [1] * image.dim()
        shape[dim] = fade
        ramp = (torch.arange(fade, device=image.device, dtype=image.dtype) + 0.5) / fade
        ramp = (0.5 - 0.5 * torch.cos(math.pi * ramp)).reshape(shape)
        blended = beyond + ramp * (image_start.narrow(dim, 0, fade) - beyond)
        image = torch.cat([blended, image_start.narrow(dim, fade, length - fade)], dim)
    return image
