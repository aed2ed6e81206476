"""Number 27 of the method's tests, the slow half: distillation on a toy whose answer is known.

Eight modes on a ring, seen through noise. The best guess by squared error lies between the modes
that an input may belong to; distillation must move it towards one of them, and stay near the pair.
Networks are small and fully connected; losses, schedule and noise are the ones of train.cida.
"""

from __future__ import annotations

import copy
import math
from itertools import pairwise

import pytest
import torch
from stage2 import distillation, objective, weights
from torch import Tensor, nn

from gendr import schedule
from train import losses
from train.losses import Distillation, Weights

SPREAD, NOISE, COUNT = 0.12, 0.6, 256
ANGLES = torch.arange(8) * math.pi / 4
MODES = math.sqrt(2) * torch.stack([ANGLES.cos(), ANGLES.sin()], 1)


class Net(nn.Module):
    """n 2 1 1 (and the timestep) -> n 2 1 1."""

    def __init__(self, timed: bool, width: int = 192):
        super().__init__()
        self.timed = timed
        sizes = [2 + 8 * timed, width, width, width]
        layers = [m for a, b in pairwise(sizes) for m in (nn.Linear(a, b), nn.SiLU())]
        self.layers = nn.Sequential(*layers, nn.Linear(width, 2))

    def forward(self, z: Tensor, t: Tensor | None = None) -> Tensor:
        x = z.flatten(1)
        if self.timed:
            phase = t.float()[:, None] / 1000 * math.pi * torch.tensor([0.5, 1, 2, 4])
            x = torch.cat([x, phase.sin(), phase.cos()], 1)
        return self.layers(x)[:, :, None, None]


def pairs(count: int, g: torch.Generator) -> tuple[Tensor, Tensor]:
    """z_h and z_l."""
    z_h = MODES[torch.randint(8, (count,), generator=g)]
    z_h = z_h + SPREAD * torch.randn(count, 2, generator=g)
    z_l = z_h + NOISE * torch.randn(count, 2, generator=g)
    return z_h[:, :, None, None], z_l[:, :, None, None]


def noised(z: Tensor, g: torch.Generator) -> tuple[Tensor, Tensor]:
    t = torch.randint(20, 980, (len(z),), generator=g)
    eps = torch.randn(z.shape, generator=g)
    return schedule.add_noise(z, eps, *schedule.levels(t, z)), t


def train(rule: Distillation | None, factors: Weights, steps: int) -> tuple[float, float]:
    """(squared error, mean distance to the nearest mode) of the generator that comes out."""
    torch.manual_seed(0)
    g = torch.Generator().manual_seed(1)
    generator, real = Net(False), Net(True)
    nn.init.zeros_(generator.layers[-1].weight)
    nn.init.zeros_(generator.layers[-1].bias)
    if rule is not None:  # the base: it knows the data
        optimizer = torch.optim.Adam(real.parameters(), lr=2e-3)
        for _ in range(1500):
            z, _ = pairs(COUNT, g)
            loss = (real(*noised(z, g)) - z).square().mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    fake = copy.deepcopy(real)
    scores = torch.optim.Adam([*real.parameters(), *fake.parameters()], lr=2e-3)
    optimizer = torch.optim.Adam(generator.parameters(), lr=1e-3)
    for step in range(steps):
        z_h, z_l = pairs(COUNT, g)
        z_g = schedule.x0_from_eps(z_l, generator(z_l), 0.5, 0.5)
        mse = losses.consistency(z_g, z_h)
        cid = torch.zeros(())
        if rule is not None:
            fixed = z_g.detach()
            loss = (fake(*noised(fixed, g)) - fixed).square().mean()
            loss = loss + (real(*noised(z_h, g)) - z_h).square().mean()
            scores.zero_grad()
            loss.backward()
            scores.step()
            z_t, t = noised(z_g, g)
            cid = losses.distillation(real(z_t, t), fake(z_t, t), z_g, z_h, rule)
        optimizer.zero_grad()
        objective(factors, step, cid=cid, mse=mse).backward()
        nn.utils.clip_grad_norm_(generator.parameters(), 1.0)
        for one, rate in ((optimizer, 1e-3), (scores, 2e-3)):
            one.param_groups[0]["lr"] = rate * (1 - step / steps)
        optimizer.step()
    z_h, z_l = pairs(8192, g)
    with torch.no_grad():
        z_g = schedule.x0_from_eps(z_l, generator(z_l), 0.5, 0.5)
    distance = torch.cdist(z_g.flatten(1), MODES).min(1)[0].mean()
    return float((z_g - z_h).square().sum(1).mean()), float(distance)


@pytest.mark.slow
def test_27_distillation_sharpens_what_regression_blurs():
    error, distance = train(None, weights(lambda_mse=1.0), 3000)
    # The exact posterior mean has 0.412 and 0.304.
    assert error == pytest.approx(0.41, abs=0.03)
    assert distance == pytest.approx(0.31, abs=0.03)
    sharp_error, sharp_distance = train(distillation(), weights(), 5000)
    assert sharp_error < 0.50
    assert sharp_distance < 0.30
    assert sharp_distance < distance - 0.02
