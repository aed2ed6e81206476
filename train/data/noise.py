"""Camera noise of the degradations: normal and Poisson, in colour or the same in the three channels."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import torch

from train.data.draws import Draws


@dataclass(frozen=True, kw_only=True)
class Noise:
    """Gaussian (sigma in 1/255) or Poisson noise; either may be the same in the three channels."""

    gaussian: float = 0.5
    sigma: tuple[float, float]
    poisson: tuple[float, float]
    grey: float = 0.4


def _poisson(rng: np.random.Generator, mean: np.ndarray) -> np.ndarray:
    """Poisson counts, float32. Below 4 exact; above, the second-order Cornish-Fisher expansion,
    which has the right mean, variance and skewness and costs a normal draw (the exact one: ten
    times that)."""
    z = rng.standard_normal(mean.shape, dtype=np.float32)
    counts = np.rint(mean + np.sqrt(mean) * z + (z * z - 1) / 6)
    low = mean < 4
    if low.any():
        counts[low] = rng.poisson(mean[low])
    return np.maximum(counts, 0, out=counts)


def gaussian_noise(
    x: torch.Tensor, sigma: float, grey: bool, rng: np.random.Generator
) -> torch.Tensor:
    """Add normal noise of `sigma`/255 to `c h w`; not clamped."""
    shape = (1, *x.shape[1:]) if grey else tuple(x.shape)
    return x + torch.from_numpy(rng.standard_normal(shape, dtype=np.float32)) * (sigma / 255)


def poisson_noise(
    x: torch.Tensor, strength: float, grey: bool, rng: np.random.Generator
) -> torch.Tensor:
    """Add shot noise to `c h w` in [0,1]; the light level is the power of two, at least 2, that
    holds the picture's distinct values, as in Real-ESRGAN; not clamped."""
    clean = (x * 255).round().clamp(0, 255).to(torch.uint8)
    if grey:
        weights = torch.tensor([0.2989, 0.5870, 0.1140])[:, None, None]
        clean = (clean.float() * weights).sum(0, keepdim=True).round().to(torch.uint8)
    levels = int(np.count_nonzero(np.bincount(clean.numpy().ravel(), minlength=256)))
    light = float(2 ** math.ceil(math.log2(max(levels, 2))))
    base = clean.numpy().astype(np.float32) / 255
    return x + torch.from_numpy((_poisson(rng, base * light) / light - base) * np.float32(strength))


def noised(x: torch.Tensor, table: Noise, draws: Draws) -> torch.Tensor:
    """`c h w` in [0,1] with one kind of noise, clamped to [0,1]."""
    if draws.chance(table.gaussian):
        sigma, grey = draws.uniform(table.sigma), draws.chance(table.grey)
        draws.note(f"gauss {sigma:.1f}{' grey' if grey else ''}")
        x = gaussian_noise(x, sigma, grey, draws.rng)
    else:
        strength, grey = draws.uniform(table.poisson), draws.chance(table.grey)
        draws.note(f"poisson {strength:.2f}{' grey' if grey else ''}")
        x = poisson_noise(x.clamp(0, 1), strength, grey, draws.rng)
    return x.clamp_(0, 1)
