"""`--mask FILE`: a picture that is white where the others are restored."""

from __future__ import annotations

from pathlib import Path

import torch.nn.functional as F
from torch import Tensor

from .. import pictures

# ITU-R BT.601.
LUMA = (0.299, 0.587, 0.114)


def read(path: Path, **options: object) -> Tensor:
    """h w in [0, 1]: how light the picture is, and black where it is transparent."""
    pixels = pictures.read(path, **options).pixels[0]
    colour = pixels[:-1] if len(pixels) in (2, 4) else pixels
    weights = colour.new_tensor(LUMA if len(colour) == 3 else (1.0,))[:, None, None]
    mask = (colour * weights).sum(0)
    return mask * pixels[-1] if len(pixels) in (2, 4) else mask


def fitted(mask: Tensor, height: int, width: int) -> Tensor:
    """The mask at this size. ValueError where its shape is another one."""
    h, w = mask.shape
    if (h, w) == (height, width):
        return mask
    # A side may be off by the rounding of one pixel.
    if abs(w * height - h * width) > max(height + h, width + w) / 2:
        raise ValueError(
            f"the mask is {w}x{h}, the picture {width}x{height}: use a mask of the same shape, of "
            "any size"
        )
    mode = "area" if h > height else "bilinear"
    return F.interpolate(mask[None, None], size=(height, width), mode=mode)[0, 0]
