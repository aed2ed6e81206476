"""Narrow random SD2.1s and adapters in the layouts of public restorers, made by diffusers and peft.

The networks have SD2.1's module names and counts with few channels. Adapters are saved as each
project's own program saves them; `Made.latent` is what diffusers and peft compute with them, by the
project's own formula, without anything of ours.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from diffusers import AutoencoderKL, DDIMScheduler, UNet2DConditionModel
from peft import LoraConfig, PeftModel
from peft.tuners.tuners_utils import BaseTunerLayer
from test_embeddings import WIDTH, save_encoder
from torch import Tensor

WIDTHS = (32, 64, 96, 96)
# Module names that each project adapts, from its training code.
PATTERNS = [
    "to_k",
    "to_q",
    "to_v",
    "to_out.0",
    "conv",
    "conv1",
    "conv2",
    "conv_in",
    "conv_shortcut",
    "conv_out",
    "proj_out",
    "proj_in",
    "ff.net.2",
    "ff.net.0.proj",
]
VAE_PATTERNS = [
    "conv1",
    "conv2",
    "conv_in",
    "conv_shortcut",
    "conv",
    "conv_out",
    "to_k",
    "to_q",
    "to_v",
    "to_out.0",
]
HYPIR_MODULES = [p for p in PATTERNS if p != "conv_in"]


def new_unet(**changes) -> UNet2DConditionModel:
    settings = {
        "sample_size": 8,
        "in_channels": 4,
        "out_channels": 4,
        "block_out_channels": WIDTHS,
        "layers_per_block": 2,
        "down_block_types": ("CrossAttnDownBlock2D",) * 3 + ("DownBlock2D",),
        "up_block_types": ("UpBlock2D",) + ("CrossAttnUpBlock2D",) * 3,
        "attention_head_dim": tuple(w // 32 for w in WIDTHS),
        "cross_attention_dim": WIDTH,
        "use_linear_projection": True,
    }
    return stirred(UNet2DConditionModel(**{**settings, **changes}))


def new_vae() -> AutoencoderKL:
    return stirred(
        AutoencoderKL(
            block_out_channels=WIDTHS,
            down_block_types=("DownEncoderBlock2D",) * 4,
            up_block_types=("UpDecoderBlock2D",) * 4,
            layers_per_block=2,
            latent_channels=4,
        )
    )


def stirred(network):
    """Biases and norms away from 0 and 1, so that a tensor in the wrong place shows."""
    with torch.no_grad():
        for parameter in network.parameters():
            if parameter.dim() == 1:
                parameter += 0.02 * torch.randn_like(parameter)
    return network


def save_base(folder: Path, *, schedule: dict | None = None, **unet) -> Path:
    """SD2.1-base in diffusers' layout: unet, vae, scheduler, text_encoder, tokenizer."""
    with torch.random.fork_rng():
        torch.manual_seed(21)
        new_unet(**unet).save_pretrained(folder / "unet")
        new_vae().save_pretrained(folder / "vae")
    settings = {
        "beta_start": 0.00085,
        "beta_end": 0.012,
        "beta_schedule": "scaled_linear",
        "prediction_type": "epsilon",
        "clip_sample": False,
    }
    DDIMScheduler(**{**settings, **(schedule or {})}).save_pretrained(folder / "scheduler")
    return save_encoder(folder)


@dataclass
class Made:
    """A file or folder as a project publishes it, and what its own program makes of a picture."""

    path: Path
    latent: Callable[..., Tensor]
    networks: tuple = ()


def unet_of(base: Path) -> UNet2DConditionModel:
    return UNet2DConditionModel.from_pretrained(str(base / "unet"))


def vae_of(base: Path) -> AutoencoderKL:
    return AutoencoderKL.from_pretrained(str(base / "vae"))


def fill(network, scale: float = 0.05) -> None:
    """Random adapters: peft starts them at zero."""
    with torch.no_grad():
        for name, parameter in network.named_parameters():
            if "lora_" in name:
                parameter.copy_(scale * torch.randn_like(parameter))


