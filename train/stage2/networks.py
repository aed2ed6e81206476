"""The networks of a stage 2 run, built from checkpoints: generator, scores, heads, encoders."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from gendr.files import checkpoint
from gendr.files.checkpoint import CheckpointError
from gendr.files.header import Header
from gendr.networks.onestep import StepConfig
from gendr.networks.unet import UNet
from gendr.networks.vae import VAE
from train import layers
from train.checkpointing import recompute_blocks
from train.embeddings import TextEncoder, load_encoder
from train.features import DinoV2, Projector
from train.stage2.discriminator import Discriminator
from train.stage2.scores import Adapter, Scores
from train.stage2.settings import Settings
from train.stage2.step import Generator


class AdapterState:
    """One adapter as something with a state."""

    def __init__(self, scores: Scores, adapter: Adapter):
        self.scores, self.adapter = scores, adapter

    def state_dict(self) -> dict[str, Tensor]:
        return self.scores.adapter_state(self.adapter)

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        self.scores.load_adapter_state(self.adapter, state)


@dataclass
class Source:
    """A checkpoint's header and tensors, by part."""

    header: Header
    config: StepConfig
    unet: dict[str, Tensor]
    vae: dict[str, Tensor]
    embeds: dict[str, Tensor]
    sha256: str

    @classmethod
    def read(cls, path: str, what: str) -> Source:
        """A full GenDR checkpoint in float32; CheckpointError where there is none."""
        if not path:
            raise CheckpointError(f"no {what} given: name a GenDR checkpoint with --{what}")
        header, tensors = checkpoint.read(Path(path))
        checkpoint.check_full(header, Path(path), "can't be trained")
        sha256 = header.sha256 or checkpoint.digest(tensors)
        parts = checkpoint.split({k: v.float() for k, v in tensors.items()})
        return cls(header, header.config, parts["unet"], parts["vae"], parts["embeds"], sha256)

    def network(self, operations: Any) -> UNet:
        """A UNet with these weights."""
        unet = UNet(self.config.unet, operations=operations)
        unet.load_state_dict(self.unet)
        return unet


class Networks:
    """Everything that a run trains or looks at.

    config, header: of what will be exported. prompt, null: of the scores, 1 m d. text: where each
    picture's caption is used instead of the prompt.
    """

    def __init__(
        self,
        generator: Generator,
        vae: VAE,
        scores: Scores | None,
        heads: Discriminator | None,
        encoder: DinoV2 | None,
        text: TextEncoder | None,
        *,
        start: Source,
        base: Source,
    ):
        self.text = text
        self.generator, self.vae, self.scores = generator, vae, scores
        self.heads, self.encoder = heads, encoder
        self.config, self.header = start.config, start.header
        self.start_embeds, self.sha256 = start.embeds, base.sha256
        device = generator.prompt.device
        self.prompt = base.embeds["positive"].to(device)
        null = base.embeds.get("null")
        self.null = None if null is None else null.to(device)

    @classmethod
    def load(cls, settings: Settings, device: torch.device) -> Networks:
        """By the settings of train.cida. CheckpointError or ValueError name what doesn't fit."""
        s, need = settings, settings.rules
        base = Source.read(s.base, "base")
        start = Source.read(s.generator, "generator") if s.generator else base
        check(s, base, start)
        bf16 = s.precision == "bf16"
        operations = layers if bf16 and device.type == "cpu" else nn
        encoder = DinoV2.load(s.encoder).to(device) if s.lambda3 else None
        unet = start.network(operations)
        if s.recompute:
            recompute_blocks(unet)
        projector = None
        if encoder is not None:
            projector = Projector(start.config.unet.block_out_channels[0], encoder.width)
            if s.projector:
                projector.load_state_dict(load_file(s.projector))
        generator = Generator(unet, start.config, start.embeds["positive"], projector).to(device)
        vae = VAE(start.config.vae, operations=operations)
        vae.load_state_dict(start.vae)
        vae.to(device).requires_grad_(False).eval()
        scores = heads = None
        if need.scores or need.judge:
            unet = base.network(operations).to(device, torch.bfloat16 if bf16 else torch.float32)
            scores = Scores(
                unet,
                lora_rank=s.lora_rank,
                lora_alpha=s.lora_alpha,
                prediction=base.config.prediction_type,
                recompute=s.recompute,
            ).to(device)
        if need.judge:
            groups = math.gcd(32, s.head_width)
            heads = Discriminator(
                base.config.unet, at=s.heads, width=s.head_width, groups=groups
            ).to(device)
        if device.type == "cuda":
            for module in (generator, vae, *(m for m in (scores, heads) if m is not None)):
                module.to(memory_format=torch.channels_last)
        text = None
        if s.prompts == "captions":
            text = load_encoder(s.text_encoder)
            found = (text.tokenizer.model_max_length, text.model.config.hidden_size)
            if found != (wanted := tuple(base.embeds["positive"].shape[1:])):
                raise CheckpointError(
                    f"{s.text_encoder} makes {found[0]} tokens of width {found[1]}, {s.base} was trained "
                    f"with {wanted[0]} of {wanted[1]}: give the text encoder of its own stage 1"
                )
            text.model.to(device, torch.bfloat16 if bf16 else None)
        if s.compile:
            vae.encoder.compile()
            if encoder is not None:
                encoder.model.compile()
        return cls(generator, vae, scores, heads, encoder, text, start=start, base=base)

    def trained(self) -> list[nn.Module]:
        """What must be the same in every process."""
        return [m for m in (self.generator, self.scores, self.heads) if m is not None]

    def adapter(self, name: Adapter) -> AdapterState:
        return AdapterState(self.scores, name)

    def adapter_size(self) -> float:
        """Mean |B| of both adapters: 0 before the first step."""
        if self.scores is None:
            return 0.0
        found = [
            p.detach().abs().mean() for n, p in self.scores.named_parameters() if ".lora_B." in n
        ]
        return float(torch.stack(found).mean())

    def embeds(self) -> dict[str, Tensor]:
        """Prompts of the exported checkpoint."""
        return self.start_embeds


def check(settings: Settings, base: Source, start: Source) -> None:
    """Whether base and generator belong together, and hold what the settings need."""
    s, need = settings, settings.rules
    a, b = base.config, start.config
    same = a.vae == b.vae and all(
        torch.equal(base.vae[k], start.vae.get(k, torch.empty(0)))
        for k in base.vae
        if k.startswith(("encoder.", "quant_conv."))
    )
    if not same:
        raise CheckpointError(
            f"{s.generator} encodes pictures otherwise than {s.base}: both must share one "
            "autoencoder; train the base in the generator's latent (train.repa --vae)"
        )
    if "positive" not in base.embeds or "positive" not in start.embeds:
        raise CheckpointError("the checkpoint holds no positive prompt: export it with one")
    guided = need.scores and (s.kappa_real != 1 or s.kappa_fake != 1)
    if "null" not in base.embeds and (guided or (need.scores and s.drop)):
        raise CheckpointError(
            f"{s.base} holds no empty prompt, which guidance and prompt dropout need: set "
            "kappa_real and kappa_fake to 1 and drop to 0, or take a base that has one"
        )
    if s.crop % a.multiple:
        raise ValueError(
            f"crop must be a multiple of {a.multiple} pixels for this base, not {s.crop}"
        )
