"""How large the result shall be: the choices of the node, and what they are in the library."""

from __future__ import annotations

from fractions import Fraction
from typing import Any

# The first is the default, and what graphs saved before there was a choice mean.
SIZES = ("scale", "long side", "short side", "megapixels", "width and height")


def target(
    size_by: str,
    *,
    picture: tuple[int, int],
    scale: float,
    side: int,
    megapixels: float,
    width: int,
    height: int,
) -> dict[str, Any]:
    """The field of `Settings` that says it, for a picture h x w. Raises ValueError for other words.

    width and height are a frame: the picture fits inside and keeps its shape, and touches two of
    the frame's edges.
    """
    if size_by == "width and height":
        h, w = picture
        if min(width, height) < 1:
            raise ValueError(f"width and height must be at least 1, got {width}x{height}")
        # The side that meets the frame first is met exactly; as a factor it could miss by rounding.
        length, meets = (width, w) if Fraction(width, w) <= Fraction(height, h) else (height, h)
        return {"long_side" if meets == max(h, w) else "short_side": length}
    choices = {
        "scale": {"scale": scale},
        "long side": {"long_side": side},
        "short side": {"short_side": side},
        "megapixels": {"megapixels": megapixels},
    }
    if size_by not in choices:
        raise ValueError(f"size by must be one of {', '.join(SIZES)}, got {size_by!r}")
    return choices[size_by]
