"""What the tests of stage 2 share: rules as a run has them, and Eq. 11 as one sum."""

from __future__ import annotations

from torch import Tensor

from train.losses import Distillation, Weights
from train.stage2.settings import Rules, Settings


def rules(**changes) -> Rules:
    """Of the default settings, with changes."""
    return Settings(**changes).rules


def distillation(**changes) -> Distillation:
    return rules(**changes).distillation


def weights(**changes) -> Weights:
    return rules(**changes).weights


def objective(
    factors: Weights,
    step: int,
    *,
    cid: Tensor,
    adv: Tensor | float = 0.0,
    repa: Tensor | float = 0.0,
    mse: Tensor | float = 0.0,
) -> Tensor:
    """Eq. 11 with the consistency term: lambda1 cid + lambda2 adv + lambda3 repa + lambda_mse mse."""
    return (
        factors.lambda1_at(step) * cid
        + factors.lambda2 * adv
        + factors.lambda3 * repa
        + factors.lambda_mse * mse
    )
