"""Metrics computed here: what each one says, and the formula. Pictures are uint8 `h w 3`, sRGB.

Everything a paper usually takes from pyiqa follows pyiqa's conventions, so that numbers compare:
8-bit values, BT.601 luma in 16..235, no border shaved (`judges.py` asks pyiqa itself for the
learned metrics). The fidelity metrics need no reference: they compare the result, reduced to the
input's size, with the input, and so tell what a restoration invented or shifted.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from PIL import Image

from gendr import color

# Added to every mean squared error, as pyiqa does: identical pictures get 80 dB, not infinity.
MSE_FLOOR = 255.0**2 * 1e-8
LUMA = np.array([65.481, 128.553, 24.966])
# Picture sides further apart than this share are another scale, not another way of cropping.
CROP_TOLERANCE = 1 / 8
# Cells per side when colours are compared without their detail.
DRIFT_CELLS = 8


@dataclass(frozen=True)
class Metric:
    """One row of the report. `better` is "higher", "lower" or "one" (the nearer to 1 the better)."""

    name: str
    label: str
    better: str
    group: str
    digits: int
    meaning: str
    # Part of the stored values' key: a changed definition must not be mixed with older values.
    version: str = "1"

    @property
    def key(self) -> str:
        return f"{self.name}/{self.version}"


REFERENCE, ALONE, INPUT, COST = "reference", "alone", "input", "cost"
GROUPS = {
    REFERENCE: "Against the reference",
    ALONE: "Without a reference",
    INPUT: "Fidelity to the input",
    COST: "Cost on this machine",
}

NATIVE = (
    Metric(
        "psnr", "PSNR", "higher", REFERENCE, 2,
        "dB; BT.601 luma (16..235), 8-bit scale, not rounded, no border shaved",
    ),
    Metric(
        "ssim", "SSIM", "higher", REFERENCE, 4,
        "the same luma rounded, 11x11 Gaussian of sigma 1.5, valid region, "
        "negative contrast-structure set to 0",
    ),
    Metric(
        "sharp", "Sharpness ratio", "one", REFERENCE, 3,
        "mean gradient magnitude of luma, result / reference: below 1 is blur, above 1 is invented",
    ),
    Metric(
        "lr_psnr", "Reduced PSNR", "higher", INPUT, 2,
        "dB; RGB of the result reduced to the input's size (antialiased bicubic) against the input",
    ),
    Metric(
        "lr_delta_e", "Reduced ΔE", "lower", INPUT, 2,
        "mean CIE76 colour difference between the reduced result and the input; 2.3 is just visible",
    ),
    Metric(
        "drift", "Colour drift", "lower", INPUT, 2,
        f"the same after averaging both over {DRIFT_CELLS}x{DRIFT_CELLS} cells: "
        "casts and patches, no detail",
    ),
    Metric(
        "seam", "Seam score", "one", INPUT, 2,
        "gradient energy across the tiles' borders / near them: 1 is invisible; an edge of the "
        "picture that lies along a border counts too",
    ),
)  # fmt: skip


class Mismatch(ValueError):
    """Two pictures that can't be compared; the message names both sizes."""


def luma(rgb: np.ndarray) -> np.ndarray:
    """BT.601 "studio" Y, 16..235, float64, not rounded."""
    return rgb.astype(np.float64) @ LUMA / 255.0 + 16.0


def size(picture: np.ndarray) -> str:
    """Width x height, as people say it."""
    return f"{picture.shape[1]}x{picture.shape[0]}"


