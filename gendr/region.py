"""Restore only where a mask is white: which part to compute, and how to lay it over the rest."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from .report import Report
from .resizing import resize
from .settings import Settings
from .tiles import Box

# Pixels of the input: how far the soft edge reaches, and what the network sees beyond it.
FEATHER = 8
CONTEXT = 48
# And how far apart whole pixels of both pictures may lie, for a part of them to be taken.
LARGEST_STEP = 100
# A mask that rises by more than this over two pixels has a hard edge there.
HARD = 0.5


def restore_within(
    mask: Tensor,
    pixels: Tensor,
    settings: Settings,
    restore: Callable[[Tensor], tuple[Tensor, Report]],
) -> tuple[Tensor, Box | None, Report | None]:
    """Restored where the mask is white, plainly enlarged elsewhere.

    mask: h w, b h w or b 1 h w in [0, 1], one for all pictures or one each. pixels: b c h w.
    restore: restores a part of the pictures.
    Returns the pictures b c H W, the part that was restored and its report; both are None for a
    mask that is black.
    """
    soft = feather(_checked(mask, pixels))
    h, w = pixels.shape[-2:]
    height, width = settings.target_size(h, w)
    out = torch.empty(
        (*pixels.shape[:2], height, width), memory_format=torch.channels_last, dtype=torch.float32
    )
    box = _box(soft, settings)
    restored, report = (None, None) if box is None else restore(box.cut(pixels))
    for n in range(len(pixels)):
        out[n] = resize(pixels[n : n + 1], (height, width))[0]
        if box is None or restored is None:
            continue
        weight = F.interpolate(soft[n % len(soft)][None], size=(height, width), mode="bilinear")[0]
        place = _enlarged(box, (h, w), (height, width), settings)
        place.cut(out[n]).lerp_(restored[n], place.cut(weight))
    return out, box, report


def told(box: Box | None, width: int, height: int) -> str:
    """What a mask chose of a picture, for a report."""
    if box is None:
        return "mask: empty, so nothing was restored, only enlarged"
    return (
        f"mask: columns {box.left} to {box.right}, rows {box.top} to {box.bottom} "
        f"of {width}x{height} were restored"
    )


def feather(mask: Tensor) -> Tensor:
    """b 1 h w in [0, 1] -> the same, with hard edges that fall off outside.

    What the mask says is the weight: soft edges and gray areas stay as they are.
    """
    r = FEATHER // 2
    blurred = mask
    for _ in range(2):
        padded = F.pad(blurred, (r, r, r, r), mode="replicate")
        blurred = F.avg_pool2d(padded, 2 * r + 1, stride=1)
    # A straight edge is at one half of its height after the blur: doubled, it starts at all of it,
    # and nowhere rises above what it falls off from.
    fall = torch.minimum(2 * blurred, _widest(mask, 2 * r))
    step = _widest(mask, 1) + _widest(-mask, 1)
    near_a_hard_edge = _widest((step > HARD).to(mask), 2 * r) > 0
    return torch.where(near_a_hard_edge, torch.maximum(mask, fall), mask)


def _widest(mask: Tensor, reach: int) -> Tensor:
    """The largest value within so many pixels."""
    return F.max_pool2d(mask, 2 * reach + 1, stride=1, padding=reach)


def _checked(mask: Tensor, pixels: Tensor) -> Tensor:
    """The mask as b 1 h w float32 on the picture's device. Raises ValueError if it doesn't fit."""
    if not isinstance(mask, Tensor):
        raise ValueError(f"A mask must be a tensor h w or b h w, got {type(mask).__name__}.")
    if mask.ndim == 2:
        mask = mask[None]
    if mask.ndim == 4 and mask.shape[1] == 1:
        mask = mask[:, 0]
    b, (h, w) = len(pixels), pixels.shape[-2:]
    if mask.ndim != 3:
        raise ValueError(f"A mask must be h w or b h w, got {tuple(mask.shape)}.")
    if tuple(mask.shape[-2:]) != (h, w):
        size = "x".join(str(side) for side in reversed(mask.shape[-2:]))
        raise ValueError(
            f"The mask is {size}, the picture {w}x{h}: use a mask made for it, or scale the mask "
            "to the picture's size."
        )
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
    step = settings.factor(h, w).denominator
    if settings.seamless or settings.has_target or step > LARGEST_STEP:
        return Box(0, 0, h, w)

    def span(line: Tensor, length: int) -> tuple[int, int]:
        inside = torch.nonzero(line).flatten()
        first, last = int(inside[0]) - CONTEXT, int(inside[-1]) + 1 + CONTEXT
        return max(0, first // step * step), min(length, -(-last // step) * step)

    top, bottom = span(white.any(dim=1), h)
    left, right = span(white.any(dim=0), w)
    return Box(top, left, bottom, right)


def _enlarged(box: Box, size: tuple[int, int], target: tuple[int, int], settings: Settings) -> Box:
    """The same part in the enlarged picture."""

    factor = settings.factor(*size)

    def edges(first: int, last: int, side: int, full: int) -> tuple[int, int]:
        return int(first * factor), full if last == side else int(last * factor)

    top, bottom = edges(box.top, box.bottom, size[0], target[0])
    left, right = edges(box.left, box.right, size[1], target[1])
    return Box(top, left, bottom, right)