def abar(t: int) -> Tensor:
    """diffusers' own cumulative product at a timestep."""
    scheduler = DDIMScheduler(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear")
    return scheduler.alphas_cumprod[t]


@torch.no_grad()
def in_float64(x: Tensor, context: Tensor, *networks: torch.nn.Module) -> tuple[Tensor, Tensor]:
    """The inputs in float64, and the networks made so: a reference without rounding of its own."""
    for network in networks:
        network.double()
    return x.double(), context.double()


def encode(vae, x: Tensor) -> Tensor:
    return vae.encode(x).latent_dist.mode() * vae.config.scaling_factor


def groups(unet) -> dict[str, list[str]]:
    """Modules of the encoder, the decoder and the middle, as OSEDiff and PiSA-SR sort them."""
    sorted_: dict[str, list[str]] = {"encoder": [], "decoder": [], "others": []}
    for name, _ in unet.named_parameters():
        if "bias" in name or "norm" in name or not any(p in name for p in PATTERNS):
            continue
        side = "others"
        if "down_blocks" in name or "conv_in" in name:
            side = "encoder"
        elif "up_blocks" in name or "conv_out" in name:
            side = "decoder"
        sorted_[side].append(name.removesuffix(".weight"))
    return sorted_


def pisa(folder: Path, base: Path) -> Made:
    """PiSA-SR: two adapters per module of rank 4; the UNet's output is the residual, at t = 1.

    Its latent takes which of the two are on.
    """
    torch.manual_seed(31)
    unet = unet_of(base)
    parts, names = groups(unet), []
    for adapter in ("pix", "sem"):
        for side, modules in parts.items():
            names.append(f"default_{side}_{adapter}")
            unet.add_adapter(LoraConfig(r=4, target_modules=modules), adapter_name=names[-1])
    fill(unet)
    saved = {
        f"unet_lora_{side}_modules_{adapter}": modules
        for side, modules in parts.items()
        for adapter in ("pix", "sem")
    }
    saved |= {"lora_rank_unet_pix": 4, "lora_rank_unet_sem": 4}
    saved["state_dict_unet"] = {k: v for k, v in unet.state_dict().items() if "lora" in k}
    torch.save(saved, folder / "one.pkl")
    vae = vae_of(base)

    @torch.no_grad()
    def latent(x, context, which=("pix", "sem")):
        unet.set_adapter([n for n in names if n.endswith(which)])
        x, context = in_float64(x, context, unet, vae)
        z = encode(vae, x)
        return z - unet(z, 1, context).sample

    return Made(folder / "one.pkl", latent)


def osediff(folder: Path, base: Path) -> Made:
    """OSEDiff: UNet and VAE encoder of rank 4, conv_in as a whole too; x0 at t = 999."""
    torch.manual_seed(32)
    unet, vae = unet_of(base), vae_of(base)
    parts = groups(unet)
    for side, modules in parts.items():
        unet.add_adapter(LoraConfig(r=4, target_modules=modules), adapter_name=f"default_{side}")
    unet.set_adapter([f"default_{side}" for side in parts])
    inner = []
    for name, _ in vae.named_parameters():
        if "bias" in name or "norm" in name:
            continue
        encoder = "encoder" in name and any(p in name for p in VAE_PATTERNS)
        if encoder or ("quant_conv" in name and "post_quant_conv" not in name):
            inner.append(name.removesuffix(".weight"))
    vae.add_adapter(LoraConfig(r=4, target_modules=inner), adapter_name="default_encoder")
    fill(unet)
    fill(vae)
    with torch.no_grad():
        for parameter in (unet.conv_in.base_layer.weight, unet.conv_in.base_layer.bias):
            parameter += 0.05 * torch.randn_like(parameter)
    saved = {f"unet_lora_{side}_modules": modules for side, modules in parts.items()}
    saved |= {"vae_lora_encoder_modules": inner, "rank_unet": 4, "rank_vae": 4}
    saved["state_dict_unet"] = {
        k: v for k, v in unet.state_dict().items() if "lora" in k or "conv_in" in k
    }
    saved["state_dict_vae"] = {k: v for k, v in vae.state_dict().items() if "lora" in k}
    torch.save(saved, folder / "two.pkl")
    a = abar(999)

    @torch.no_grad()
    def latent(x, context):
        x, context = in_float64(x, context, unet, vae)
        z = encode(vae, x)
        return (z - (1 - a).sqrt() * unet(z, 999, context).sample) / a.sqrt()

    return Made(folder / "two.pkl", latent, (unet, vae))


def merged_osediff(folder: Path, made: Made) -> Made:
    """OSEDiff's file with its adapters merged by peft: whole state dicts of both networks."""
    saved = {
        part: merged_by_peft(network)
        for part, network in zip(("unet", "vae"), made.networks, strict=True)
    }
    torch.save(saved, folder / "three.pkl")
    return Made(folder / "three.pkl", made.latent)


def merged_by_peft(network) -> dict[str, Tensor]:
    """The state dict of a copy whose adapters peft has merged, under the plain names."""
    # In float32 as it was made; `in_float64` may have been at it.
    network = copy.deepcopy(network).float()
    for layer in network.modules():
        if isinstance(layer, BaseTunerLayer):
            layer.merge()
    state = {k: v for k, v in network.state_dict().items() if "lora_" not in k}
    return {k.replace(".base_layer.", "."): v for k, v in state.items()}


def hypir(folder: Path, base: Path) -> Made:
    """HYPIR: one flat LoRA with lora_alpha = rank, here of rank 6; x0 of t = 200 at coeff_t, which its
    latent takes."""
    torch.manual_seed(33)
    unet = unet_of(base)
    unet.add_adapter(LoraConfig(r=6, lora_alpha=6, target_modules=HYPIR_MODULES))
    fill(unet)
    torch.save({k: v for k, v in unet.state_dict().items() if "lora" in k}, folder / "four.pth")
    vae = vae_of(base)

    @torch.no_grad()
    def latent(x, context, coeff_t=200):
        a = abar(coeff_t)
        x, context = in_float64(x, context, unet, vae)
        z = encode(vae, x)
        return (z - (1 - a).sqrt() * unet(z, 200, context).sample) / a.sqrt()

    return Made(folder / "four.pth", latent)


def omgsr(folder: Path, base: Path) -> Made:
    """OMGSR-S: two folders of peft, UNet and VAE encoder, lora_alpha = rank; x0 at t = 273."""
    torch.manual_seed(34)
    unet, vae, a = unet_of(base), vae_of(base), abar(273)
    config = {"lora_alpha": 3, "r": 3, "target_modules": VAE_PATTERNS}
    unet = PeftModel(unet, LoraConfig(**config), adapter_name="unet_lora_adapter")
    name = "vae_encoder_lora_adapter"
    vae.encoder = PeftModel(vae.encoder, LoraConfig(**config), adapter_name=name)
    fill(unet)
    fill(vae)
    unet.save_pretrained(folder / "five")
    vae.encoder.save_pretrained(folder / "five")

    @torch.no_grad()
    def latent(x, context):
        x, context = in_float64(x, context, unet, vae)
        z = encode(vae, x)
        out = unet(z, 273, encoder_hidden_states=context).sample
        return (z - (1 - a).sqrt() * out) / a.sqrt()

    return Made(folder / "five", latent)
