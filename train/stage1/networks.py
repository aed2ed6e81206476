"""What a stage 1 run stands on: the UNet to train and everything frozen, by its settings."""

from __future__ import annotations

import os
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from gendr.networks.onestep import StepConfig
from gendr.networks.unet import SD21_16, TINY_UNET, UNet
from gendr.networks.vae import SD_VAE, TINY_VAE, VAE, VAE16
from train import embeddings, layers
from train import memory as estimate
from train.features import CELL, DinoV2, Projector
from train.memory import gib
from train.stage1 import pretrained, prompts
from train.stage1.pretrained import PretrainedError
from train.stage1.step import Denoiser, Objective, Rules
from train.stage2.plan import ENCODER_SIZES
from train.stage2.scores import recompute_blocks

# Parameters of what only a download could tell, for the plan of a run.
TEXT_ENCODER = 340_387_840


@dataclass
class Foundation:
    """Networks and prompts of a run. config: of what is exported; facts: where everything is from."""

    denoiser: Denoiser
    vae: VAE
    prompts: prompts.Prompts
    objective: Objective
    config: StepConfig
    facts: list[dict[str, Any]]
    licence: str | None

    @classmethod
    def load(cls, settings: Any, device: torch.device) -> Foundation:
        """By the settings of train.repa. The errors of what is read name what doesn't fit."""
        s = settings
        bf16 = s.precision == "bf16"
        dtype = torch.bfloat16 if bf16 else None
        operations = layers if bf16 and device.type == "cpu" else nn
        facts: list[dict[str, Any]] = []
        licence = None
        vae_part = pretrained.read_vae(vae_source(s))
        facts.append(vae_part.facts)
        if s.base:
            part = pretrained.read_unet(s.base, s.revision or None)
            if part.prediction not in (None, s.prediction):
                raise PretrainedError(
                    f"{s.base} was trained to predict {part.prediction}: give --prediction "
                    f"{part.prediction}, or a base that predicts {s.prediction}"
                )
            facts.append(part.facts)
            licence = part.facts["licence"]
            unet = pretrained.new_unet(part, s.channels, s.seed, operations=operations)
        else:
            licence = vae_part.facts["licence"]
            with torch.random.fork_rng(devices=[]):
                torch.manual_seed(s.seed)
                unet = pretrained.silence(
                    UNet(replace(TINY_UNET, latent_channels=s.channels), operations=operations)
                )
        if vae_part.config.latent_channels != s.channels:
            raise PretrainedError(
                f"{vae_source(s)} has {vae_part.config.latent_channels} latent channels, the run "
                f"{s.channels}: give --channels {vae_part.config.latent_channels} or another --vae"
            )
        vae = pretrained.new_vae(vae_part, operations=operations).to(device)
        said = read_prompts(s, unet)
        facts.append(said[0].facts)
        conditions = prompts.Prompts(
            said[0], encoder=said[1], seed=s.seed, device=device, dtype=dtype
        )
        encoder = DinoV2.load(s.encoder).to(device, dtype) if s.lambda_repa else None
        projector = None
        if encoder is not None:
            with torch.random.fork_rng(devices=[]):
                torch.manual_seed(s.seed + 1)
                projector = Projector(unet.config.block_out_channels[0], encoder.width)
            name = Path(s.encoder).resolve().name if Path(s.encoder).exists() else s.encoder
            facts.append({"part": "encoder", "id": name})
        if s.recompute:
            recompute_blocks(unet)
        denoiser = Denoiser(unet.train(), projector, dtype).to(device)
        if device.type == "cuda":
            for module in (denoiser, vae):
                module.to(memory_format=torch.channels_last)
        rules = Rules(
            prediction=s.prediction,
            lambda_repa=s.lambda_repa,
            drop=s.drop,
            posterior=s.posterior,
            scale=s.scale,
            seed=s.seed,
        )
        config = StepConfig(
            unet=unet.config,
            vae=vae.config,
            prediction_type=s.prediction,
            alpha=s.constant,
            beta=s.constant,
        )
        check_sizes(s, config)
        objective = Objective(vae, encoder, conditions, rules, dtype)
        return cls(denoiser, vae, conditions, objective, config, facts, licence)


def vae_source(settings: Any) -> str:
    """Where the autoencoder comes from."""
    return settings.vae or (pretrained.VAE16 if settings.channels == 16 else settings.base)


def read_prompts(settings: Any, unet: UNet) -> tuple[prompts.Fixed, embeddings.TextEncoder | None]:
    """The fixed prompts, and the text encoder where captions are used."""
    s, width = settings, unet.config.cross_attention_dim
    encoder = None
    if s.prompts == "random":
        fixed = prompts.random_prompts(unet.config.tokens, width, s.seed)
    elif s.prompts == "captions":
        if Path(s.base).is_file():
            raise PretrainedError(
                f"{s.base} is one file without a text encoder: give --prompts a file made by "
                "`python -m train.embeddings`, or a base in diffusers' layout"
            )
        encoder = embeddings.load_encoder(s.base, revision=s.revision or None)
        fixed = prompts.from_encoder(encoder)
    else:
        fixed = prompts.from_file(s.prompts)
    if (found := fixed.embeds["positive"].shape[-1]) != width:
        raise PretrainedError(
            f"the prompts have width {found}, the UNet attends to {width}: they belong to another "
            "model; make them with the base's own text encoder"
        )
    return fixed, encoder


