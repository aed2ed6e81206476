"""What a base in training is looked at by: losses at fixed noise, and pictures that it makes."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from gendr import schedule
from gendr.networks.onestep import Unfolded
from train import losses
from train.data.stream import Batch, Purpose, draw
from train.pixels import enlarge
from train.sheets import eight_bit, write_sheet
from train.stage1.step import autocast

if TYPE_CHECKING:
    from train.stage1.networks import Foundation

# Timesteps of the loss, and of the test of quality terms, where a picture's look is decided.
TIMESTEPS = (100, 300, 500, 700, 900)
TERMS = (300, 500)
STEPS, GUIDANCE = 20, 3.0
# Pictures on a sheet, and the side of each in pixels.
COLUMNS, LARGEST = 4, 512


class Preview:
    """A fixed set of pictures with damaged copies, and the noise that goes with it."""

    def __init__(self, foundation: Foundation, batch: Batch):
        self.f, self.batch = foundation, batch
        self.objective = foundation.objective
        self.x = enlarge(batch.lr, self.objective.rules.scale)
        self.z: tuple[Tensor, Tensor] | None = None
        self.features: Tensor | None = None
        self.eps = torch.empty(0)

    def prepare(self) -> None:
        """Latents of clean and damaged pictures, once."""
        if self.z is not None:
            return
        clean, self.features = self.objective.encode(self.batch.hr, self.batch.keys)
        damaged, _ = self.objective.encode(self.x, self.batch.keys)
        self.z = clean, damaged
        noise = draw(self.batch.keys, clean.shape[1:], seed=0, purpose=Purpose.PREVIEW)
        self.eps = noise.eps.to(clean)

    def prompt(self, name: str) -> Tensor:
        return self.f.prompts.embeds[name].expand(len(self.batch.keys), -1, -1).to(self.eps)

    @torch.no_grad()
    def look(self, folder: Path | None = None) -> tuple[dict[str, float], list[Path]]:
        """(values, sheets). Mean |eps_hat - eps|^2 (also by timestep), REPA's cosine, the effect of quality terms.

        terms_clean: how much worse clean latents are explained by the negative prompt than by the
        positive one; terms_damaged: the reverse of damaged ones. Both above 0 where the terms work.
        folder: writes samples.png and step.png there.
        """
        self.prepare()
        clean, damaged = self.z
        values, cosines = {}, []
        for t in TIMESTEPS:
            error, tokens = self.error(clean, t, "positive")
            values[f"noise_t{t}"] = float(error.mean())
            if self.features is not None:
                cosines.append(-losses.alignment(tokens, self.features))
        values["noise"] = sum(values.values()) / len(values)
        if cosines:
            values["repa_cosine"] = float(torch.stack(cosines).mean())
        for name, z, sign in (("clean", clean, 1), ("damaged", damaged, -1)):
            apart = [
                self.error(z, t, "negative")[0].mean() - self.error(z, t, "positive")[0].mean()
                for t in TERMS
            ]
            values[f"terms_{name}"] = sign * float(torch.stack(apart).mean())
        if folder is None:
            return values, []
        sheets = [folder / "samples.png", folder / "step.png"]
        write_sheet(sheets[0], [shown(self.samples())])
        write_sheet(sheets[1], [shown(x) for x in (self.x, self.one_step(), self.batch.hr)])
        return values, sheets

    def error(self, z: Tensor, t: int, prompt: str) -> tuple[Tensor, Tensor | None]:
        return self.objective.noise_error(self.f.denoiser, z, self.eps, t, self.prompt(prompt))

    def samples(self) -> Tensor:
        """Pictures b 3 h w from noise, by diffusers' DDIM, guided from the empty prompt."""
        # Here, because it takes seconds.
        from diffusers import DDIMScheduler

        scheduler = DDIMScheduler(
            num_train_timesteps=schedule.STEPS,
            beta_start=schedule.BETA_START,
            beta_end=schedule.BETA_END,
            beta_schedule="scaled_linear",
            prediction_type=self.objective.rules.prediction,
            clip_sample=False,
            set_alpha_to_one=False,
            steps_offset=1,
        )
        scheduler.set_timesteps(STEPS)
        z, context = self.eps, torch.cat([self.prompt("null"), self.prompt("positive")])
        for t in scheduler.timesteps.tolist():
            steps = torch.full((2 * len(z),), t, device=z.device)
            empty, full = self.f.denoiser(torch.cat([z, z]), steps, context)[0].float().chunk(2)
            z = scheduler.step(empty + GUIDANCE * (full - empty), t, z).prev_sample
        return self.decode(z)

    def one_step(self) -> Tensor:
        """What one GenDR step makes of the enlarged damaged pictures: b 3 h w."""
        f = self.f
        network = Unfolded(
            f.config, f.vae, f.denoiser.unet, {"positive": self.prompt("positive")[:1]}
        )
        with autocast(self.objective.device, self.objective.dtype):
            z = network.step(self.z[1])
        return self.decode(z)

    def decode(self, z: Tensor) -> Tensor:
        with autocast(self.objective.device, self.objective.dtype):
            return torch.cat([self.f.vae.decode(part) for part in z.split(1)]).float().cpu()

    @torch.no_grad()
    def doubt(self) -> str | None:
        """A sentence where the posterior is so wide that a sample of it is mostly noise."""
        r = self.objective.rules
        if r.posterior != "sample":
            return None
        part = self.batch.hr[:1].to(self.objective.device)
        mean, logvar = self.f.vae.moments(part)
        spread = float(mean.std() / (0.5 * logvar).exp().mean())
        if spread > 2:
            return None
        return (
            f"the autoencoder's posterior is {1 / spread:.1f} times as wide as its mean varies: its "
            "variance was never trained; start again with posterior = mode"
        )


def shown(pictures: Tensor) -> list[np.ndarray]:
    """The first of b 3 h w in [-1, 1], large ones reduced, as uint8 h w 3."""
    pictures = pictures[:COLUMNS].float().cpu()
    if pictures.shape[-1] > LARGEST:
        pictures = F.interpolate(pictures, size=LARGEST, mode="area")
    return eight_bit(pictures)
