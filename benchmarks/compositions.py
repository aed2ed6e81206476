"""What is compared: the same step put together in different ways, cut into the same stages.

A: what a person composes from public parts: text encoder, scheduler step, plain diffusers, float32.
B: plain diffusers with the prompt's embedding kept, in the dtype that ours runs in.
C: ours, folded, run eagerly. D: ours on the fast path (`gendr.speed`). E: ours in float32, which
shows what folding alone changes. A and B need diffusers, A transformers too; they are imported
when they are asked for.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from gendr.networks.blocks import Unset
from gendr.networks.onestep import OneStep, StepConfig, folded_config
from gendr.networks.unet import UNetConfig
from gendr.networks.vae import VAE, VAEConfig
from gendr.schedule import BETA_END, BETA_START, STEPS, alpha_bar, beta_bar
from gendr.speed.runners import Eager

from .macs import Stage

NAMES = {
    "A": "users' composition, fp32",
    "B": "plain, fixed prompt",
    "C": "gendr",
    "D": "gendr, fast path",
    "E": "gendr, fp32",
}
# The text encoder of Stable Diffusion 2.1; the vocabulary's start and end, and its padding.
TOKENS, WIDTH = 77, 1024
START, END, PADDING = 49406, 49407, 0


class Plain:
    """Diffusers' networks as they are published, composed by hand.

    by_scheduler: Eq. 2 by diffusers' scheduler, where it has these constants; else by its formula.
    text: the text encoder runs in every call, on fixed token ids; without it `context` stays.
    own_prompt: whether the encoder's output is the prompt; else it runs for its cost alone.
    """

    def __init__(
        self,
        config: StepConfig,
        unet: nn.Module,
        vae: nn.Module,
        context: Tensor,
        *,
        dtypes: tuple[torch.dtype, torch.dtype],
        by_scheduler: bool = False,
        text: nn.Module | None = None,
        own_prompt: bool = True,
    ):
        self.config, self.unet, self.vae, self.context = config, unet, vae, context
        self.dtypes, self.text, self.own_prompt = dtypes, text, own_prompt
        self.scheduler = scheduler(config) if by_scheduler else None

    def stages(self) -> list[Stage]:
        """Names and functions, each taking what the one before gave."""
        steps: list[Stage] = [("encode", self.encode), ("UNet", self.step), ("decode", self.decode)]
        return steps if self.text is None else [("prompt", self.prompt), *steps]

    def whole(self) -> Callable[[Tensor], Tensor]:
        """All stages one after another."""

        def run(x: Tensor) -> Tensor:
            for _, stage in self.stages():
                x = stage(x)
            return x

        return run

    def prompt(self, x: Tensor) -> Tensor:
        """Run the text encoder; the picture passes by."""
        ids = torch.full((1, TOKENS), PADDING, device=x.device)
        # A short prompt: its start, words, its end.
        ids[0, 0], ids[0, 1:5], ids[0, 5] = START, 320, END
        hidden = self.text(ids).last_hidden_state
        if self.own_prompt:
            self.context = hidden.to(self.dtypes[1])
        return x

    def encode(self, x: Tensor) -> Tensor:
        x = x.to(self.dtypes[0])
        if isinstance(self.vae, VAE):
            return self.vae.encode(x).to(self.dtypes[1])
        mean, c = self.vae.encode(x).latent_dist.mode(), self.config.vae
        return ((mean - (c.shift_factor or 0.0)) * c.scaling_factor).to(self.dtypes[1])

    def step(self, z: Tensor) -> Tensor:
        t = self.config.t_start
        out = self.unet(z, t, encoder_hidden_states=self.context).sample
        if self.scheduler is not None:
            return self.scheduler.step(out, t, z).pred_original_sample
        skip, factor = self.config.coefficients
        return skip * z + factor * out

    def decode(self, z: Tensor) -> Tensor:
        z, c = z.to(self.dtypes[0]), self.config.vae
        if isinstance(self.vae, VAE):
            return self.vae.decode(z).float()
        return self.vae.decode(z / c.scaling_factor + (c.shift_factor or 0.0)).sample.float()


class Ours:
    """The folded network, as `GenDR` runs it. runner: of its speed."""

    def __init__(self, network: OneStep, runner: Eager | None = None):
        self.network, self.runner, self.told = network, runner or Eager(), []

    def stages(self) -> list[Stage]:
        """Names and functions, each taking what the one before gave."""
        n = self.network
        parts = [("encode", n.encode), ("UNet", n.step), ("decode", n.decode)]
        return [(name, self.through(name, fn)) for name, fn in parts]

    def whole(self) -> Callable[[Tensor], Tensor]:
        """All stages as one pass, as a tile goes."""
        n = self.network
        return self.through("pass", lambda x: n.decode(n.step(n.encode(x))))

    def through(self, name: str, fn: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
        return lambda x: self.runner.run(name, fn, x, self.told.append)


def scheduler(config: StepConfig) -> Any:
    """Diffusers' scheduler where its step is this model's Eq. 2; None where only a formula is."""
    from diffusers import DDPMScheduler

    t = config.t_start
    own = (config.alpha, config.beta)
    if not all(
        math.isclose(a, float(b), rel_tol=1e-6)
        for a, b in zip(own, (alpha_bar(t), beta_bar(t)), strict=True)
    ):
        return None
    made = DDPMScheduler(
        num_train_timesteps=STEPS,
        beta_schedule="scaled_linear",
        beta_start=BETA_START,
        beta_end=BETA_END,
        prediction_type=config.prediction_type,
        clip_sample=False,
    )
    made.set_timesteps(timesteps=[t])
    return made


def expressible(config: VAEConfig) -> bool:
    """Whether diffusers' AutoencoderKL can have this shape."""
    return config.patch_size == 1 and config.norm_num_groups > 0 and not config.linear_path