def check_sizes(settings: Any, config: StepConfig) -> None:
    """Crops that the networks can take; ValueError names the multiple."""
    for size in settings.sizes:
        need = max(config.multiple, CELL) if settings.lambda_repa else config.multiple
        if size % need or size % settings.scale:
            raise ValueError(f"sizes must be multiples of {need} pixels here, not {size}")


# ---- the plan ----


def plan(settings: Any) -> str:
    """What a run would train, read and need, told without reading weights."""
    s, world = settings, int(os.environ.get("WORLD_SIZE", "1"))
    local = pretrained.read_unet(s.base).config if s.base and Path(s.base).exists() else None
    config = local or (SD21_16 if s.base else TINY_UNET)
    config = replace(config, latent_channels=s.channels)
    known = {VAE16.latent_channels: VAE16, SD_VAE.latent_channels: SD_VAE}
    vae_config = known[s.channels] if s.base else TINY_VAE
    if Path(vae_source(s)).exists():
        vae_config = pretrained.read_vae(vae_source(s)).config
    width, encoder = ENCODER_SIZES.get(s.encoder, (768, 0)) if s.lambda_repa else (0, 0)
    with torch.device("meta"):
        unet, vae = UNet(config), VAE(vae_config)
        slim = UNet(config)
        projector = Projector(config.block_out_channels[0], width) if width else None
    recompute_blocks(slim)
    count = {
        "UNet": estimate.parameters(unet),
        "projector": estimate.parameters(projector),
        "autoencoder": estimate.parameters(vae),
        "encoder": encoder,
        "text encoder": TEXT_ENCODER if s.prompts == "captions" else 0,
    }
    trained = count["UNet"] + count["projector"]
    bf16 = s.precision == "bf16"
    rows: list[tuple[object, ...]] = [
        ("trained", "UNet", f"{count['UNet']:,}", "parameters"),
        ("", "projector", f"{count['projector']:,}", "parameters"),
        *(("frozen", k, f"{v:,}", "parameters") for k, v in list(count.items())[2:] if v),
        ("fixed memory", "weights, gradients, AdamW", gib(estimate.training_bytes(trained, ema=False)), ""),
    ]  # fmt: skip
    fixed = estimate.training_bytes(trained, ema=False)
    if s.ema:
        ema = estimate.frozen_bytes(trained)
        rows.append(("", "averaged weights", gib(ema), "of the CPU" if s.ema_on_cpu else ""))
        fixed += 0 if s.ema_on_cpu else ema
    if bf16:
        copies = estimate.frozen_bytes(trained, torch.bfloat16)
        rows.append(("", "bf16 copies in a step", gib(copies), ""))
        fixed += copies
    half = torch.bfloat16 if bf16 else torch.float32
    frozen = estimate.frozen_bytes(count["autoencoder"])
    frozen += estimate.frozen_bytes(count["encoder"] + count["text encoder"], half)
    rows.append(("", "frozen networks", gib(frozen), ""))
    fixed += frozen
    for n, phase in enumerate(s.plan(), 1):
        micro = phase.micro_batch
        z, context = estimate.sample(config, phase.size, factor=vae_config.factor)
        watched = slim if s.recompute else unet
        each = estimate.activation_bytes(watched, z, 500, context, autocast=bf16)
        block = estimate.block_bytes(unet, z, 500, context, autocast=bf16) if s.recompute else 0
        name = f"phase {n}: {phase.kind} {phase.size}"
        rows += [
            (name, "steps", f"{phase.last - phase.first:,}", f"lr {phase.lr:g}"),
            ("", "pictures", f"{(phase.last - phase.first) * s.batch:,}", f"{s.batch:,} per step"),
            ("", "micro-batches", f"{accumulation(s.batch, micro, world):,}",
             f"of {micro} in each of {world} process{'es' if world > 1 else ''}"),
            ("", "activations", gib(micro * (each + block)),
             f"{gib(each)} per picture" + (f" + {gib(block)} of a block in hand" if block else "")),
            ("", "memory", gib(fixed + micro * (each + block)), "in all, per process"),
        ]  # fmt: skip
    sources = [
        ("base", s.base or "none (GenDR-Tiny's UNet)"),
        ("autoencoder", vae_source(s)),
        ("prompts", s.prompts),
        ("data", ", ".join(s.data) or "none yet: --data"),
    ]
    return f"{estimate.table(sources)}\n\n{estimate.table(rows)}"


def accumulation(batch: int, micro: int, world: int) -> int:
    """Micro-batches of a step in each process; ValueError where they don't divide."""
    if batch % (micro * world):
        raise ValueError(
            f"a batch of {batch} is not a multiple of {world} processes x {micro} pictures: change "
            "batch or micro_batch"
        )
    return batch // (micro * world)
