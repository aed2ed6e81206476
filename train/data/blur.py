"""Blur kernels of the degradations (Real-ESRGAN, section 3.2), how one is drawn, and the blur itself."""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F

from train.data.draws import Draws


@dataclass(frozen=True, kw_only=True)
class Kernels:
    """Blur kernels: odd side, share of sinc filters, kinds of the others, and their parameters."""

    sides: tuple[int, int] = (7, 21)
    sinc: float = 0.1
    kinds: tuple[tuple[str, float], ...] = (
        ("iso", 0.45),
        ("aniso", 0.25),
        ("generalised_iso", 0.12),
        ("generalised_aniso", 0.03),
        ("plateau_iso", 0.12),
        ("plateau_aniso", 0.03),
    )
    sigma: tuple[float, float]
    beta_generalised: tuple[float, float] = (0.5, 4.0)
    beta_plateau: tuple[float, float] = (1.0, 2.0)


def gaussian_kernel(
    side: int,
    sigma_x: float,
    sigma_y: float | None = None,
    angle: float = 0.0,
    kind: str = "gaussian",
    beta: float = 1.0,
) -> np.ndarray:
    """`side side` float64 kernel that sums to 1, from q = x' S^-1 x with S the rotated covariance.

    gaussian exp(-q/2), generalised exp(-q^beta / 2), plateau 1 / (1 + q^beta). Real-ESRGAN, section
    3.2.
    """
    sigma_y = sigma_x if sigma_y is None else sigma_y
    at = np.arange(side, dtype=np.float64) - side // 2
    x, y = at[None, :], at[:, None]
    cos, sin = math.cos(angle), math.sin(angle)
    q = ((cos * x + sin * y) / sigma_x) ** 2 + ((cos * y - sin * x) / sigma_y) ** 2
    if kind == "gaussian":
        kernel = np.exp(-q / 2)
    elif kind == "generalised":
        kernel = np.exp(-(q**beta) / 2)
    elif kind == "plateau":
        kernel = 1 / (1 + q**beta)
    else:
        raise ValueError(f"unknown kernel {kind!r}: use gaussian, generalised or plateau")
    return kernel / kernel.sum()


def sinc_kernel(side: int, omega: float) -> np.ndarray:
    """`side side` float64 kernel, sum 1: circular low pass to `omega` radians per pixel."""
    at = np.arange(side, dtype=np.float64) - side // 2
    r = np.hypot(at[None, :], at[:, None])
    r[side // 2, side // 2] = 1.0
    kernel = (
        omega / (2 * math.pi * r) * torch.special.bessel_j1(torch.from_numpy(omega * r)).numpy()
    )
    kernel[side // 2, side // 2] = omega**2 / (4 * math.pi)
    return kernel / kernel.sum()


def draw_side(draws: Draws, sides: tuple[int, int]) -> int:
    """An odd kernel size between two odd ones."""
    return 2 * int(draws.rng.integers(sides[0] // 2, sides[1] // 2 + 1)) + 1


def _beta(draws: Draws, bounds: tuple[float, float]) -> float:
    # half of the draws below 1 (heavier tails), half above; a range that starts at 1 gives 1 for
    # them
    low, high = bounds
    return draws.uniform((low, 1.0) if draws.chance(0.5) else (1.0, high))


def draw_kernel(draws: Draws, table: Kernels) -> np.ndarray:
    """One blur kernel of a stage."""
    side = draw_side(draws, table.sides)
    if draws.chance(table.sinc):
        omega = draws.uniform((math.pi / 3 if side < 13 else math.pi / 5, math.pi))
        draws.note(f"sinc {side} {omega:.2f}")
        return sinc_kernel(side, omega)
    kind = draws.pick(table.kinds)
    sigma_x = draws.uniform(table.sigma)
    sigma_y, angle = sigma_x, 0.0
    if kind.endswith("aniso"):
        sigma_y, angle = draws.uniform(table.sigma), draws.uniform((-math.pi, math.pi))
    draws.note(f"{kind} {side} {sigma_x:.2f}" + (f"/{sigma_y:.2f}" if angle else ""))
    if kind.startswith("generalised"):
        beta = _beta(draws, table.beta_generalised)
        return gaussian_kernel(side, sigma_x, sigma_y, angle, "generalised", beta)
    if kind.startswith("plateau"):
        beta = _beta(draws, table.beta_plateau)
        return gaussian_kernel(side, sigma_x, sigma_y, angle, "plateau", beta)
    return gaussian_kernel(side, sigma_x, sigma_y, angle)


@functools.cache
def _fast_length(n: int) -> int:
    """The next even length with no prime factor above 5: the transform is quick there."""
    while True:
        n += n % 2
        rest = n
        for p in (2, 3, 5):
            while rest % p == 0:
                rest //= p
        if rest == 1:
            return n
        n += 2


def blur(x: torch.Tensor, kernel: np.ndarray) -> torch.Tensor:
    """Filter `c h w` float32 with a point-symmetric kernel; mirrored borders, same size out."""
    h, w = x.shape[-2:]
    reach = kernel.shape[0] // 2
    padded = x[None]
    for axis in (3, 2):  # mirrored by at most size - 1 pixels at a time: pictures may be tiny here
        need = reach
        while need:
            step = min(need, padded.shape[axis] - 1)
            if step == 0:
                step, mode = need, "replicate"
            else:
                mode = "reflect"
            pad = (step, step, 0, 0) if axis == 3 else (0, 0, step, step)
            padded = F.pad(padded, pad, mode=mode)
            need -= step
    size = [_fast_length(n) for n in padded.shape[-2:]]
    spectrum = torch.fft.rfft2(padded[0], s=size)
    spectrum *= torch.fft.rfft2(torch.from_numpy(kernel.astype(np.float32)), s=size)
    top = 2 * reach
    return torch.fft.irfft2(spectrum, s=size)[:, top : top + h, top : top + w]
