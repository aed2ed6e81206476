"""Tiny networks and pictures for the tests of stage 1."""

from __future__ import annotations

import json
from dataclasses import replace

import conftest
import numpy as np
import torch
from conftest import NARROW, header, random_network
from safetensors.torch import load_file
from transformers import Dinov2Config, Dinov2Model

from gendr.files import checkpoint
from gendr.networks.unet import UNet
from gendr.networks.vae import VAE
from train.data.stream import Batch
from train.features import DinoV2, Projector
from train.stage1.prompts import Prompts, random_prompts
from train.stage1.settings import Rules, Settings
from train.stage1.step import Denoiser, Objective

UNET = replace(NARROW, tokens=3)
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


def save_pairs(folder):
    """Eight crops of 48 px with reduced copies, as `train.pairs` writes them."""
    rng = np.random.default_rng(0)
    rough = torch.from_numpy(rng.random((8, 3, 8, 8)).astype(np.float32))
    hr = torch.nn.functional.interpolate(rough, size=(48, 48), mode="bicubic").clamp(0, 1)
    for part, picture in (("hr", hr), ("lr", torch.nn.functional.avg_pool2d(hr, 4))):
        array = (picture * 255).byte().permute(0, 2, 3, 1).numpy()
        np.save(folder / f"pairs-00000.{part}.npy", array)
    return folder


def save_latent(folder):
    """A GenDR checkpoint whose UNet and autoencoder a run begins from."""
    network = random_network(VAE_, UNET)
    checkpoint.save(folder / "latent.safetensors", network, header(network), dtype="fp32")
    return folder / "latent.safetensors"


def words(latent, data, out, **more):
    options = {
        "base": latent, "vae": latent, "prompts": "random", "data": data, "phases": "full",
        "sizes": 32, "steps": 3, "micro_batch": 2, "batch": 4, "lr": 1e-3, "warmup": 2,
        "lambda_repa": 0.0, "ema": 0.9, "precision": "fp32", "workers": 0, "samples": 2,
        "validate_every": 100, "save_every": 1, "log_every": 1, "codecs": "present", **more,
    }  # fmt: skip
    found = ["--out", str(out), "--device", "cpu", "--no-recompute"]
    for name, value in options.items():
        found += [f"--{name.replace('_', '-')}", str(value)]
    return found


def log(folder):
    return [json.loads(x) for x in (folder / "log.jsonl").read_text().splitlines()]


def states(folder):
    found = torch.load(folder / "state.pt", weights_only=True)
    moments = found["optimizer"]["state"]
    flat = {f"{n}.{k}": v for n, s in moments.items() for k, v in s.items()}
    shadow = {f"ema.{n}": v for n, v in enumerate(found["average"]["shadow_params"])}
    return found["network"] | flat | shadow | {"step": torch.tensor(found["step"])}


def exported(folder):
    """The tensors of a run's model.safetensors."""
    return load_file(folder / "model.safetensors")