def crop_common(a: np.ndarray, b: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Both cut to their common top-left part, the convention of InvSR's evaluation.

    Raises Mismatch where the sizes are too far apart to be the same picture at the same scale.
    """
    h, w = min(a.shape[0], b.shape[0]), min(a.shape[1], b.shape[1])
    for small, large in ((h, max(a.shape[0], b.shape[0])), (w, max(a.shape[1], b.shape[1]))):
        if large - small > max(1, large * CROP_TOLERANCE):
            raise Mismatch(
                f"result is {size(a)} but the reference is {size(b)}: not the same scale"
            )
    return a[:h, :w], b[:h, :w]


def psnr(a: np.ndarray, b: np.ndarray) -> float:
    """Peak signal-to-noise ratio on the 8-bit scale, dB."""
    error = a.astype(np.float64)
    error -= b
    return 10.0 * math.log10(255.0**2 / (float(np.mean(error * error)) + MSE_FLOOR))


def ssim(a: np.ndarray, b: np.ndarray) -> float | None:
    """Mean structural similarity of two luma planes, None below 11x11 (Wang et al. 2004).

    Rounded luma and a contrast-structure term of at least zero are pyiqa's choices; BasicSR's
    differ by up to 0.005 on one picture.
    """
    if min(a.shape) < 11:
        return None
    a, b = np.round(a), np.round(b)
    taps = np.exp(-(np.arange(-5, 6) ** 2) / (2 * 1.5**2))
    taps /= taps.sum()

    def window(plane: np.ndarray) -> np.ndarray:
        for axis in (0, 1):
            length = plane.shape[axis] - 10
            shifted = (np.moveaxis(plane, axis, 0)[k : k + length] for k in range(11))
            plane = np.moveaxis(sum(t * p for t, p in zip(taps, shifted, strict=True)), 0, axis)
        return plane

    c1, c2 = (0.01 * 255) ** 2, (0.03 * 255) ** 2
    mean_a, mean_b = window(a), window(b)
    luminance = (2 * mean_a * mean_b + c1) / (mean_a**2 + mean_b**2 + c1)
    covariance = window(a * b) - mean_a * mean_b
    spread = window(a * a) - mean_a**2 + window(b * b) - mean_b**2
    structure = np.maximum((2 * covariance + c2) / (spread + c2), 0)
    return float((luminance * structure).mean())


def gradient(y: np.ndarray) -> float:
    """Mean gradient magnitude of a plane, 0 for one that is too thin to have any."""
    if min(y.shape) < 2:
        return 0.0
    gy, gx = np.gradient(y)
    return float(np.hypot(gy, gx).mean())


def reduce_to(result: np.ndarray, height: int, width: int) -> np.ndarray:
    """Antialiased bicubic reduction with Pillow, the usual way low-resolution pictures are made."""
    if result.shape[:2] == (height, width):
        return result
    return np.asarray(Image.fromarray(result).resize((width, height), Image.Resampling.BICUBIC))


def as_tensor(rgb: np.ndarray) -> torch.Tensor:
    """h w 3 in 0..255 -> float32 1 3 h w in [0, 1]."""
    return torch.tensor(rgb).permute(2, 0, 1)[None].float() / 255.0


def against_reference(
    result: np.ndarray, reference: np.ndarray
) -> tuple[dict[str, Any], list[str]]:
    """PSNR, SSIM and sharpness by name, and notes. Raises Mismatch. None = not defined here."""
    a, b = crop_common(result, reference)
    notes = []
    if result.shape != reference.shape:
        notes.append(
            f"result {size(result)} and reference {size(reference)} differ: "
            f"both cropped to their top-left {size(a)}"
        )
    ya, yb = luma(a), luma(b)
    base = gradient(yb)
    values = {
        "psnr": psnr(ya, yb),
        "ssim": ssim(ya, yb),
        "sharp": gradient(ya) / base if base > 1e-6 else None,
    }
    return values, notes


def cells(picture: np.ndarray, most: int = DRIFT_CELLS) -> np.ndarray:
    """Mean colour of each of at most `most` x `most` equal cells: h w 3 -> float64."""
    plane = picture.astype(np.float64)
    for axis in (0, 1):
        side = plane.shape[axis]
        edges = np.linspace(0, side, min(side, most) + 1).round().astype(int)
        shape = [1, 1, 1]
        shape[axis] = -1
        plane = np.add.reduceat(plane, edges[:-1], axis) / np.diff(edges).reshape(shape)
    return plane


def against_input(result: np.ndarray, source: np.ndarray) -> tuple[dict[str, Any], list[str]]:
    """Fidelity metrics by name, and notes. None where the result is smaller than the input."""
    (h, w), (height, width) = source.shape[:2], result.shape[:2]
    if height < h or width < w:
        note = (
            f"result {size(result)} is smaller than the input {size(source)}: no fidelity metrics"
        )
        return dict.fromkeys(("lr_psnr", "lr_delta_e", "drift")), [note]
    notes = []
    # More than one input pixel off means that the result was cropped or stretched.
    if abs(height / h - width / w) * min(h, w) > max(height / h, width / w):
        notes.append(
            f"result {size(result)} and input {size(source)} have different aspect ratios: "
            "fidelity compares stretched pictures"
        )
    reduced = reduce_to(result, h, w)
    x, y = as_tensor(reduced), as_tensor(source)
    coarse = (as_tensor(cells(p)) for p in (reduced, source))
    values = {
        "lr_psnr": psnr(reduced, source),
        "lr_delta_e": float(color.delta_e(x, y).mean()),
        "drift": float(color.delta_e(*coarse).mean()),
    }
    return values, notes
