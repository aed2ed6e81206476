"""What comes in: checks that speak to the person, and transparency."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

# A little beyond [0, 1] is rounding or a filter's overshoot; beyond this the range is another one.
OVERSHOOT = 0.5
# A pixel with less than this share of its surroundings' alpha shows more by its colour in the edge
# beside it than by itself; and how far, in pixels, surroundings reach: as far as the network and the
# colour fix carry an edge.
FAINT, AROUND = 1 / 8, 16


def check_image(image: Tensor) -> None:
    """ValueError with a remedy for what `restore` can't use."""
    if not isinstance(image, Tensor) or image.dim() != 4:
        shape = tuple(image.shape) if isinstance(image, Tensor) else type(image).__name__
        raise ValueError(f"a picture must be a tensor b c h w, got {shape}: add or move dimensions")
    if image.is_meta or image.layout is not torch.strided:
        raise ValueError("the picture is a tensor without its numbers, or sparse: give a plain one")
    b, c, h, w = image.shape
    if b == 0:
        raise ValueError("the batch is empty: nothing came from the input before this step")
    if h == 0 or w == 0:
        raise ValueError(f"the picture is empty ({w}x{h} pixels): check the crop or mask before it")
    if not 1 <= c <= 4:
        raise ValueError(
            f"a picture has 1 (grey), 2 (grey, alpha), 3 or 4 channels, got {c}: the order must be "
            "b c h w, not b h w c"
        )
    if not image.is_floating_point():
        raise ValueError(
            f"values must be floats in [0, 1], got {image.dtype}: divide 8-bit values by 255"
        )
    bad = int((~torch.isfinite(image)).sum())
    if bad:
        raise ValueError(
            f"the picture has {bad} values that are NaN or infinite: mend the step before it, or "
            "pass image.nan_to_num()"
        )


def out_of_range(image: Tensor) -> list[str]:
    """What to tell about a picture whose values have another range than [0, 1], and are clipped."""
    low, high = (float(value) for value in torch.aminmax(image.float()))
    if low >= -OVERSHOOT and high <= 1 + OVERSHOOT:
        return []
    return [
        f"values from {low:.4g} to {high:.4g} were clipped to 0 to 1: divide 8-bit values by 255, and "
        "bring -1 to 1 to 0 to 1"
    ]


def split_alpha(image: Tensor) -> tuple[Tensor, Tensor | None]:
    """Colours and alpha (None where there is none)."""
    if image.shape[1] in (2, 4):
        return image[:, :-1], image[:, -1:]
    return image, None


def fill_transparent(colours: Tensor, alpha: Tensor) -> Tensor:
    """Give what can't be seen the colour of what lies around it, so that edges get no halo.

    colours: b c h w. alpha: b 1 h w in [0, 1]. Where a pixel is nearly invisible beside its
    surroundings, the more of its own colour stays the more can be seen of it.
    """
    share = visibility(alpha)
    seen = share >= 1
    if bool(seen.all()) or not bool(seen.any()):
        return colours
    # Means over ever larger cells of what can be seen; coarse ones fill what finer ones leave.
    weight = (alpha * seen).to(colours.dtype)
    sums = [(colours * weight, weight)]
    while max(sums[-1][1].shape[-2:]) > 1:
        sums.append(tuple(F.avg_pool2d(t, 2, ceil_mode=True) for t in sums[-1]))
    filled = None
    for value, total in reversed(sums):
        mean = value / total.clamp_min(1e-12)
        if filled is None:
            filled = mean
        else:
            coarse = F.interpolate(filled, scale_factor=2.0, mode="nearest")
            coarse = coarse[..., : total.shape[-2], : total.shape[-1]]
            filled = torch.where(total > 0, mean, coarse)
    return torch.where(seen, colours, torch.lerp(filled, colours, share.to(colours.dtype)))


def visibility(alpha: Tensor) -> Tensor:
    """How much of its own colour a pixel keeps: b 1 h w in [0, 1].

    1 for whatever has at least `FAINT` of the largest alpha within `AROUND` pixels, 0 for alpha 0.
    Below that it falls with the square, which leaves less than a twentieth of a colour's change to be
    seen, and hardly anything of an edge. Relative, so that a picture that is faint as a whole is left alone.
    """
    most = alpha
    for kernel in ((2 * AROUND + 1, 1), (1, 2 * AROUND + 1)):
        most = F.max_pool2d(most, kernel, stride=1, padding=tuple(n // 2 for n in kernel))
    return (alpha / (FAINT * most).clamp_min(1e-12)).clamp(max=1).square()
