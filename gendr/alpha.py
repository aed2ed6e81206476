"""What comes in: checks that speak to the person, and transparency."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def check_image(image: Tensor) -> None:
    """ValueError with a remedy for what `restore` can't use."""
    if not isinstance(image, Tensor) or image.dim() != 4:
        shape = tuple(image.shape) if isinstance(image, Tensor) else type(image).__name__
        raise ValueError(f"a picture must be a tensor b c h w, got {shape}: add or move dimensions")
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


def split_alpha(image: Tensor) -> tuple[Tensor, Tensor | None]:
    """Colours and alpha (None where there is none)."""
    if image.shape[1] in (2, 4):
        return image[:, :-1], image[:, -1:]
    return image, None


def fill_transparent(colours: Tensor, alpha: Tensor) -> Tensor:
    """Give what can't be seen the colour of what lies around it, so that edges get no halo."""
    hidden = alpha <= 0
    if not bool(hidden.any()) or bool(hidden.all()):
        return colours
    # Means over ever larger cells of what can be seen; coarse ones fill what finer ones leave.
    weight = (~hidden).to(colours.dtype)
    sums = [(colours * weight, weight)]
    while max(sums[-1][1].shape[-2:]) > 1:
        sums.append(tuple(F.avg_pool2d(t, 2, ceil_mode=True) for t in sums[-1]))
    filled = None
    for value, share in reversed(sums):
        mean = value / share.clamp_min(1e-12)
        if filled is None:
            filled = mean
        else:
            coarse = F.interpolate(filled, scale_factor=2.0, mode="nearest")
            coarse = coarse[..., : share.shape[-2], : share.shape[-1]]
            filled = torch.where(share > 0, mean, coarse)
    return torch.where(hidden, filled, colours)
