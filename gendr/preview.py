"""A small picture of the work so far: the enlarged input, with the finished parts laid in."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from .tiles import Box

# The longer side of a preview.
SIDE = 256
# Positions of a latent that its map to colours is fitted to, and what keeps the fit stable.
POSITIONS, RIDGE = 4096, 1e-4


class Preview:
    """Begins as a picture 1 3 h w in [-1, 1]; parts of it are replaced as they are done.

    shown: the part of it that a person gets to see, without what surrounds it for the network.
    """

    def __init__(self, picture: Tensor, shown: Box | None = None):
        height, width = picture.shape[-2:]
        shown = shown or Box(0, 0, height, width)
        factor = min(1.0, SIDE / max(shown.bottom - shown.top, shown.right - shown.left))
        self.small = reduced(picture, [max(1, round(side * factor)) for side in (height, width)])
        top, left = (int(first * factor) for first in (shown.top, shown.left))
        bottom = max(top + 1, round(shown.bottom * factor))
        self.shown = Box(top, left, bottom, max(left + 1, round(shown.right * factor)))

    def lay(self, part: Tensor, box: Box, size: tuple[int, int]) -> None:
        """Put a part 1 3 h w in [-1, 1] where `box` of a picture of this size lies."""
        (top, bottom), (left, right) = (
            (first * small // full, max(first * small // full + 1, last * small // full))
            for first, last, small, full in (
                (box.top, box.bottom, self.small.shape[-2], size[0]),
                (box.left, box.right, self.small.shape[-1], size[1]),
            )
        )
        place = self.small[..., top:bottom, left:right]
        if place.numel():
            place.copy_(reduced(part, place.shape[-2:]))

    def __call__(self) -> Tensor:
        """3 h w in [0, 1] on the CPU."""
        return ((self.shown.cut(self.small)[0] + 1) / 2).clamp(0, 1)


def reduced(picture: Tensor, size: tuple[int, int] | list[int]) -> Tensor:
    """Means over cells, b c h w -> b c H W on the CPU."""
    return F.interpolate(picture.float(), size=tuple(size), mode="area").cpu()


class LatentColours:
    """The linear map from a latent to colours that fits one picture and its latent best.

    latent: 1 c h w. picture: 1 3 fh fw in [-1, 1]. Every autoencoder has such a map, near enough
    for a preview, and it costs a system of c + 1 equations.
    """

    def __init__(self, latent: Tensor, picture: Tensor):
        colours = reduced(picture, latent.shape[-2:])[0].flatten(1).T.double()
        ones = _with_one(latent).double()
        stride = -(-len(ones) // POSITIONS)
        a, b = ones[::stride], colours[::stride]
        square = a.T @ a + RIDGE * len(a) * torch.eye(a.shape[1], dtype=torch.float64)
        self.weights = torch.linalg.solve(square, a.T @ b).float()

    def __call__(self, latent: Tensor) -> Tensor:
        """1 c h w -> 1 3 h w, in about [-1, 1], on the CPU."""
        colours = (_with_one(latent) @ self.weights).T
        return colours.reshape(1, 3, *latent.shape[-2:])


def _with_one(latent: Tensor) -> Tensor:
    """1 c h w -> positions x (c + 1), on the CPU."""
    flat = latent[0].float().cpu().flatten(1).T
    return torch.cat([flat, torch.ones(len(flat), 1)], dim=1)
