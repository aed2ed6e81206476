"""How far a result is from its input, and how to bring it back. Pure functions, b c h w in [0, 1]."""

from __future__ import annotations

import math
from functools import lru_cache
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from .damage import LEVELS, Damage, measure
from .resizing import resize

# Back-projection stops when the reduced result is this close to the input, half an 8-bit step ...
CLOSE = 0.5 / 255
# ... or after this many rounds: one is exact but for what leaves [0, 1], and clipped highlights
# may never get there.
ROUNDS = 3

# A pixel of the input reduced from an enlargement depends on so many pixels to both sides; the
# inverse is computed in segments, and of that which lies further from one than the margin a share
# of 1e-5 would come in.
BAND, SEGMENT, MARGIN = 5, 256, 32

# Side of the windows, in pixels of the input, in which what the result has lost is told from damage.
TRUST_WINDOW = 7
# What coarse rounding by JPEG has changed shows as blocks and rings, and counts for more than noise of
# its energy; what fine rounding has changed shows less. The weight of the coarsest, and the
# quantisation of which it is half.
JPEG_WEIGHT, JPEG_HALF = 1.5, 0.2
# Up to the first blur (pixels) a picture counts as sharp; from the second on it says nothing of the
# detail.
SHARP, BLURRED = 0.6, 1.6
# What is added to the squares of the operator's values before it is inverted: just above scale 1 an
# enlargement between two pixels' centres has next to nothing of the finest pattern, and the exact
# inverse would raise its noise without bound.
DAMPING = 0.01
# The range in levels below which surroundings count as flat, and how far they reach, in pixels of
# the input: without JPEG, and into the next block with it.
FLAT, FLAT_REACH, FLAT_REACH_JPEG = 2.0, 2, 8


class Found(NamedTuple):
    """What was found in a picture, and how far its result was pulled towards it, on the average."""

    damage: Damage
    fidelity: float

    def __str__(self) -> str:
        return f"{self.damage}; fidelity {self.fidelity:.2f}"


def reduce(image: Tensor, size: tuple[int, int]) -> Tensor:
    """A result as its input would show it: antialiased bicubic to h x w."""
    return resize(image, size)


def back_project(result: Tensor, image: Tensor, share: float) -> Tensor:
    """Move a result b c H W towards one that, reduced to the input's size, is the input.

    share: 0 changes nothing, 1 goes all the way (to half an 8-bit step where the range allows), in
    between is the straight line. At the input's own size that is mixing with the input, at a
    smaller one with the reduced input.
    """
    if share == 0:
        return result
    image = _no_larger(image, result)
    return _project(result.float(), image, reduce(result, image.shape[-2:]), share)


def automatic(
    result: Tensor, image: Tensor, enlarged: Tensor, measured: tuple[Damage, Tensor] | None = None
) -> tuple[Tensor, Found]:
    """`back_project` as far as the input can be trusted, everywhere on its own; and what was found.

    result, enlarged: restored, and plainly enlarged, 1 c H W. image: 1 c h w. measured: its damage and
    noise where they are known, else `damage.measure` tells them. Where the input has no detail at all,
    the result is the enlarged input: white stays white.
    """
    image = _no_larger(image, result)
    damage, noise = measure(image) if measured is None else measured
    if noise.shape[-2:] != image.shape[-2:]:
        noise = F.interpolate(noise, size=tuple(image.shape[-2:]), mode="area")
    reduced = reduce(result, image.shape[-2:])
    share = trust(image, reduced, damage, noise)
    result = _project(result.float(), image, reduced, share)
    plain = flat(image, damage)
    if bool((plain > 0).any()):
        size = tuple(result.shape[-2:])
        weight = F.interpolate(plain, size=size, mode="bilinear")
        result = torch.lerp(result, enlarged.float(), weight)
    return result, Found(damage, float(share.mean()))


def _no_larger(image: Tensor, result: Tensor) -> Tensor:
    """The input, reduced to a result that is smaller."""
    (h, w), (height, width) = image.shape[-2:], result.shape[-2:]
    return reduce(image, (height, width)) if height < h or width < w else image.float()


def _project(result: Tensor, image: Tensor, reduced: Tensor, share: float | Tensor) -> Tensor:
    """`back_project` by a share for all or a map b 1 h w, for an input no larger than the result.

    reduced: the result at the input's size.
    """
    size, small = tuple(result.shape[-2:]), tuple(image.shape[-2:])
    if size == small:
        return result + share * (image - result)
    wanted = reduced + share * (image - reduced)
    for n in range(ROUNDS):
        error = wanted - (reduce(result, small) if n else reduced)
        if float(error.abs().max()) <= CLOSE:
            break
        correction = enlarge(unreduced(error, size), size)
        result = correction.add_(result).clamp_(0, 1)
    return result


