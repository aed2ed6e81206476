"""What the tests of stage 2 share: rules as a run has them, Eq. 11 as one sum, tiny networks and words."""

from __future__ import annotations

import copy
from dataclasses import replace

import numpy as np
import torch
from conftest import NARROW, header, random_network
from torch import Tensor

from gendr.files import checkpoint
from gendr.networks.onestep import StepConfig
from gendr.networks.unet import UNet
from gendr.networks.vae import VAEConfig
from train.features import Projector
from train.losses import Distillation, Weights
from train.processes import Processes
from train.stage2.discriminator import Discriminator
from train.stage2.scores import Scores
from train.stage2.settings import Rules, Settings
from train.stage2.step import Generator, Iteration, Sample

SMALL = replace(NARROW, latent_channels=4, tokens=3)
STEP = StepConfig(unet=SMALL, vae=VAEConfig(latent_channels=4))


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


def make_iteration(chosen=None, *, seed=0, recompute=False, awake=True):
    """An iteration on tiny networks in float64, every layer of them awake."""
    with torch.random.fork_rng():
        torch.manual_seed(3)
        unet = UNet(SMALL).double()
        base = copy.deepcopy(unet)
        prompt, null = torch.randn(2, 1, 3, 6, dtype=torch.float64)
        projector = Projector(8, 5, hidden=7).double()
        scores = Scores(base, lora_rank=2, lora_alpha=4, prediction="epsilon", recompute=recompute)
        heads = Discriminator(SMALL, at=("mid",), width=8, groups=2).double()
        if awake:
            for name in ("real", "fake"):
                for p in scores.parameters_of(name):
                    torch.nn.init.normal_(p, std=0.2)
            torch.nn.init.normal_(heads.heads["mid"][-1].weight)
    generator = Generator(unet, STEP, prompt, projector)
    return Iteration(
        generator, scores, heads, prompt, null, chosen or rules(), Processes("cpu"), seed=seed
    )


def samples(count=4, micro=4):
    g = torch.Generator().manual_seed(4)
    z_l, z_h = torch.randn(2, count, 4, 4, 4, generator=g, dtype=torch.float64)
    tokens = torch.randn(count, 4, 5, generator=g, dtype=torch.float64)
    return [
        Sample(
            z_l[n : n + micro], z_h[n : n + micro], tokens[n : n + micro], list(range(n, n + micro))
        )
        for n in range(0, count, micro)
    ]


def gradients(it):
    return {
        name: [torch.zeros_like(p) if p.grad is None else p.grad.clone() for p in parameters]
        for name, parameters in it.trained().items()
    }


def both_phases(it, batch, step=0):
    values = it.score_step(batch)
    found = gradients(it)
    values |= it.generator_step(batch, step)
    found["generator"] = gradients(it)["generator"]
    return values, found


def largest_difference(a, b):
    pairs = [(x, y) for name in a for x, y in zip(a[name], b[name], strict=True)]
    return max(float((x - y).abs().max() / y.abs().max().clamp_min(1e-12)) for x, y in pairs)


def save_pairs(folder):
    """Six crops of 64 px with reduced copies, as `train.pairs` writes them."""
    rng = np.random.default_rng(0)
    hr = rng.integers(0, 256, (6, 16, 16, 3), dtype=np.uint8).repeat(4, 1).repeat(4, 2)
    np.save(folder / "pairs-00000.hr.npy", hr)
    np.save(folder / "pairs-00000.lr.npy", hr[:, 2::4, 2::4])
    return folder


def save_base(folder):
    """A tiny base as stage 1 leaves it."""
    network = random_network(prompts=("positive", "negative", "null"))
    checkpoint.save(folder / "base.safetensors", network, header(network), dtype="fp32")
    return folder / "base.safetensors"


def words(base, data, out, **more):
    options = {
        "base": base, "data": data, "out": out, "steps": 3, "batch": 2, "micro_batch": 2, "crop": 32,
        "workers": 0, "warmup": 1, "lora_rank": 2, "lora_alpha": 4, "head_width": 8, "lambda3": 0,
        "precision": "fp32", "lr": 1e-3, "lr_scores": 1e-3, "lr_heads": 1e-3, "log_every": 1,
        "save_every": 1, "validate_every": 2, "device": "cpu", "recompute": False, **more,
    }  # fmt: skip
    found = []
    for name, value in options.items():
        name = name.replace("_", "-")
        if isinstance(value, bool):
            found.append(f"--{name}" if value else f"--no-{name}")
        else:
            found += [f"--{name}", str(value)]
    return found


def state(folder):
    found = torch.load(folder / "state.pt", weights_only=True)
    return {f"{part}.{name}": value for part in found if isinstance(found[part], dict)
            for name, value in found[part].items() if isinstance(value, torch.Tensor)}  # fmt: skip
