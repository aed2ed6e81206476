"""Conditional discriminators for the last stretch of a restorer trained in pixels.

Regression leaves edges a little soft, as the mean of what they might be. The discriminator sees
the enlarged input beside a result and tells the target's results from the network's: in pixels, or
in the features of a frozen network (Projected GANs, arXiv 2111.01007), which learns from far fewer
pictures and costs next to nothing where a perceptual term computes those features anyway.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.parametrizations import spectral_norm


class Discriminator(nn.Module):
    """Picture and its input, each b 3 h w in [-1, 1] -> logits [b 1 h/8 w/8], high = the target's.

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

    def forward(self, picture: Tensor, source: Tensor) -> list[Tensor]:
        return [self.features(picture, source)[-1]]

    def features(self, picture: Tensor, source: Tensor) -> list[Tensor]:
        """Maps behind every activation, coarsest last, and the logits at the end."""
        x, found = torch.cat([picture, source], dim=1), []
        for layer in self.layers:
            x = layer(x)
            if isinstance(layer, nn.LeakyReLU):
                found.append(x)
        return [*found, x]


class FeatureDiscriminator(nn.Module):
    """Maps of a picture and of its input, as `Perceptual.maps` gives them -> logits per stage.

    One small head per stage; spectral norms as above.
    """

    def __init__(self, channels: Sequence[int], width: int = 32):
        """channels: of the maps, finest first."""
        super().__init__()
        self.heads = nn.ModuleList(
            nn.Sequential(
                spectral_norm(nn.Conv2d(2 * c, width, 4, stride=2, padding=1)),
                nn.LeakyReLU(0.2),
                spectral_norm(nn.Conv2d(width, width, 3, padding=1)),
                nn.LeakyReLU(0.2),
                nn.Conv2d(width, 1, 3, padding=1),
            )
            for c in channels
        )

    def forward(self, picture: Sequence[Tensor], source: Sequence[Tensor]) -> list[Tensor]:
        return [
            head(torch.cat([p, s], dim=1))
            for head, p, s in zip(self.heads, picture, source, strict=True)
        ]


# What a discriminator looks at: a picture, or the maps of one.
View = Tensor | Sequence[Tensor]


class Adversary:
    """A discriminator that learns beside the network it judges."""

    def __init__(self, discriminator: Discriminator | FeatureDiscriminator):
        self.discriminator = discriminator
        parameters = list(discriminator.parameters())
        # Its step may be part of a recorded one.
        self.optimizer = torch.optim.Adam(
            parameters, lr=2e-4, betas=(0.5, 0.99), capturable=parameters[0].is_cuda
        )
        # Steps that it has taken, counted by whoever takes them.
        self.learned = 0

    def state_dict(self) -> dict[str, Any]:
        """What a run's state holds of it."""
        return {
            "discriminator": self.discriminator.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "learned": self.learned,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """KeyError, RuntimeError or ValueError for the state of another discriminator."""
        self.discriminator.load_state_dict(state["discriminator"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.learned = state["learned"]

    def tensors(self) -> list[Tensor]:
        """Everything that a step of it changes, where it lies."""
        judge, states = self.discriminator, self.optimizer.state.values()
        held = [value for state in states for value in state.values()]
        return [*judge.parameters(), *judge.buffers(), *(v for v in held if isinstance(v, Tensor))]

    def learn(self, result: View, real: View, source: View) -> Tensor:
        """One step of the discriminator; its loss."""
        told = self.discriminator(real, source), self.discriminator(_detached(result), source)
        pairs = zip(*told, strict=True)
        loss = torch.stack([discriminator_loss(*pair) for pair in pairs]).mean()
        self.optimizer.zero_grad(set_to_none=True)
        loss.backward()
        self.optimizer.step()
        return loss.detach()

    def fooled(self, result: View, real: View, source: View, *, matching: float) -> Tensor:
        """What the network lowers; matching: weight of the discriminator's own maps (pictures)."""
        if not matching:
            logits = self.discriminator(result, source)
            return torch.stack([generator_loss(v) for v in logits]).mean()
        seen = self.discriminator.features(result, source)
        with torch.no_grad():
            wanted = self.discriminator.features(real, source)
        return generator_loss(seen[-1]) + matching * feature_matching(wanted, seen)


def _detached(view: View) -> View:
    return view.detach() if isinstance(view, Tensor) else [v.detach() for v in view]


def discriminator_loss(target: Tensor, result: Tensor) -> Tensor:
    """Hinge loss of logits: target's above 1, the network's below -1."""
    return (F.relu(1 - target.float()).mean() + F.relu(1 + result.float()).mean()) / 2


def generator_loss(result: Tensor) -> Tensor:
    """What the network lowers to be taken for the target."""
    return -result.float().mean()


def feature_matching(target: list[Tensor], result: list[Tensor]) -> Tensor:
    """Mean absolute difference of the maps that the discriminator sees, logits left out (pix2pixHD).

    Unlike the logits it says where a result differs from its target, not only that it does.
    """
    pairs = zip(target[:-1], result[:-1], strict=True)
    return torch.stack([F.l1_loss(r, t.detach()) for t, r in pairs]).mean()


def balanced(
    regression: Tensor,
    adversarial: Sequence[Tensor],
    pictures: Tensor,
    layer: Sequence[Tensor],
    share: float,
    rows: Tensor | None = None,
) -> Tensor:
    """Gradient of all losses at the pictures b 3 h w. The adversaries' are scaled so that at the last
    layer's weights their length is `share` of the regression's, each with the same part of it.

    VQGAN's rule (Eq. 7), with every loss followed back once. layer: the weights that the pictures were
    made with last. Lengths at the pictures themselves would not do: what pulls all pixels one
    way adds up in the weights, what differs from pixel to pixel cancels there.
    rows: [b], weight of the adversaries' pull on each picture, all 1 if not given.
    """

    def length(gradient: Tensor) -> Tensor:
        found = torch.autograd.grad(pictures, layer, gradient, retain_graph=True)
        return torch.stack([g.float().norm() for g in found]).norm()

    # The losses may share what is behind them: kept for the next one.
    total = first = torch.autograd.grad(regression, pictures, retain_graph=True)[0]
    whole = length(first)
    for loss in adversarial:
        pull = torch.autograd.grad(loss, pictures, retain_graph=True)[0]
        factor = whole / (length(pull) + 1e-12)
        if rows is not None:
            pull = pull * rows.to(pull.dtype)[:, None, None, None]
        total = total + share / len(adversarial) * factor.clamp(max=1e4) * pull
    return total
