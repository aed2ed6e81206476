"""One step of GenDR-Tiny's training in pixels: what the loss compares, and the adversary's part."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from typing import Literal

import torch
from torch import Tensor

from gendr.networks.onestep import Unfolded
from train.pixels import grid_loss, pixel_loss
from train.run import step_generator
from train.tiny.adversary import Adversary, View, balanced
from train.tiny.networks import autocast
from train.tiny.perceptual import Perceptual, place, window
from train.tiny.settings import Settings

# What the adversaries do in a step: nothing yet, learn alone, or pull as well.
Phase = Literal["regression", "learning", "pulling"]


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
        device = next(network.parameters()).device
        # In which the network runs, and in which features and adversaries do.
        self.context = partial(autocast, device, settings.precision)
        self.looking = partial(autocast, device, settings.precision_features)

    @property
    def share(self) -> int:
        """Crops of a batch that also go through the autoencoder alone."""
        s = self.settings
        return max(1, round(s.batch * s.autoencode)) if s.autoencode else 0

    def prepared(self, batch: dict[str, Tensor], step: int) -> dict[str, Tensor]:
        """A batch with what is drawn for step `step`: the place of the windows, and the pictures
        that go through the autoencoder alone."""
        at = place(batch["hr"].shape[-1], step_generator(self.settings.seed, step))
        # Clean and damaged pictures in turn: the latent must hold both.
        plain = (batch["hr"] if step % 2 else batch["input"])[: self.share]
        return {**batch, "plain": plain, "place": at.to(plain.device, non_blocking=True)}

    def generate(self, batch: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
        """Results b 3 h w, and the autoencoder's of its share."""
        network, x = self.network, batch["input"]
        latents = network.encode(torch.cat([x, batch["plain"]]))
        z_l, z_plain = latents[: len(x)], latents[len(x) :]
        y = network.decode(torch.cat([network.step(z_l), z_plain]))
        return y[: len(x)], y[len(x) :]

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

    def windows(self, y: Tensor, batch: dict[str, Tensor]) -> dict[str, Tensor]:
        """What features and adversaries see: the same window of `result` and of its batch."""
        s, at = self.settings, batch["place"]
        names = dict.fromkeys((s.truth, "input", *s.compared))
        return {"result": window(y.float(), at)} | {n: window(batch[n], at) for n in names}

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
        self, views: Mapping[str, Mapping[str, View]], terms: dict[str, Tensor], *, pulling: bool
    ) -> list[Tensor]:
        """The adversaries learn; their losses, if they pull."""
        s, fooled = self.settings, []
        for kind, adversary in self.adversaries.items():
            view = [views[kind][name] for name in ("result", s.truth, "input")]
            terms[f"discriminator_{kind}"] = adversary.learn(*view)
            if pulling:
                matching = s.matching if kind == "patch" else 0.0
                fooled.append(adversary.fooled(*view, matching=matching))
        return fooled

    def phase(self, done: float) -> Phase:
        """What the adversaries do in a step; done: part of the run that is over, 0 to 1."""
        if not self.adversaries or done < self.settings.adversarial_from:
            return "regression"
        learned = min(adversary.learned for adversary in self.adversaries.values())
        return "pulling" if learned >= self.settings.alone else "learning"

    def take(self, batch: dict[str, Tensor], phase: Phase) -> Taken:
        """Loss and gradients for a prepared batch; the adversaries learn on the way.

        Nothing in it depends on numbers that the device would be waited for, so it can be recorded.
        """
        s = self.settings
        with self.context():
            y, y_plain = self.generate(batch)
        loss, terms = self.regression(y, batch)
        fooled: list[Tensor] = []
        if self.perceptual is not None or phase != "regression":
            seen, maps = self.windows(y, batch), {}
            with self.looking():
                if self.perceptual is not None:
                    maps = self.maps(seen)
                    found = [self.perceptual.distance(maps["result"], maps[n]) for n in s.compared]
                    term = torch.stack(found).mean()
                    terms["perceptual"] = term.detach()
                    loss = loss + s.perceptual * term
                if phase != "regression":
                    views = {"patch": seen, "features": maps}
                    fooled = self.judged(views, terms, pulling=phase == "pulling")
        rest = y.new_zeros(())
        if self.share:
            rest = s.autoencode * pixel_loss(y_plain, batch["plain"], gradient=s.gradient)
        if not fooled:
            (loss + rest).backward()
        else:
            rows = None
            if "clean" in batch:
                rows = 1 - (1 - s.clean_pull) * batch["clean"].float()
            layer = list(self.network.vae.decoder.conv_out.parameters())
            pull = balanced(loss, fooled, y, layer, s.adversarial, rows)
            if self.share:
                torch.autograd.backward([y, rest], [pull, None])
            else:
                y.backward(pull)
        return Taken(loss.detach(), y.detach().float().std(), terms)
