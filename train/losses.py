"""The losses of GenDR as pure functions of tensors: Eqs. 3 to 11 of the paper, no model in sight.

Latents and scores are b c h w with unit variance. f_real and f_fake are the clean latents that the
real (phi) and the fake (psi) score network, guidance included, see in the same noised z_g;
D = f_real - f_fake. Everything is computed in float32 at least.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple, get_args

import torch
import torch.nn.functional as F
from torch import Tensor

Target = Literal["vsd", "sr", "hr", "hr_st"]
ScoreGrad = Literal["both", "real_only", "none"]
Reduction = Literal["mean", "sum"]
Reference = Literal["hr", "sr", "none"]
Weighting = Literal["eps", "x0"]

# A score that already equals its reference must not make the weight infinite.
OMEGA_FLOOR = 1e-5


@dataclass(frozen=True, kw_only=True)
class Distillation:
    """Which form of the distillation term.

    target: what stands against f_real in the second factor. `sr`: z_g itself (SiD, the stable
        form); `hr`: z_h, Eq. 8 to the letter, which pushes z_g away from the data unless a strong
        consistency term holds it; `hr_st`: the value of z_h with the gradient of z_g.
        `vsd`: the gradient f_fake - f_real at z_g, without any of this (Eq. 4).
    xi: share of |D|^2 subtracted in Eq. 9; SiD's authors use 1.0 to 1.2.
    score_grad: which networks the gradient passes on its way to z_g; `vsd` passes none.
    reduction: of products over the elements of a sample; the batch is always averaged.
    reference: what omega(t) measures the real score against; `none` = no weighting.
    """

    target: Target
    xi: float
    score_grad: ScoreGrad
    reduction: Reduction
    reference: Reference

    def __post_init__(self) -> None:
        for name, kind in (
            ("target", Target),
            ("score_grad", ScoreGrad),
            ("reduction", Reduction),
            ("reference", Reference),
        ):
            if (value := getattr(self, name)) not in get_args(kind):
                raise ValueError(f"{name} must be one of {', '.join(get_args(kind))}, not {value}")
        if self.target == "hr" and self.score_grad == "none":
            raise ValueError(
                "target hr reaches z_g through the score networks alone, so score_grad none leaves "
                "it without a gradient: take another target or score_grad"
            )

    @property
    def through(self) -> tuple[str, ...]:
        """The score networks that the gradient passes, by adapter name."""
        if self.target == "vsd":
            return ()
        return {"both": ("real", "fake"), "real_only": ("real",), "none": ()}[self.score_grad]


@dataclass(frozen=True, kw_only=True)
class Weights:
    """Factors of Eq. 11, with the consistency term of Eq. 6 as lambda_mse, which the paper leaves out.

    lambda1 falls from `lambda1` to `lambda1_late` at generator step `late` (counted from 0).
    """

    lambda1: float
    lambda1_late: float
    late: int
    lambda2: float
    lambda3: float
    lambda_mse: float

    def lambda1_at(self, step: int) -> float:
        """lambda1 of a generator step, the first of which is 0."""
        return self.lambda1 if step < self.late else self.lambda1_late


class Cotangents(NamedTuple):
    """The distillation loss and its gradients at its inputs, b c h w; None where none flows."""

    loss: Tensor
    real: Tensor | None
    fake: Tensor | None
    generated: Tensor


def full(x: Tensor) -> Tensor:
    """In float32 at least: differences of scores lose their digits in bf16."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


def inner(x: Tensor, y: Tensor, reduction: Reduction) -> Tensor:
    """<x, y> over the elements of each sample (mean or sum), averaged over the batch: scalar."""
    product = (x * y).flatten(1)
    return (product.mean(1) if reduction == "mean" else product.sum(1)).mean()


@torch.no_grad()
def omega(reference: Tensor, f_real: Tensor, floor: float = OMEGA_FLOOR) -> Tensor:
    """omega(t) of Eqs. 4 to 9: 1 / mean|reference - f_real| per sample, b 1 1 1, without a gradient."""
    distance = (full(reference) - full(f_real)).abs().flatten(1).mean(1)
    return 1 / distance.clamp_min(floor)[:, None, None, None]


