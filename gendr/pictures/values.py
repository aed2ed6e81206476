"""Stored numbers to the range [0, 1]: which value is white, and what to do with the rest."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

# Floating-point pictures have white at 1. Values above it are highlights, up to about this; far
# above, the numbers are those of an integer format.
HIGHLIGHTS = 16.0
SHARE = 0.25  # of a picture that may be highlights
ROUNDING = 2.0**-17  # above 1, and still the white of 16 bits


class Samples(NamedTuple):
    """A decoded picture.

    values: h w c, from 0 to `white`; c is 1 grey, 2 grey and alpha, 3 RGB, 4 RGBA.
    bits: of a channel in the file.
    converted: whether the colours were converted to sRGB, so that the file's profile has served.
    upright: whether the orientation has been applied already.
    """

    values: np.ndarray
    white: float
    bits: int
    converted: bool = False
    upright: bool = False


def unsigned(values: np.ndarray, bits: int, notes: list[str]) -> tuple[np.ndarray, float]:
    """Unsigned integers and their white: 2^bits - 1, or for more than 16 bits what fits them."""
    white = 2.0**bits - 1
    if bits > 16:
        peak = float(values.max())
        white = 65535.0 if peak <= 65535 else white
        notes.append(f"{bits}-bit values, of up to {peak:g}, were divided by {white:.0f}")
        return (values / white).astype(np.float32), 1.0
    return values, white


def signed(values: np.ndarray, bits: int, notes: list[str]) -> tuple[np.ndarray, float]:
    """Signed integers: black is 0, or the lowest number where some lie below 0."""
    low = float(values.min())
    top = 2.0 ** (bits - 1) - 1
    if low < 0:
        notes.append(
            f"signed {bits}-bit values, from {low:g}: {-top - 1:.0f} was read as black and "
            f"{top:.0f} as white"
        )
        return ((values + (top + 1)) / (2 * top + 1)).astype(np.float32), 1.0
    if bits > 16:
        peak = float(values.max())
        top = 65535.0 if peak <= 65535 else top
        notes.append(f"{bits}-bit values, of up to {peak:g}, were divided by {top:.0f}")
        return (values / top).astype(np.float32), 1.0
    notes.append(f"signed {bits}-bit values: {top:.0f} was read as white")
    return values.astype(np.float32), top


def floating(
    values: np.ndarray, notes: list[str], colours: int | None = None
) -> tuple[np.ndarray, float]:
    """Floating-point values, h w c, the first `colours` channels of which are not alpha.

    White is 1, as is usual; highlights above are clipped, and a note says so. Where more than
    highlights lie above 1, it cannot be white: the largest value is. Where most lie far above, they
    are the numbers of an 8 or 16-bit picture, or of a wider one.
    """
    if not np.isfinite(values).all():
        notes.append("values that are no numbers were read as 0")
        values = np.nan_to_num(values, nan=0.0, posinf=0.0, neginf=0.0)
    shown = values[..., :colours]
    peak, low = float(shown.max()), float(shown.min())
    white = 1.0
    if peak > HIGHLIGHTS and float(np.median(shown[shown > 0])) > 1:
        white = next((w for w in (255.0, 65535.0, 2.0**31 - 1, 2.0**32 - 1) if peak <= w), peak)
        notes.append(f"floating-point values, of up to {peak:g}, were divided by {white:.0f}")
    elif peak > 1 + ROUNDING:
        share = float((shown > 1).mean())
        if share > SHARE:
            white = peak
            notes.append(f"floating-point values, of up to {peak:g}, were divided by {peak:g}")
        else:
            notes.append(
                f"floating-point values, of up to {peak:g}: the {share:.1%} above 1 are white"
            )
    if low < 0:
        notes.append(f"floating-point values, from {low:g}: those below 0 are black")
    values = np.clip(values, 0, white).astype(np.float32)
    if colours is not None and white != 1 and float(values[..., colours:].max(initial=0)) <= 1:
        values[..., colours:] *= white  # alpha has a range of its own
    return values, white


def keyed(values: np.ndarray, key: object) -> np.ndarray:
    """Alpha from the one colour that a file names as transparent; without one, the values."""
    if key is None or isinstance(key, bytes) or values.shape[-1] not in (1, 3):
        return values
    shown = (values != np.asarray(key).astype(values.dtype)).any(-1, keepdims=True)
    return np.concatenate([values, shown * values.dtype.type(np.iinfo(values.dtype).max)], -1)


def divided_by_alpha(values: np.ndarray, white: float) -> np.ndarray:
    """Undo the multiplication by alpha, h w c; integers are rounded, and nothing exceeds white."""
    alpha = values[..., -1:].astype(np.float32)
    colour = values[..., :-1] * (white / np.maximum(alpha, 1e-12 if white == 1 else 1))
    whole = np.issubdtype(values.dtype, np.integer)
    out = values.copy()
    out[..., :-1] = np.minimum(colour + 0.5 if whole else colour, white)
    return out
