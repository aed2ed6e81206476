"""What a stage 1 run would take, before it starts: networks, memory, pictures of each phase."""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path

import torch

from gendr.networks.blocks import Unset
from gendr.networks.unet import SD21_16, TINY_UNET, UNet, UNetConfig
from gendr.networks.vae import SD_VAE, TINY_VAE, VAE, VAE16
from train import memory
from train.checkpointing import recompute_blocks
from train.data.stream import accumulation
from train.features import ENCODER_SIZES, Projector
from train.processes import told
from train.stage1 import pretrained
from train.stage1.networks import vae_source
from train.stage1.settings import Settings

# Parameters of what only a download could tell.
TEXT_ENCODER = 340_387_840


def unet_config(settings: Settings) -> UNetConfig:
    """The UNet of a run, of SD2.1's size where its base is still to be fetched."""
    s = settings
    local = pretrained.read_unet(s.base).config if s.base and Path(s.base).exists() else None
    config = local or (SD21_16 if s.base else TINY_UNET)
    return replace(config, latent_channels=s.channels)


def plan(settings: Settings) -> str:
    """What a run would train, read and need, told without reading weights."""
    s, world = settings, int(os.environ.get("WORLD_SIZE", "1"))
    config = unet_config(s)
    known = {VAE16.latent_channels: VAE16, SD_VAE.latent_channels: SD_VAE}
    vae_config = known[s.channels] if s.base else TINY_VAE
    if Path(vae_source(s)).exists():
        vae_config = pretrained.read_vae(vae_source(s)).config
    width, encoder = ENCODER_SIZES.get(s.encoder, (768, 0)) if s.lambda_repa else (0, 0)
    with torch.device("meta"):
        unet, slim = UNet(config, operations=Unset), UNet(config, operations=Unset)
        vae = VAE(vae_config, operations=Unset)
        projector = Projector(config.block_out_channels[0], width) if width else None
    recompute_blocks(slim)
    count = {
        "UNet": memory.parameters(unet),
        "projector": memory.parameters(projector),
        "autoencoder": memory.parameters(vae),
        "encoder": encoder,
        "text encoder": TEXT_ENCODER if s.prompts == "captions" else 0,
    }
    trained = count["UNet"] + count["projector"]
    # FSDP2 splits what belongs to weights among the processes.
    pieces = world if told("ACCELERATE_USE_FSDP") else 1
    split = f"split among {pieces}" if pieces > 1 else ""
    bf16 = s.precision == "bf16"
    rows: list[tuple[object, ...]] = [
        ("trained", "UNet", f"{count['UNet']:,}", "parameters"),
        ("", "projector", f"{count['projector']:,}", "parameters"),
        *(("frozen", k, f"{v:,}", "parameters") for k, v in list(count.items())[2:] if v),
    ]  # fmt: skip
    fixed = memory.training_bytes(trained, ema=False) // pieces
    rows.append(("fixed memory", "weights, gradients, AdamW", memory.gib(fixed), split))
    if s.ema:
        ema = memory.frozen_bytes(trained) // pieces
        where = ", ".join(filter(None, (split, "of the CPU" if s.ema_on_cpu else "")))
        rows.append(("", "averaged weights", memory.gib(ema), where))
        fixed += 0 if s.ema_on_cpu else ema
    if bf16:
        copies = memory.frozen_bytes(trained, torch.bfloat16)
        rows.append(("", "bf16 copies in a step", memory.gib(copies), ""))
        fixed += copies
    half = torch.bfloat16 if bf16 else torch.float32
    frozen = memory.frozen_bytes(count["autoencoder"])
    frozen += memory.frozen_bytes(count["encoder"] + count["text encoder"], half)
    rows.append(("", "frozen networks", memory.gib(frozen), ""))
    fixed += frozen
    for n, phase in enumerate(s.plan(), 1):
        micro = phase.micro_batch
        z, context = memory.sample(config, phase.size, factor=vae_config.factor)
        watched = slim if s.recompute else unet
        each = memory.activation_bytes(watched, z, 500, context, autocast=bf16)
        block = memory.block_bytes(unet, z, 500, context, autocast=bf16) if s.recompute else 0
        name = f"phase {n}: {phase.kind} {phase.size}"
        rows += [
            (name, "steps", f"{phase.last - phase.first:,}", f"lr {phase.lr:g}"),
            ("", "pictures", f"{(phase.last - phase.first) * s.batch:,}", f"{s.batch:,} per step"),
            ("", "micro-batches", f"{accumulation(s.batch, micro, world):,}",
             f"of {micro} in each of {world} process{'es' if world > 1 else ''}"),
            ("", "activations", memory.gib(micro * (each + block)),
             f"{memory.gib(each)} per picture" + (f" + {memory.gib(block)} of a block in hand" if block else "")),
            ("", "memory", memory.gib(fixed + micro * (each + block)), "in all, per process"),
        ]  # fmt: skip
    sources = [
        ("base", s.base or "none (GenDR-Tiny's UNet)"),
        ("autoencoder", vae_source(s)),
        ("prompts", s.prompts),
        ("data", ", ".join(s.data) or "none yet: --data"),
    ]
    return f"{memory.table(sources)}\n\n{memory.table(rows)}"