def distillation(
    f_real: Tensor,
    f_fake: Tensor,
    z_g: Tensor,
    z_h: Tensor,
    config: Distillation,
    w: Tensor | None = None,
) -> Tensor:
    """w <D, f_real - target> - xi w <D, D>, Eqs. 8 and 9, or the VSD pseudo-loss: scalar.

    z_g carries the generator's graph; f_real and f_fake too where the gradient shall pass them.
    w: instead of omega(t) by `config.reference`, b 1 1 1.

    The VSD pseudo-loss has the gradient w (f_fake - f_real) at z_g, divided by the number of elements
    that `reduction` averages over; its value is half the squared norm of that direction.
    """
    f_real, f_fake, z_g, z_h = (full(x) for x in (f_real, f_fake, z_g, z_h))
    if w is None:
        reference = {"hr": z_h, "sr": z_g, "none": None}[config.reference]
        w = torch.ones_like(z_g[:, :1, :1, :1]) if reference is None else omega(reference, f_real)
    w = w.detach()
    if "real" not in config.through:
        f_real = f_real.detach()
    if "fake" not in config.through:
        f_fake = f_fake.detach()
    if config.target == "vsd":
        away = z_g - (z_g - w * (f_fake - f_real)).detach()
        return 0.5 * inner(away, away, config.reduction)
    target = {
        "sr": z_g,
        "hr": z_h.detach(),
        "hr_st": z_g + (z_h - z_g).detach(),
    }[config.target]
    d = f_real - f_fake
    return inner(w * d, f_real - target - config.xi * d, config.reduction)


def cotangents(
    f_real: Tensor,
    f_fake: Tensor,
    z_g: Tensor,
    z_h: Tensor,
    config: Distillation,
    w: Tensor | None = None,
) -> Cotangents:
    """`distillation` of values without a graph, and its gradients with respect to each of them.

    What a vector-Jacobian evaluation of the score networks starts from.
    """
    with torch.enable_grad():
        leaves = [full(x).detach().requires_grad_() for x in (f_real, f_fake, z_g)]
        loss = distillation(*leaves, z_h, config, w)
        real, fake, generated = torch.autograd.grad(loss, leaves, allow_unused=True)
    generated = torch.zeros_like(leaves[2]) if generated is None else generated
    return Cotangents(loss.detach(), real, fake, generated)


def consistency(z_g: Tensor, z_h: Tensor, reduction: Reduction = "mean") -> Tensor:
    """|z_g - z_h|^2, Eq. 6: scalar."""
    difference = full(z_g) - full(z_h)
    return inner(difference, difference, reduction)


def score_matching(
    eps_hat: Tensor,
    eps: Tensor,
    a: Tensor,
    b: Tensor,
    *,
    weighting: Weighting = "eps",
    reduction: Reduction = "mean",
) -> Tensor:
    """What trains a score network on noised latents, L_psi and L_phi of Eq. 7: scalar.

    eps_hat, eps: estimated and true noise, b c h w; a, b: levels, b 1 1 1.
    weighting: `x0` is |f(z_t) - z|^2 as printed, which is |eps_hat - eps|^2 (b/a)^2: 168 times the
        weight at t = 979 and a fiftieth at t = 20. `eps` leaves that factor out, as the
        implementations of the related methods do.
    """
    difference = full(eps_hat) - full(eps)
    if weighting == "x0":
        difference = difference * (b / a)
    elif weighting != "eps":
        raise ValueError(f"weighting must be eps or x0, not {weighting}")
    return inner(difference, difference, reduction)


def alignment(projected: Tensor, target: Tensor) -> Tensor:
    """REPA, Eq. 3: mean negative cosine similarity of features, both b n d: scalar in [-1, 1]."""
    if projected.shape != target.shape:
        raise ValueError(
            f"REPA compares tokens one by one, but the network has {tuple(projected.shape)} and the "
            f"encoder {tuple(target.shape)}: tap the UNet where its side is 1/16 of the picture's"
        )
    return -F.cosine_similarity(full(projected), full(target), dim=-1).mean()


def discriminator(real: Sequence[Tensor], fake: Sequence[Tensor]) -> Tensor:
    """What the heads minimise, Eq. 1 with its sign turned: softplus(-real) + softplus(fake).

    real, fake: one map of logits b 1 h w per head, of noised z_h and z_g. Mean over maps, then over
    heads: scalar, 2 ln 2 where all logits are 0.
    """
    losses = [
        F.softplus(-full(r)).mean() + F.softplus(full(f)).mean()
        for r, f in zip(real, fake, strict=True)
    ]
    return torch.stack(losses).mean()


def adversarial(fake: Sequence[Tensor]) -> Tensor:
    """What the generator minimises, Eq. 10 as the non-saturating softplus(-logit): scalar.

    Printed, Eq. 10 is to be maximised; added with a positive factor to a minimised loss it would push
    the logits of z_g down.
    """
    return torch.stack([F.softplus(-full(f)).mean() for f in fake]).mean()
