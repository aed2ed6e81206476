"""How far a result is from its input, and how to bring it back. Pure functions, b c h w in [0, 1]."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from .resizing import resize

# Back-projection stops when the reduced result is this close to the input, half an 8-bit step ...
CLOSE = 0.5 / 255
# ... or after this many rounds: clipped highlights may never get there.
ROUNDS = 24


def reduce(image: Tensor, size: tuple[int, int]) -> Tensor:
    """A result as its input would show it: antialiased bicubic to h x w."""
    return resize(image, size)


def back_project(result: Tensor, image: Tensor, strength: float) -> Tensor:
    """Move a result towards one that, reduced to the input's size, is the input.

    strength 0 changes nothing, 1 goes all the way (to half an 8-bit step where the range allows),
    in between is the straight line.
    """
    if strength == 0 or result.shape[-1] * result.shape[-2] <= image.shape[-1] * image.shape[-2]:
        return result
    image, current = image.float(), result.float()
    for _ in range(ROUNDS):
        error = image - reduce(current, image.shape[-2:])
        if float(error.abs().max()) <= CLOSE:
            break
        current = (current + _signed_resize(error, result.shape[-2:])).clamp(0, 1)
    return torch.lerp(result.float(), current, strength)


def _signed_resize(error: Tensor, size: tuple[int, int]) -> Tensor:
    """`resize` of values in [-1, 1]."""
    return torch.nn.functional.interpolate(error, size=tuple(size), mode="bicubic")


def psnr(a: Tensor, b: Tensor) -> float:
    """dB over all channels, 80 for equal pictures."""
    error = float(torch.mean((a.float() - b.float()) ** 2, dtype=torch.float64))
    return -10 * math.log10(error + 1e-8)


def difference(result: Tensor, image: Tensor) -> Tensor:
    """Map of where detail was invented: mean |result - resized input|, b 1 H W in [0, 1].

    Pictures of one, two or four channels are compared without their alpha.
    """
    c = 3 if image.shape[1] >= 3 else 1
    plain = resize(image[:, :c], tuple(result.shape[-2:]))
    return (result[:, :c].float() - plain).abs().mean(1, keepdim=True)
