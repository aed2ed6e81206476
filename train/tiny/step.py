"""One step of GenDR-Tiny's training in pixels: what the loss compares, and the adversary's part."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass

import torch
from torch import Tensor

from gendr.networks.onestep import Unfolded
from train.pixels import grid_loss, pixel_loss
from train.run import step_generator
from train.tiny.adversary import Adversary, View, balanced
from train.tiny.perceptual import Perceptual, shifted
from train.tiny.settings import Settings


@dataclass(frozen=True)
class Taken:
    """A step's loss (without the autoencoder's share), the spread of its results, and its terms.

    The gradients are left in the network's parameters.
    """

    loss: Tensor
    spread: Tensor
    terms: dict[str, Tensor]


class Objective:
    """Regression to the clean crop and the teacher's result, features, grid, and adversaries.

    A share of every batch goes through the autoencoder alone.
    """

    def __init__(
        self,
        settings: Settings,
        network: Unfolded,
        perceptual: Perceptual | None,
        adversaries: Mapping[str, Adversary],
    ):
        """adversaries: by what they look at, `patch` or `features`."""
        self.settings, self.network = settings, network
        self.perceptual, self.adversaries = perceptual, adversaries

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

    def regression(self, y: Tensor, batch: dict[str, Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
        """The part of the loss that compares pixels, and its terms."""
        s = self.settings
        loss = (1 - s.teacher_share) * pixel_loss(y, batch["hr"], gradient=s.gradient)
        if s.teacher_share:
            term = pixel_loss(y, batch["teacher"], gradient=s.gradient)
            loss = loss + s.teacher_share * term
        terms = {"pixel": loss.detach()}
        if s.grid:
            term = grid_loss(y, batch["hr"])
            terms["grid"] = term.detach()
            loss = loss + s.grid * term
        return loss, terms

    def windows(self, y: Tensor, batch: dict[str, Tensor], step: int) -> dict[str, Tensor]:
        """What features and adversaries see: the same window of `result` and of its batch."""
        s = self.settings
        names = list(dict.fromkeys((s.truth, "input", *s.compared)))
        pictures = (y.float(), *(batch[name] for name in names))
        found = shifted(*pictures, generator=step_generator(s.seed, step))
        return dict(zip(("result", *names), found, strict=True))

    def maps(self, seen: dict[str, Tensor]) -> dict[str, list[Tensor]]:
        """The perceptual network's maps of the windows that are needed."""
        s, perceptual = self.settings, self.perceptual
        wanted = set(s.compared)
        if "features" in self.adversaries:
            wanted |= {s.truth, "input"}
        found = {"result": perceptual.maps(seen["result"])}
        with torch.no_grad():
            return found | {name: perceptual.maps(seen[name]) for name in wanted}

    def judged(
        self, views: Mapping[str, Mapping[str, View]], terms: dict[str, Tensor]
    ) -> list[Tensor]:
        """The adversaries learn; the losses of those that pull already."""
        s, fooled = self.settings, []
        for kind, adversary in self.adversaries.items():
            view = [views[kind][name] for name in ("result", s.truth, "input")]
            terms[f"discriminator_{kind}"] = adversary.learn(*view)
            if adversary.learned > s.alone:
                matching = s.matching if kind == "patch" else 0.0
                fooled.append(adversary.fooled(*view, matching=matching))
        return fooled

    def take(
        self,
        batch: dict[str, Tensor],
        step: int,
        context: AbstractContextManager,
        looking: AbstractContextManager,
        *,
        done: float = 0.0,
    ) -> Taken:
        """Loss and gradients of step `step` (from 1); the adversaries learn on the way.

        context: in which the network runs; looking: in which the features and the adversaries do.
        done: part of the run that is over, 0 to 1.
        """
        s = self.settings
        with context:
            y, y_plain, plain = self.generate(batch, step)
        loss, terms = self.regression(y, batch)
        fooled: list[Tensor] = []
        if self.perceptual is not None or self.adversaries:
            seen, maps = self.windows(y, batch, step), {}
            with looking:
                if self.perceptual is not None:
                    maps = self.maps(seen)
                    found = [self.perceptual.distance(maps["result"], maps[n]) for n in s.compared]
                    term = torch.stack(found).mean()
                    terms["perceptual"] = term.detach()
                    loss = loss + s.perceptual * term
                if done >= s.adversarial_from:
                    fooled = self.judged({"patch": seen, "features": maps}, terms)
        rest = y.new_zeros(())
        if self.share:
            rest = s.autoencode * pixel_loss(y_plain, plain, gradient=s.gradient)
        if not fooled:
            (loss + rest).backward()
        else:
            rows = None
            if "clean" in batch:
                rows = torch.where(batch["clean"], s.clean_pull, 1.0)
            pull = balanced(loss, fooled, y, s.adversarial, rows)
            if self.share:
                torch.autograd.backward([y, rest], [pull, None])
            else:
                y.backward(pull)
        return Taken(loss.detach(), y.detach().float().std(), terms)
