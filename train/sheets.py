"""Pictures side by side in one file: what a run is looked at by."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image
from torch import Tensor

from train.atomic import replacing

GREY = 128


def eight_bit(pictures: Tensor) -> list[np.ndarray]:
    """b 3 h w in [-1, 1] -> a list of uint8 h w 3; what isn't a number is black."""
    values = pictures.detach().float().cpu().nan_to_num(nan=-1.0).add(1).mul(127.5)
    array = values.round().clamp(0, 255).byte().permute(0, 2, 3, 1).numpy()
    return list(np.ascontiguousarray(array))


def write_sheet(
    path: Path, rows: Sequence[Sequence[np.ndarray | None]], *, side: int | None = None
) -> None:
    """Rows of pictures, uint8 h w 3, as a PNG; None is a grey field.

    All are cut to the smallest height and width among them, and to `side` pixels, from the top left.
    """
    sizes = [p.shape[:2] for row in rows for p in row if p is not None]
    height, width = (min(s[axis] for s in sizes) for axis in (0, 1))
    if side:
        height, width = min(height, side), min(width, side)
    blank = np.full((height, width, 3), GREY, np.uint8)
    whole = np.concatenate([
        np.concatenate([blank if p is None else p[:height, :width] for p in row], 1)
        for row in rows
    ])  # fmt: skip
    with replacing(path) as part:
        Image.fromarray(whole).save(part, format="PNG")
