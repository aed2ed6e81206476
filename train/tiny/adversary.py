"""A conditional patch discriminator for the last stretch of a restorer trained in pixels.

Regression leaves edges a little soft, as the mean of what they might be. The discriminator sees
the enlarged input beside a result and tells the target's results from the network's.
"""

from __future__ import annotations

import itertools

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.parametrizations import spectral_norm


class Discriminator(nn.Module):
    """Picture and its input, each b 3 h w in [-1, 1] -> logits b 1 h/8 w/8, high = the target's.

    Spectral norms keep it from winning at once; no normalisation, so crops don't see each other.
    """

    def __init__(self, width: int = 32):
        super().__init__()
        layers: list[nn.Module] = []
        channels = [6, width, 2 * width, 4 * width]
        for i, o in itertools.pairwise(channels):
            layers += [spectral_norm(nn.Conv2d(i, o, 4, stride=2, padding=1)), nn.LeakyReLU(0.2)]
        layers += [spectral_norm(nn.Conv2d(channels[-1], channels[-1], 3, padding=1))]
        layers += [nn.LeakyReLU(0.2), nn.Conv2d(channels[-1], 1, 3, padding=1)]
        self.layers = nn.Sequential(*layers)

    def forward(self, picture: Tensor, source: Tensor) -> Tensor:
        return self.features(picture, source)[-1]

    def features(self, picture: Tensor, source: Tensor) -> list[Tensor]:
        """Maps behind every activation, coarsest last, and the logits at the end."""
        x, found = torch.cat([picture, source], dim=1), []
        for layer in self.layers:
            x = layer(x)
            if isinstance(layer, nn.LeakyReLU):
                found.append(x)
        return [*found, x]


def discriminator_loss(target: Tensor, result: Tensor) -> Tensor:
    """Hinge loss of logits: target's above 1, the network's below -1."""
    return (F.relu(1 - target).mean() + F.relu(1 + result).mean()) / 2


def generator_loss(result: Tensor) -> Tensor:
    """What the network lowers to be taken for the target."""
    return -result.mean()


def feature_matching(target: list[Tensor], result: list[Tensor]) -> Tensor:
    """Mean absolute difference of the maps that the discriminator sees, logits left out (pix2pixHD).

    Unlike the logits it says where a result differs from its target, not only that it does.
    """
    pairs = zip(target[:-1], result[:-1], strict=True)
    return torch.stack([F.l1_loss(r, t.detach()) for t, r in pairs]).mean()


def balance(regression: Tensor, adversarial: Tensor, weight: Tensor) -> Tensor:
    """Factor that makes both losses pull equally hard at a layer's weight (VQGAN, Eq. 7)."""
    pulls = [
        torch.autograd.grad(loss, weight, retain_graph=True)[0].float().norm()
        for loss in (regression, adversarial)
    ]
    return (pulls[0] / (pulls[1] + 1e-6)).clamp(max=1e3).detach()
