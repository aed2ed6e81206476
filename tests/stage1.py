"""Tiny networks and pictures for the tests of stage 1."""

from __future__ import annotations

from dataclasses import replace

import conftest
import torch
from transformers import Dinov2Config, Dinov2Model

from gendr.networks.unet import UNet
from gendr.networks.vae import VAE
from train.data.stream import Batch
from train.features import DinoV2, Projector
from train.stage1.prompts import Prompts, random_prompts
from train.stage1.settings import Rules, Settings
from train.stage1.step import Denoiser, Objective

UNET = replace(
    conftest.UNET,
    block_out_channels=(8, 16),
    head_dim=8,
    cross_attention_dim=6,
    norm_num_groups=4,
    tokens=3,
)
# Scaling and shift away from one and zero, so that forgetting them shows.
VAE_ = replace(conftest.VAE_, block_out_channels=(8, 8), norm_num_groups=4, shift_factor=0.2)
DINO = Dinov2Config(
    hidden_size=16,
    num_hidden_layers=1,
    num_attention_heads=2,
    mlp_ratio=2,
    image_size=28,
    patch_size=14,
)


def rules(**changes) -> Rules:
    """Of the default settings, with changes."""
    return Settings(**changes).rules


def small(chosen=None, *, silent=False, encoder=True, dtype=torch.float64):
    """(denoiser, objective) of tiny networks; silent = as new, with conv_out at zero."""
    with torch.random.fork_rng():
        torch.manual_seed(3)
        unet, vae = UNet(UNET), VAE(VAE_)
        if silent:
            torch.nn.init.zeros_(unet.conv_out.weight)
            torch.nn.init.zeros_(unet.conv_out.bias)
        projector = Projector(8, 16, hidden=12) if encoder else None
        model = Dinov2Model(DINO)
        torch.nn.init.normal_(model.embeddings.position_embeddings)
        prompts = Prompts(random_prompts(3, 6, 0))
    vae = vae.to(dtype).requires_grad_(False)
    dino = DinoV2(model.to(dtype)) if encoder else None
    objective = Objective(vae, dino, prompts, chosen or rules())
    return Denoiser(unet, projector).to(dtype), objective


def pictures(count=4, *, side=32, damaged=False, first=0):
    g = torch.Generator().manual_seed(5)
    hr = torch.rand(count, 3, side, side, generator=g, dtype=torch.float64) * 2 - 1
    lr = torch.rand(count, 3, side // 4, side // 4, generator=g, dtype=torch.float64) * 2 - 1
    keys = list(range(first, first + count))
    return Batch(hr, lr if damaged else None, [""] * count, keys)


def cut(batch, micro):
    return [
        Batch(*(None if x is None else x[n : n + micro] for x in batch))
        for n in range(0, len(batch.keys), micro)
    ]


def gradients(denoiser, objective, batches, *, refine=False):
    denoiser.zero_grad()
    samples = [objective.sample(b, refine=refine) for b in batches]
    values = objective.gradients(denoiser, samples, len(samples))
    return values, [p.grad.clone() for p in denoiser.parameters() if p.grad is not None]
