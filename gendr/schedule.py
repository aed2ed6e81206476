"""The noise schedule and the conversions between eps, v and x0: pure formulas, shared with training."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

Prediction = Literal["epsilon", "v_prediction"]

# Stable Diffusion's scaled-linear schedule.
STEPS, BETA_START, BETA_END = 1000, 0.00085, 0.012


def alpha_bar(t: int | Tensor) -> Tensor:
    """Signal level sqrt(cumulative alpha) at timestep t (0..999), float64."""
    betas = torch.linspace(BETA_START**0.5, BETA_END**0.5, STEPS, dtype=torch.float64) ** 2
    table = torch.cumprod(1 - betas, 0).sqrt()
    t = torch.as_tensor(t)
    return table.to(t.device)[t.long()]


def beta_bar(t: int | Tensor) -> Tensor:
    """Noise level sqrt(1 - cumulative alpha) at timestep t (0..999), float64."""
    return (1 - alpha_bar(t) ** 2).sqrt()


def levels(t: Tensor, like: Tensor) -> tuple[Tensor, Tensor]:
    """Signal and noise level at timesteps t (b), b 1 1 1, in `like`'s dtype but float32 at least."""
    dtype = torch.promote_types(like.dtype, torch.float32)
    a, b = alpha_bar(t), beta_bar(t)
    a, b = (x.to(like.device, dtype)[:, None, None, None] for x in (a, b))
    return a, b


def add_noise(z0: Tensor, eps: Tensor, a: Tensor | float, b: Tensor | float) -> Tensor:
    """Forward process: z_t = a z_0 + b eps."""
    return a * z0 + b * eps


def x0_from_eps(z_t: Tensor, eps: Tensor, a: Tensor | float, b: Tensor | float) -> Tensor:
    """Clean latent from a noise estimate, Eq. 2: (z_t - b eps) / a. One GenDR step has a = b = 0.5."""
    return (z_t - b * eps) / a


def eps_from_v(z_t: Tensor, v: Tensor, a: Tensor | float, b: Tensor | float) -> Tensor:
    """Noise estimate from a velocity estimate: a v + b z_t."""
    return a * v + b * z_t


def velocity(z0: Tensor, eps: Tensor, a: Tensor | float, b: Tensor | float) -> Tensor:
    """Velocity target: a eps - b z_0."""
    return a * eps - b * z0


def one_step(alpha: float, beta: float, prediction: Prediction, t: int) -> tuple[float, float]:
    """Coefficients (skip, out) of z_g = skip z_l + out F(z_l), Eq. 2 with the network's output F.

    For epsilon: 1/alpha and -beta/alpha, that is 2 z - eps with the paper's alpha = beta = 0.5.
    For v the noise estimate is first eps = abar_t v + bbar_t z.
    """
    if prediction == "epsilon":
        return 1 / alpha, -beta / alpha
    if prediction == "v_prediction":
        a, b = float(alpha_bar(t)), float(beta_bar(t))
        return (1 - beta * b) / alpha, -beta * a / alpha
    raise ValueError(f"prediction must be epsilon or v_prediction, got {prediction!r}")