def plain_unet(c: UNetConfig) -> nn.Module:
    """Diffusers' UNet of this shape."""
    from diffusers import UNet2DConditionModel
    from diffusers.utils import logging

    # Advice for other ways of loading than the one here.
    logging.set_verbosity_error()
    down = ["CrossAttnDownBlock2D" if a else "DownBlock2D" for a in c.attention]
    up = ["CrossAttnUpBlock2D" if a else "UpBlock2D" for a in reversed(c.attention)]
    return UNet2DConditionModel(
        in_channels=c.latent_channels,
        out_channels=c.latent_channels,
        block_out_channels=c.block_out_channels,
        layers_per_block=c.layers_per_block,
        down_block_types=tuple(down),
        up_block_types=tuple(up),
        # Diffusers' name for the number of heads.
        attention_head_dim=tuple(w // c.head_dim for w in c.block_out_channels),
        cross_attention_dim=c.cross_attention_dim,
        use_linear_projection=True,
        norm_num_groups=c.norm_num_groups,
    )


def plain_vae(c: VAEConfig) -> nn.Module:
    """Diffusers' autoencoder of this shape, or ours where diffusers has none."""
    if not expressible(c):
        return VAE(c)
    from diffusers import AutoencoderKL

    levels = len(c.block_out_channels)
    return AutoencoderKL(
        latent_channels=c.latent_channels,
        block_out_channels=c.block_out_channels,
        layers_per_block=c.layers_per_block,
        norm_num_groups=c.norm_num_groups,
        down_block_types=("DownEncoderBlock2D",) * levels,
        up_block_types=("UpDecoderBlock2D",) * levels,
        mid_block_add_attention=c.mid_attention,
        use_quant_conv=c.quant_conv,
        use_post_quant_conv=c.quant_conv,
    )


def text_encoder() -> nn.Module:
    """The text encoder of Stable Diffusion 2.1, 340,387,840 parameters."""
    from transformers import CLIPTextConfig, CLIPTextModel

    return CLIPTextModel(
        CLIPTextConfig(
            vocab_size=49408,
            hidden_size=WIDTH,
            intermediate_size=4096,
            num_hidden_layers=23,
            num_attention_heads=16,
            max_position_embeddings=TOKENS,
            hidden_act="gelu",
            projection_dim=512,
        )
    )


def has_text_encoder(config: UNetConfig, tokens: int) -> bool:
    """Whether SD2.1's text encoder makes prompts of this network's shape."""
    return (config.cross_attention_dim, tokens) == (WIDTH, TOKENS)


def on_meta(
    letter: str, config: StepConfig, tokens: int, dtypes: tuple[torch.dtype, torch.dtype]
) -> tuple[Any, int]:
    """(composition without weights, bytes of its weights), for counting."""
    vae_dtype, unet_dtype = dtypes
    with torch.device("meta"):
        if letter in "CDE":
            network = OneStep(folded_config(config, 1, tokens), operations=Unset)
            for name, child in network.named_children():
                child.to(unet_dtype if name == "unet" else vae_dtype)
            network.compute = dtypes
            return Ours(network), weight_bytes(network)
        unet, vae = plain_unet(config.unet).to(unet_dtype), plain_vae(config.vae).to(vae_dtype)
        context = torch.empty(1, tokens, config.unet.cross_attention_dim, dtype=unet_dtype)
        text = None
        if letter == "A" and has_text_encoder(config.unet, tokens):
            text = text_encoder()
    made = Plain(config, unet, vae, context, dtypes=dtypes, by_scheduler=letter == "A", text=text)
    return made, sum(weight_bytes(m) for m in (unet, vae, text) if m is not None)


def weight_bytes(module: nn.Module) -> int:
    """Bytes of all parameters."""
    return sum(p.numel() * p.element_size() for p in module.parameters())
