"""One step of GenDR-Tiny's training in pixels: what the loss compares, and the adversary's part."""

from __future__ import annotations

from contextlib import AbstractContextManager
from dataclasses import dataclass

import torch
from torch import Tensor

from gendr.networks.onestep import Unfolded
from train.pixels import grid_loss, pixel_loss
from train.run import step_generator
from train.tiny.adversary import Adversary, balanced
from train.tiny.perceptual import Perceptual, shifted
from train.tiny.settings import Settings


@dataclass(frozen=True)
class Taken:
    """A step's loss (without the autoencoder's share), the spread of its results, and its terms.

    The gradients are left in the network's parameters.
    """

    loss: Tensor
    spread: float
    terms: dict[str, float]


class Objective:
    """Regression to the clean crop and the teacher's result, features, grid, and an adversary.

    A share of every batch goes through the autoencoder alone.
    """

    def __init__(
        self,
        settings: Settings,
        network: Unfolded,
        perceptual: Perceptual | None,
        adversary: Adversary | None,
    ):
        self.settings, self.network = settings, network
        self.perceptual, self.adversary = perceptual, adversary

    @property
    def share(self) -> int:
        """Crops of a batch that also go through the autoencoder alone."""
        s = self.settings
        return max(1, round(s.batch * s.autoencode)) if s.autoencode else 0

    def generate(self, batch: dict[str, Tensor], step: int) -> tuple[Tensor, Tensor, Tensor]:
        """Results b 3 h w, the autoencoder's of its share, and what that share was."""
        network, x = self.network, batch["input"]
        # Clean and damaged pictures in turn: the latent must hold both.
        plain = (batch["hr"] if step % 2 else x)[: self.share]
        latents = network.encode(torch.cat([x, plain]))
        z_l, z_plain = latents[: len(x)], latents[len(x) :]
        y = network.decode(torch.cat([network.step(z_l), z_plain]))
        return y[: len(x)], y[len(x) :], plain

    def regression(self, y: Tensor, batch: dict[str, Tensor]) -> tuple[Tensor, dict[str, float]]:
        """The part of the loss that compares pixels."""
        s = self.settings
        loss = (1 - s.teacher_share) * pixel_loss(y, batch["hr"], gradient=s.gradient)
        if s.teacher_share:
            term = pixel_loss(y, batch["teacher"], gradient=s.gradient)
            loss = loss + s.teacher_share * term
        terms = {"pixel": float(loss.detach())}
        if s.grid:
            term = grid_loss(y, batch["hr"])
            terms["grid"] = float(term.detach())
            loss = loss + s.grid * term
        return loss, terms

    def take(self, batch: dict[str, Tensor], step: int, context: AbstractContextManager) -> Taken:
        """Loss and gradients of step `step` (from 1); the adversary learns on the way.

        context: in which the network runs.
        """
        s, perceptual, adversary = self.settings, self.perceptual, self.adversary
        with context:
            y, y_plain, plain = self.generate(batch, step)
        loss, terms = self.regression(y, batch)
        views = (y.float(), batch[s.truth], batch["input"])
        if perceptual is not None:
            names = ("hr", "teacher") if s.perceptual_to == "both" else (s.perceptual_to,)
            generator = step_generator(s.seed, step)
            (*looked,) = shifted(
                y, batch[s.truth], batch["input"], *(batch[n] for n in names), generator=generator
            )
            shown = perceptual.maps(looked[0])
            with torch.no_grad():
                wanted = [perceptual.maps(target) for target in looked[3:]]
            term = torch.stack([perceptual.distance(shown, maps) for maps in wanted]).mean()
            terms["perceptual"] = float(term.detach())
            loss = loss + s.perceptual * term
            if adversary is not None and s.judge == "features":
                with torch.no_grad():
                    source, real = perceptual.maps(looked[2]), perceptual.maps(looked[1])
                views = (shown, real, source)
        pull = None
        if adversary is not None:
            terms["discriminator"] = adversary.learn(*views)
            if step > s.alone:
                fooled = adversary.fooled(*views, matching=s.matching)
                pull = balanced(loss, fooled, y, s.adversarial)
        rest = y.new_zeros(())
        if self.share:
            rest = s.autoencode * pixel_loss(y_plain, plain, gradient=s.gradient)
        if pull is None:
            (loss + rest).backward()
        elif self.share:
            torch.autograd.backward([y, rest], [pull, None])
        else:
            y.backward(pull)
        with torch.no_grad():
            spread = float(y.detach().float().std())
        return Taken(loss.detach(), spread, terms)
