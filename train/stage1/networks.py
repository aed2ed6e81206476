"""What a stage 1 run stands on: the UNet to train and everything frozen, by its settings."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from gendr.networks.onestep import StepConfig
from gendr.networks.unet import TINY_UNET, UNet
from gendr.networks.vae import VAE
from train import embeddings, layers
from train.checkpointing import recompute_blocks
from train.features import CELL, DinoV2, Projector
from train.stage1 import pretrained, prompts
from train.stage1.pretrained import PretrainedError
from train.stage1.settings import Settings
from train.stage1.step import Denoiser, Objective


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
    def load(cls, settings: Settings, device: torch.device) -> Foundation:
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
        config = StepConfig(
            unet=unet.config,
            vae=vae.config,
            prediction_type=s.prediction,
            alpha=s.constant,
            beta=s.constant,
        )
        check_sizes(s, config)
        if s.compile:
            vae.encoder.compile()
            if encoder is not None:
                encoder.model.compile()
        objective = Objective(vae, encoder, conditions, s.rules, dtype)
        return cls(denoiser, vae, conditions, objective, config, facts, licence)


def vae_source(settings: Settings) -> str:
    """Where the autoencoder comes from."""
    return settings.vae or (pretrained.VAE16 if settings.channels == 16 else settings.base)


def read_prompts(
    settings: Settings, unet: UNet
) -> tuple[prompts.Fixed, embeddings.TextEncoder | None]:
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


def check_sizes(settings: Settings, config: StepConfig) -> None:
    """Crops that the networks can take; ValueError names the multiple."""
    for size in settings.sizes:
        need = max(config.multiple, CELL) if settings.lambda_repa else config.multiple
        if size % need or size % settings.scale:
            raise ValueError(f"sizes must be multiples of {need} pixels here, not {size}")
