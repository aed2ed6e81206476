"""One step of stage 1: noised latents, what the network should say about them, and REPA.

L = mean |F(z_t; t, c) - target|^2 + lambda_repa L_repa, with z sampled from the autoencoder's
posterior, t ~ U{0..999}, and c dropped to the empty prompt now and then. Section 2 of the method.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from contextlib import AbstractContextManager
from typing import NamedTuple

import torch
from torch import Tensor, nn

from gendr import schedule
from gendr.networks.unet import UNet
from gendr.networks.vae import VAE
from train import losses
from train.data.stream import Batch, Purpose, draw, sample_generator
from train.features import Aligned, DinoV2, Projector
from train.losses import full
from train.pixels import enlarge, in_parts
from train.stage1.prompts import Prompts, Role, damage_in_words
from train.stage1.settings import Rules

# Shares of refinement (section 2.5 of the method): damaged pictures, and pictures without a prompt;
# the rest are clean ones with quality terms.
DAMAGED, EMPTY = 0.1, 0.1


class Sample(NamedTuple):
    """Latents z b c h w, prompts b m d, features of the encoded pictures b n d or None, keys."""

    z: Tensor
    context: Tensor
    features: Tensor | None
    keys: Sequence[int]


class Denoiser(nn.Module):
    """What is trained: the UNet and, with REPA, its projector. Autocast lies inside, below wrappers."""

    def __init__(self, unet: UNet, projector: Projector | None, dtype: torch.dtype | None = None):
        super().__init__()
        self.network = Aligned(unet, projector)
        self.dtype = dtype

    @property
    def unet(self) -> UNet:
        return self.network.unet

    @property
    def projector(self) -> Projector | None:
        return self.network.projector

    def forward(self, z: Tensor, t: Tensor, context: Tensor) -> tuple[Tensor, Tensor | None]:
        """(the network's estimate b c h w, projected tokens b n d or None)."""
        with autocast(z.device, self.dtype):
            return self.network(z, t, context)


def autocast(device: torch.device, dtype: torch.dtype | None) -> AbstractContextManager:
    """bf16 where a dtype is given; weights stay as they are."""
    return torch.autocast(device.type, dtype or torch.bfloat16, enabled=dtype is not None)


class Objective:
    """The loss of pictures: everything frozen that a step looks at, and the rules."""

    def __init__(
        self,
        vae: VAE,
        encoder: DinoV2 | None,
        prompts: Prompts,
        rules: Rules,
        dtype: torch.dtype | None = None,
    ):
        self.vae, self.encoder, self.prompts = vae, encoder, prompts
        self.rules, self.dtype = rules, dtype
        self.device = prompts.device

    # ---- pictures to samples ----

    @torch.no_grad()
    def sample(self, batch: Batch, *, refine: bool = False) -> Sample:
        """Pictures to latents, features and prompts.

        refine: with quality terms, and a share of damaged pictures (section 2.5 of the method).
        """
        x, r = batch.hr, self.rules
        if refine:
            roles = self.roles(batch)
            x = self.shown(batch, roles)
            steps = batch.damage or [""] * len(batch.keys)
            damage = [damage_in_words(d.split("; ")) if d else "" for d in steps]
            context = self.prompts.refined(batch.captions, damage, roles, batch.keys)
        else:
            drop = draw(batch.keys, (1,), seed=r.seed, purpose=Purpose.DROP, drop=r.drop).drop
            context = self.prompts.plain(batch.captions, drop, batch.keys)
        z, features = self.encode(x, batch.keys)
        return Sample(z, context, features, batch.keys)

    def roles(self, batch: Batch) -> list[Role]:
        """Who is damaged, who goes without a prompt: by the key alone, and by who has a damaged copy."""
        if batch.lr is None:
            raise ValueError("refinement needs damaged copies: give the stream a degradation")
        found: list[Role] = []
        for n, key in enumerate(batch.keys):
            u = float(torch.rand(1, generator=sample_generator(self.rules.seed, key, Purpose.ROLE)))
            if batch.damage is None:
                # Ready pairs have all copies: the number alone decides.
                damaged, u = u < DAMAGED, (u - DAMAGED) / (1 - DAMAGED)
            else:
                damaged = bool(batch.damage[n])
            empty = u < EMPTY / (1 - DAMAGED)
            found.append("negative" if damaged else "null" if empty else "positive")
        return found

    def shown(self, batch: Batch, roles: Sequence[Role]) -> Tensor:
        """Clean pictures, or the enlarged damaged copy where the role is negative."""
        damaged = torch.tensor([role == "negative" for role in roles], device=batch.hr.device)
        return torch.where(
            damaged[:, None, None, None], enlarge(batch.lr, self.rules.scale), batch.hr
        )

    @torch.no_grad()
    def encode(self, x: Tensor, keys: Sequence[int]) -> tuple[Tensor, Tensor | None]:
        """Pictures b 3 h w -> (latents b c h/f w/f in float32 at least, features b n d or None)."""
        r, config = self.rules, self.vae.config
        latents, features, first = [], [], 0
        for part in in_parts(x):
            part = part.to(self.device)
            with autocast(self.device, self.dtype):
                mean, logvar = self.vae.moments(part.to(next(self.vae.parameters()).dtype))
                if self.encoder is not None:
                    features.append(self.encoder(part).float())
            z, logvar = full(mean), full(logvar)
            if r.posterior == "sample":
                mine = list(keys[first : first + len(part)])
                noise = draw(mine, z.shape[1:], seed=r.seed, purpose=Purpose.POSTERIOR)
                z = z + (0.5 * logvar).exp() * noise.eps.to(z)
            first += len(part)
            latents.append((z - (config.shift_factor or 0.0)) * config.scaling_factor)
        return torch.cat(latents), torch.cat(features) if features else None

    # ---- samples to losses ----

    def loss(self, denoiser: nn.Module, s: Sample) -> tuple[Tensor, dict[str, Tensor]]:
        """(L, what to log) of samples; the graph leads to the denoiser alone."""
        r = self.rules
        noise = draw(
            list(s.keys), s.z.shape[1:], seed=r.seed, purpose=Purpose.NOISE,
            device=self.device,
        )  # fmt: skip
        eps = noise.eps.to(s.z)
        a, b = schedule.levels(noise.t, s.z)
        z_t = schedule.add_noise(s.z, eps, a, b)
        out, tokens = denoiser(z_t, noise.t, s.context.to(s.z))
        target = eps if r.prediction == "epsilon" else schedule.velocity(s.z, eps, a, b)
        each = (full(out) - target).square().flatten(1).mean(1)
        loss = each.mean()
        high, error = (noise.t > (schedule.STEPS - 1) / 2).to(each), each.detach()
        values = {
            "diffusion": loss.detach(),
            "share_high": high.mean(),
            "part_high": (error * high).mean(),
            "part_low": (error * (1 - high)).mean(),
        }
        if s.features is not None and r.lambda_repa:
            repa = losses.alignment(tokens, s.features)
            loss = loss + r.lambda_repa * repa
            values["repa_cosine"] = -repa.detach()
        return loss, {"loss": loss.detach(), **values}

    def gradients(
        self, denoiser: nn.Module, samples: Iterable[Sample], count: int
    ) -> dict[str, Tensor]:
        """Sum the gradients of `count` micro-batches' mean loss; the means of what was measured."""
        sums: dict[str, Tensor] = {}
        for s in samples:
            loss, values = self.loss(denoiser, s)
            (loss / count).backward()
            for name, value in values.items():
                sums[name] = sums.get(name, 0) + value / count
        return sums

    @staticmethod
    def halves(values: dict[str, float]) -> dict[str, float]:
        """Means over a whole batch with the low and the high noise half by themselves: where a run
        falls behind shows there."""
        values = dict(values)
        share = values.pop("share_high")
        for half, weight in (("high", share), ("low", 1 - share)):
            part = values.pop(f"part_{half}")
            if weight > 1e-6:
                values[f"diffusion_{half}"] = part / weight
        return values

    @torch.no_grad()
    def noise_error(
        self, denoiser: Denoiser, z: Tensor, eps: Tensor, t: int, context: Tensor
    ) -> tuple[Tensor, Tensor | None]:
        """(mean |eps_hat - eps|^2 per sample at timestep t, projected tokens), for validation."""
        steps = torch.full((len(z),), t, device=z.device)
        a, b = schedule.levels(steps, z)
        z_t = schedule.add_noise(z, eps, a, b)
        out, tokens = denoiser(z_t, steps, context)
        out = full(out)
        if self.rules.prediction == "v_prediction":
            out = schedule.eps_from_v(z_t, out, a, b)
        return (out - eps).square().flatten(1).mean(1), tokens
