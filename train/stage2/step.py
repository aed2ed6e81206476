"""One iteration of CiDA: the score step, then the generator step (section 3.6 of the method).

The generator takes z_l to z_g in one step. Two LoRA adapters on one frozen base, real (phi) and
fake (psi), follow the clean and the generated latents; small heads on the same base's features tell them
apart. Each loss reaches its own parameters alone. All noise belongs to samples by their key
(`train.data.stream`), and gradients are those of the whole batch (`train.processes`).
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable
from contextlib import AbstractContextManager
from typing import NamedTuple

import torch
from torch import Tensor, nn

from gendr import schedule
from gendr.networks.onestep import StepConfig
from gendr.networks.unet import UNet
from train import losses
from train.data.stream import Draw, Purpose, draw
from train.features import Aligned, Projector
from train.losses import full
from train.processes import Processes
from train.stage2 import discriminator
from train.stage2.discriminator import Discriminator
from train.stage2.scores import Adapter, Scores, frozen
from train.stage2.settings import Rules


class Sample(NamedTuple):
    """A micro-batch in latent space: z_l, z_h b c h w; features b n d of the clean picture or None;
    context b m d, what the scores and heads are told of each, or None for the run's prompt."""

    z_l: Tensor
    z_h: Tensor
    features: Tensor | None
    keys: list[int]
    context: Tensor | None = None


class Generator(nn.Module):
    """z_l -> z_g with tokens for REPA: the UNet at one timestep with one prompt, and Eq. 2.

    projector: None without REPA.
    """

    def __init__(
        self, unet: UNet, config: StepConfig, prompt: Tensor, projector: Projector | None = None
    ):
        super().__init__()
        self.config = config
        self.network = Aligned(unet, projector)
        self.register_buffer("prompt", prompt.detach().clone())

    @property
    def unet(self) -> UNet:
        """The UNet alone, as a checkpoint holds it."""
        return self.network.unet

    def forward(self, z_l: Tensor) -> tuple[Tensor, Tensor | None]:
        """Latent b c h w -> (z_g b c h w in float32 at least, tokens b n d or None)."""
        prompt = self.prompt.expand(z_l.shape[0], -1, -1)
        out, tokens = self.network(z_l, self.config.t_start, prompt)
        skip, scale = self.config.coefficients
        return skip * full(z_l) + scale * full(out), tokens


class Log:
    """Sums of what a phase measures; divided by the micro-batches at its end."""

    def __init__(self, count: int):
        self.count, self.values = count, defaultdict(float)

    def add(self, **values: Tensor | float) -> None:
        for name, value in values.items():
            # Not read here: that would wait for the device every time.
            self.values[name] = self.values[name] + torch.as_tensor(value).detach().float()

    def means(self, processes: Processes) -> dict[str, float]:
        """Means over micro-batches and processes."""
        return processes.mean({k: v / self.count for k, v in self.values.items()})


