"""Restore only where a mask is white: which part to compute, and how to lay it over the rest."""

from __future__ import annotations

from collections.abc import Callable
from fractions import Fraction
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from ..gendr.resize import resize
from ..gendr.settings import Settings

# Pixels of the input: how far the soft edge reaches, and what the network sees beyond it.
FEATHER = 8
CONTEXT = 48


class Box(NamedTuple):
    """Rows and columns of a picture."""

    top: int
    bottom: int
    left: int
    right: int

    def cut(self, picture: Tensor) -> Tensor:
        """The part of b c h w inside, as a view."""
        return picture[..., self.top : self.bottom, self.left : self.right]


def restore_within(
    mask: Tensor,
    pixels: Tensor,
    settings: Settings,
    restore: Callable[[Tensor], tuple[Tensor, str]],
) -> tuple[Tensor, str]:
    """Restored where the mask is white, plainly enlarged elsewhere: b c H W and a report.

    mask: b h w or 1 h w. pixels: b c h w. restore: what restores a part of the picture.
    """
    soft = feather(_checked(mask, pixels))
    h, w = pixels.shape[-2:]
    height, width = settings.target_size(h, w)
    out = torch.empty(
        (*pixels.shape[:2], height, width), memory_format=torch.channels_last, dtype=torch.float32
    )
    box = _box(soft, settings)
    restored, report = None, "mask: empty, so nothing was restored, only enlarged"
    if box is not None:
        restored, report = restore(box.cut(pixels))
        report = (
            f"mask: columns {box.left} to {box.right}, rows {box.top} to {box.bottom} "
            f"of {w}x{h} were restored\n{report}"
        )
    for n in range(len(pixels)):
        out[n] = resize(pixels[n : n + 1], (height, width))[0]
        if restored is None:
            continue
        weight = F.interpolate(soft[n % len(soft)][None], size=(height, width), mode="bilinear")[0]
        place = _enlarged(box, (h, w), (height, width), settings)
        place.cut(out[n]).lerp_(restored[n], place.cut(weight))
    return out, report


def feather(mask: Tensor) -> Tensor:
    """b 1 h w in [0, 1] -> the same with an edge that falls off outside; white stays white."""
    r = FEATHER // 2
    blurred = mask
    for _ in range(2):
        padded = F.pad(blurred, (r, r, r, r), mode="replicate")
        blurred = F.avg_pool2d(padded, 2 * r + 1, stride=1)
    # A straight edge is at one half after the blur: doubled, it starts at one.
    return torch.maximum(mask, (2 * blurred).clamp(0, 1))


def _checked(mask: Tensor, pixels: Tensor) -> Tensor:
    """The mask as b 1 h w float32 on the picture's device. Raises ValueError if it doesn't fit."""
    if mask.ndim == 2:
        mask = mask[None]
    b, (h, w) = len(pixels), pixels.shape[-2:]
    if mask.ndim != 3 or tuple(mask.shape[-2:]) != (h, w):
        size = "x".join(str(side) for side in reversed(mask.shape[-2:]))
        hint = (
            "; Load Image sends 64x64 for a picture without transparency: paint a mask in its "
            "mask editor, or unplug it"
            if tuple(mask.shape[-2:]) == (64, 64)
            else ", or scale the mask to the picture's size"
        )
        raise ValueError(f"The mask is {size}, the picture {w}x{h}: use a mask made for it{hint}.")
    if len(mask) not in (1, b):
        raise ValueError(
            f"There are {len(mask)} masks for {b} pictures: give one mask for all, or one each."
        )
    return torch.nan_to_num(mask.to(pixels.device, torch.float32)).clamp(0, 1)[:, None]


def _box(soft: Tensor, settings: Settings) -> Box | None:
    """The smallest part that holds every white pixel and its surroundings; None if all is black.

    Its edges lie where the enlarged picture has whole pixels too. Where there is no such place
    nearby, or opposite edges depend on each other, it is the whole picture.
    """
    h, w = soft.shape[-2:]
    white = (soft > 0).any(dim=0)[0]
    if not white.any():
        return None
    step = Fraction(settings.scale).limit_denominator(100).denominator
    if settings.seamless or abs(settings.scale * step - round(settings.scale * step)) > 1e-6:
        return Box(0, h, 0, w)

    def span(line: Tensor, length: int) -> tuple[int, int]:
        inside = torch.nonzero(line).flatten()
        first, last = int(inside[0]) - CONTEXT, int(inside[-1]) + 1 + CONTEXT
        return max(0, first // step * step), min(length, -(-last // step) * step)

    return Box(*span(white.any(dim=1), h), *span(white.any(dim=0), w))


def _enlarged(box: Box, size: tuple[int, int], target: tuple[int, int], settings: Settings) -> Box:
    """The same part in the enlarged picture."""

    def edges(first: int, last: int, side: int, full: int) -> tuple[int, int]:
        return round(first * settings.scale), full if last == side else round(last * settings.scale)

    return Box(
        *edges(box.top, box.bottom, size[0], target[0]),
        *edges(box.left, box.right, size[1], target[1]),
    )