def enlarge(values: Tensor, size: tuple[int, int]) -> Tensor:
    """Bicubic with the smooth kernel of `reduce`, of values of any range: b c h w -> b c H W."""
    return F.interpolate(values, size=tuple(size), mode="bicubic", antialias=True)


def unreduced(values: Tensor, size: tuple[int, int]) -> Tensor:
    """What must be enlarged to `size`, so that reduced again it is these values: b c h w -> b c h w."""
    values = _solve(values, size[0])
    return _solve(values.transpose(-2, -1), size[1]).transpose(-2, -1)


def _solve(values: Tensor, larger: int) -> Tensor:
    """`unreduced` along the rows' dimension."""
    parts = []
    for start, end, matrix in _inverse(values.shape[-2], larger):
        parts.append(matrix.to(values) @ values[..., start:end, :])
    return torch.cat(parts, dim=-2)


@lru_cache(maxsize=16)
def _inverse(length: int, larger: int) -> list[tuple[int, int, Tensor]]:
    """The inverse of reducing an enlargement, along one side: for each segment of the result, which
    values it depends on (start, end), and the matrix.

    The operator is read off from combs whose teeth are too far apart to meet.
    """
    teeth = 2 * BAND + 1
    place = torch.arange(length)
    combs = (place[:, None] % teeth == torch.arange(teeth)).double()
    there = F.interpolate(combs[None, None], (larger, teeth), mode="bicubic", antialias=True)
    back = F.interpolate(there, (length, teeth), mode="bicubic", antialias=True)[0, 0]
    found = []
    for first in range(0, length, SEGMENT):
        last = min(length, first + SEGMENT)
        start, end = max(0, first - MARGIN), min(length, last + MARGIN)
        rows, columns = place[start:end, None], place[None, start:end]
        near = (rows - columns).abs() <= BAND
        operator = torch.where(near, back[rows, columns % teeth], 0.0)
        damped = operator.T @ operator + DAMPING * torch.eye(end - start, dtype=torch.float64)
        inverse = torch.linalg.solve(damped, operator.T)[first - start : last - start]
        found.append((start, end, inverse.float()))
    return found


def trust(image: Tensor, result: Tensor, damage: Damage, noise: Tensor) -> Tensor:
    """How far the input can be trusted against a result, for `back_project`: 1 1 h w in [0, 1].

    image: 1 c h w. result: the same picture restored, reduced to the input's size. damage, noise:
    what `damage.measure` found in the input.

    Where both differ by no more than the input's damage, it is the damage that the result has lost;
    what exceeds it is detail. Of a difference of mean square E and damage of variance V the share
    (E - V) / E is detail: Wiener's filter. Clean pictures are trusted everywhere, noisy and
    compressed ones where there is structure. A blurred picture says nothing of the detail that a
    result shows.
    """
    difference = ((image.float() - result.float()) * LEVELS).square().mean(1, keepdim=True)
    energy = box(difference, TRUST_WINDOW)
    coarse = damage.quantisation / (damage.quantisation + JPEG_HALF)
    variance = noise.square() + (JPEG_WEIGHT * coarse * damage.compression) ** 2
    share = (1 - variance / energy.clamp(min=1e-6)).clamp(0, 1)
    return box(share, 3) * sharpness(damage.blur)


def sharpness(blur: float) -> float:
    """How much a picture of such blur says of its detail: 1 for a sharp one, falling to 0."""
    return min(1.0, max(0.0, (BLURRED - blur) / (BLURRED - SHARP)))


def flat(image: Tensor, damage: Damage) -> Tensor:
    """Where a picture has no detail at all, so that a result may have none: 1 c h w -> 1 1 h w in [0, 1]."""
    reach = FLAT_REACH_JPEG if damage.quantisation else FLAT_REACH
    edged = F.pad(image.float(), (reach,) * 4, mode="replicate")
    highest = F.max_pool2d(edged, 2 * reach + 1, stride=1)
    lowest = -F.max_pool2d(-edged, 2 * reach + 1, stride=1)
    extent = (highest - lowest).amax(1, keepdim=True) * LEVELS
    return (1 - extent / FLAT).clamp(0, 1)


def box(values: Tensor, side: int) -> Tensor:
    """Means over side x side windows, edges replicated."""
    return F.avg_pool2d(F.pad(values, (side // 2,) * 4, mode="replicate"), side, stride=1)


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