class Iteration:
    """The networks of a run and the two phases on them. Gradients are left in `grad`, averaged.

    prompt, null: 1 m d, for the scores and the heads. dtype: autocast to it, None = as they are.
    """

    def __init__(
        self,
        generator: Generator,
        scores: Scores | None,
        heads: Discriminator | None,
        prompt: Tensor,
        null: Tensor | None,
        rules: Rules,
        processes: Processes,
        *,
        seed: int = 0,
        dtype: torch.dtype | None = None,
    ):
        if scores is None and (rules.scores or rules.judge):
            raise ValueError("distillation and the discriminator need the score networks' base")
        if rules.judge and heads is None:
            raise ValueError("lambda2 is above 0 and there are no heads: give some, or lambda2 0")
        self.generator, self.scores, self.heads = generator, scores, heads
        self.prompt, self.null, self.rules = prompt, null, rules
        self.processes, self.seed, self.dtype = processes, seed, dtype

    def autocast(self) -> AbstractContextManager:
        """The run's precision."""
        kind = self.prompt.device.type
        return torch.autocast(kind, self.dtype, enabled=self.dtype is not None)

    def draw(self, like: Sample, purpose: Purpose) -> Draw:
        """This micro-batch's noise."""
        r, z = self.rules, like.z_h
        return draw(
            like.keys,
            tuple(z.shape[1:]),
            seed=self.seed,
            purpose=purpose,
            first=r.first_step,
            last=r.last_step,
            drop=r.drop,
            device=z.device,
            dtype=z.dtype,
        )

    def told(self, s: Sample) -> Tensor:
        """Prompts of the scores and heads: b m d."""
        if s.context is not None:
            return s.context
        return self.prompt.expand(len(s.keys), -1, -1)

    def trained(self) -> dict[str, list[nn.Parameter]]:
        """Parameters by the optimiser that owns them."""
        found = {"generator": [p for p in self.generator.parameters() if p.requires_grad]}
        if self.rules.scores:
            found["fake"] = self.scores.parameters_of("fake")
            if self.rules.train_real:
                found["real"] = self.scores.parameters_of("real")
        if self.rules.judge:
            found["heads"] = list(self.heads.parameters())
        return found

    # ---- score phase ----

    def score_step(self, samples: Iterable[Sample]) -> dict[str, float]:
        """Gradients of L_psi, L_phi and L_D in the adapters and heads; the generator has none."""
        samples = list(samples)
        log = Log(len(samples))
        for s in samples:
            with torch.no_grad(), self.autocast():
                z_g = self.generator(s.z_l)[0]
            if self.rules.scores:
                self._match(log, s, "fake", z_g, Purpose.FAKE)
                if self.rules.train_real:
                    self._match(log, s, "real", s.z_h, Purpose.REAL)
            if self.rules.judge:
                self._judge(log, s, z_g)
        for name, parameters in self.trained().items():
            if name != "generator":
                self.processes.average(parameters)
        return log.means(self.processes)

    def _match(self, log: Log, s: Sample, adapter: Adapter, z: Tensor, purpose: Purpose) -> None:
        noise = self.draw(s, purpose)
        a, b = schedule.levels(noise.t, z)
        prompt = self.told(s)
        if self.null is not None:
            prompt = torch.where(noise.drop, self.null, prompt)
        z_t = schedule.add_noise(full(z), noise.eps, a, b)
        with self.autocast():
            eps = self.scores(z_t, noise.t, prompt, adapter)
        loss = losses.score_matching(eps, noise.eps, a, b, weighting=self.rules.weighting)
        (loss / log.count).backward()
        log.add(**{f"score_{adapter}": loss})
        # The low and the high noise half by themselves: where a score falls behind shows here.
        with torch.no_grad():
            error = (full(eps) - noise.eps).square().flatten(1).mean(1)
            high = (noise.t > (self.rules.first_step + self.rules.last_step) / 2).to(error)
            log.add(**{
                f"error_{adapter}_low": (error * (1 - high)).sum() / (1 - high).sum().clamp_min(1),
                f"error_{adapter}_high": (error * high).sum() / high.sum().clamp_min(1),
            })  # fmt: skip

    def _noised(self, z: Tensor, noise: Draw) -> tuple[Tensor, Tensor]:
        """What the heads look at, and at which timestep."""
        if self.rules.clean_judge:
            return full(z), torch.zeros_like(noise.t)
        return schedule.add_noise(full(z), noise.eps, *schedule.levels(noise.t, z)), noise.t

    def _judge(self, log: Log, s: Sample, z_g: Tensor) -> None:
        # The same timestep and noise for both, so that nothing but the latent tells them apart.
        noise = self.draw(s, Purpose.JUDGE)
        found = []
        for z in (s.z_h, z_g):
            with torch.no_grad(), self.autocast():
                features = discriminator.features(
                    self.scores, *self._noised(z, noise), self.told(s)
                )
            with self.autocast():
                found.append(self.heads(features))
        loss = losses.discriminator(*found)
        (loss / log.count).backward()
        real, fake = (torch.stack([full(x).mean() for x in logits]).mean() for logits in found)
        log.add(discriminator=loss, logit_real=real, logit_fake=fake)

    # ---- generator phase ----

    def generator_step(self, samples: Iterable[Sample], step: int) -> dict[str, float]:
        """Gradients of L_G, Eq. 11, in the generator and its projector alone.

        step: generator steps before this one; it decides lambda1.
        """
        samples = list(samples)
        log = Log(len(samples))
        others = [m for m in (self.scores, self.heads) if m is not None]
        with frozen(*others):
            for s in samples:
                self._generate(log, s, step)
        self.processes.average(self.trained()["generator"])
        return log.means(self.processes)

    def _generate(self, log: Log, s: Sample, step: int) -> None:
        weights, z_h = self.rules.weights, full(s.z_h)
        with self.autocast():
            z_g, tokens = self.generator(s.z_l)
        noise = self.draw(s, Purpose.PULL)
        leaf = z_g.detach().requires_grad_()
        lambda1 = weights.lambda1_at(step)
        parts: dict[str, Tensor] = {}
        if lambda1:
            with self.autocast():
                pull = self.scores.pull(
                    leaf,
                    z_h,
                    noise.eps,
                    noise.t,
                    self.rules.distillation,
                    self.told(s),
                    null=self.null,
                    kappa_real=self.rules.kappa_real,
                    kappa_fake=self.rules.kappa_fake,
                )
            parts["cid"] = lambda1 * pull.gradient
            w = losses.omega(z_h, pull.f_real).mean()
            log.add(cid=pull.loss, d=(pull.f_real - pull.f_fake).abs().mean(), omega=w)
        if weights.lambda2:
            with self.autocast():
                features = discriminator.features(
                    self.scores, *self._noised(leaf, noise), self.told(s)
                )
                adv = losses.adversarial(self.heads(features))
            parts["adv"] = weights.lambda2 * torch.autograd.grad(adv, leaf)[0]
            log.add(adv=adv)
        mse = losses.consistency(leaf, z_h, self.rules.distillation.reduction)
        direction = torch.autograd.grad(mse, leaf)[0]
        if weights.lambda_mse:
            parts["mse"] = weights.lambda_mse * direction
        if "cid" in parts:
            cosine = torch.cosine_similarity(parts["cid"].flatten(1), direction.flatten(1))
            log.add(cosine_cid_mse=cosine.mean())
        log.add(mse=mse, distance=(leaf.detach() - z_h).abs().mean())
        log.add(
            **{f"pull_{name}": part.flatten(1).norm(dim=1).mean() for name, part in parts.items()}
        )
        gradient = sum(parts.values(), torch.zeros_like(z_g)) / log.count
        if tokens is not None:
            repa = losses.alignment(tokens, s.features)
            log.add(repa=repa)
            torch.autograd.backward(
                [z_g, weights.lambda3 / log.count * repa], [gradient.to(z_g.dtype), None]
            )
        else:
            z_g.backward(gradient.to(z_g.dtype))
