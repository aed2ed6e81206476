"""Which network a file holds, read from the shapes of its tensors."""

from __future__ import annotations

import functools
import re
from collections.abc import Iterable

import torch
from torch import Tensor, nn

from ..networks.blocks import Unset
from ..networks.onestep import OneStep, StepConfig
from ..networks.unet import UNet, UNetConfig
from ..networks.vae import VAE, VAEConfig

# Width of the prompt that a UNet attends to -> the family it belongs to.
FAMILIES = {768: "SD1.5", 1024: "SD2", 2048: "SDXL", 1280: "SDXL refiner"}


# A prompt of 77 tokens is one piece of text to CLIP; longer ones come in several.
MOST_TOKENS = 4096


class CheckpointError(ValueError):
    """A model file that can't be used; the message says why and what to do."""


def numbers(names: Iterable[str], pattern: str) -> int:
    """One more than the largest number that the pattern's group finds, 0 without any."""
    found = [int(m[1]) for n in names if (m := re.match(pattern, n))]
    return max(found, default=-1) + 1


def unet_config(state: dict[str, Tensor], *, ldm: bool = False) -> UNetConfig:
    """The shape of a UNet from its tensors (names without prefix).

    CheckpointError for one that is not shaped like SD2.1, with what it is.
    """
    try:
        config = _ldm_unet_config(state) if ldm else _unet_config(state)
    except (KeyError, IndexError, ValueError) as error:
        raise CheckpointError(
            f"this is {recognise(state)}, not a UNet in the shape of SD2.1 ({error})"
        ) from error
    family = FAMILIES.get(config.cross_attention_dim)
    if family in ("SD1.5", "SDXL", "SDXL refiner"):
        raise CheckpointError(
            f"this is an {family} UNet with {config.latent_channels} latent channels; GenDR needs "
            "one in the shape of SD2.1 with 16 (or 4 for SD2.1's own latent)"
        )
    return config


def _unet_config(state: dict[str, Tensor]) -> UNetConfig:
    levels = numbers(state, r"down_blocks\.(\d+)\.")
    layers = numbers(state, r"down_blocks\.0\.resnets\.(\d+)\.")
    widths = tuple(state[f"down_blocks.{n}.resnets.0.conv1.weight"].shape[0] for n in range(levels))
    attention = tuple(f"down_blocks.{n}.attentions.0.norm.weight" in state for n in range(levels))
    prompt = state["mid_block.attentions.0.transformer_blocks.0.attn2.to_k.weight"].shape[1]
    return UNetConfig(
        latent_channels=state["conv_in.weight"].shape[1],
        block_out_channels=widths,
        attention=attention,
        layers_per_block=layers,
        cross_attention_dim=prompt,
    )


def _ldm_unet_config(state: dict[str, Tensor]) -> UNetConfig:
    pattern = re.compile(r"input_blocks\.(\d+)\.0\.op\.weight$")
    downs = sorted(int(found[1]) for name in state if (found := pattern.match(name)))
    layers = downs[0] - 1
    levels = len(downs) + 1
    widths, attention = [], []
    for level in range(levels):
        first = f"input_blocks.{1 + level * (layers + 1)}"
        widths.append(state[f"{first}.0.in_layers.2.weight"].shape[0])
        attention.append(f"{first}.1.norm.weight" in state)
    prompt = state["middle_block.1.transformer_blocks.0.attn2.to_k.weight"].shape[1]
    return UNetConfig(
        latent_channels=state["input_blocks.0.0.weight"].shape[1],
        block_out_channels=tuple(widths),
        attention=tuple(attention),
        layers_per_block=layers,
        cross_attention_dim=prompt,
    )


@functools.lru_cache(maxsize=16)
def wanted_shapes(config: StepConfig) -> dict[str, tuple[int, ...]]:
    """Names and shapes of the tensors that the networks of a configuration load, prompts left out."""
    with torch.device("meta"):
        if config.unet.prompts:
            parts: dict[str, nn.Module] = {"": OneStep(config, operations=Unset)}
        else:
            unet = UNet(config.unet, operations=Unset)
            parts = {"unet.": unet, "vae.": VAE(config.vae, operations=Unset)}
    return {p + k: tuple(v.shape) for p, n in parts.items() for k, v in n.state_dict().items()}


def check_tensors(config: StepConfig, tensors: dict[str, Tensor]) -> None:
    """CheckpointError for the first tensor that the networks of this shape lack, or have otherwise."""
    wanted = wanted_shapes(config)
    if missing := [name for name in wanted if name not in tensors]:
        raise CheckpointError(
            f"it is incomplete: {missing[0]} is missing ({len(missing)} of {len(wanted)} tensors "
            "are); get the file again"
        )
    for name, shape in wanted.items():
        found = tuple(tensors[name].shape)
        if found != shape:
            raise CheckpointError(
                f"its {name} is of shape {found}, its configuration says {shape}: get the file again"
            )
    known = ("encoder.", "unet.", "decoder.", "vae.", "post_quant_conv.")
    if unknown := [k for k in tensors if k.startswith(known) and k not in wanted]:
        raise CheckpointError(
            f"it has {unknown[0]} ({len(unknown)} such tensors), which its configuration has no place "
            "for: get the file again"
        )
    if not config.unet.prompts:
        check_prompts({k: v for k, v in tensors.items() if k.startswith("embeds.")}, config.unet)


def check_prompts(embeds: dict[str, Tensor], config: UNetConfig) -> None:
    """CheckpointError where the fixed prompts are not what the UNet attends to."""
    if "embeds.positive" not in embeds:
        raise CheckpointError("it is incomplete: embeds.positive, the fixed prompt, is missing")
    tokens = embeds["embeds.positive"].shape[1:2]
    for name, tensor in embeds.items():
        shape = tuple(tensor.shape)
        fits = shape == (1, *tokens, config.cross_attention_dim) and 0 < shape[1] <= MOST_TOKENS
        if not fits:
            raise CheckpointError(
                f"its {name} is of shape {shape}, which must be 1 prompt of as many tokens as the "
                f"positive one, {config.cross_attention_dim} numbers each: export the file again"
            )


def vae_config(state: dict[str, Tensor]) -> VAEConfig:
    """The shape of an autoencoder from its tensors, in diffusers' or LDM's names."""
    old = any(k.startswith("encoder.down.") for k in state)
    block = r"encoder\.down\.{}\.block" if old else r"encoder\.down_blocks\.{}\.resnets"
    try:
        levels = numbers(state, r"encoder\.down(?:_blocks)?\.(\d+)\.")
        layers = numbers(state, block.format(0) + r"\.(\d+)\.")
        widths = tuple(
            state[block.format(n).replace("\\", "") + ".0.conv1.weight"].shape[0]
            for n in range(levels)
        )
        latent = state["decoder.conv_in.weight"].shape[1]
    except (KeyError, IndexError, ValueError) as error:
        raise CheckpointError(
            f"this is not an autoencoder of Stable Diffusion's kind ({error})"
        ) from error
    return VAEConfig(
        latent_channels=latent,
        block_out_channels=widths,
        layers_per_block=layers,
        quant_conv=any(name.startswith(("quant_conv.", "post_quant_conv.")) for name in state),
        mid_attention=any(".mid_block.attentions." in k or ".mid.attn_1." in k for k in state),
        scaling_factor=0.18215 if latent == 4 else VAEConfig().scaling_factor,
    )


def recognise(tensors: dict[str, Tensor]) -> str:
    """A few words for what a set of tensors seems to be."""

    def has(*parts: str) -> bool:
        return all(any(part in name for name in tensors) for part in parts)

    if not tensors:
        return "a file without tensors"
    if has("unet.conv_in.", "vae.", "embeds."):
        return "a GenDR checkpoint that lost its header"
    if has("encoder.conv_in.", "unet.conv_in.", "decoder.conv_in."):
        return "a folded GenDR file that lost its header"
    if has(".lora_A") or has("lora_down"):
        return "a LoRA"
    for name, tensor in tensors.items():
        if name.endswith(("attn2.to_k.weight",)) and tensor.dim() == 2:
            family = FAMILIES.get(tensor.shape[1])
            first = next(
                (
                    t
                    for n, t in tensors.items()
                    if n.endswith(("conv_in.weight", "input_blocks.0.0.weight"))
                ),
                None,
            )
            channels = f" with {first.shape[1]} latent channels" if first is not None else ""
            return f"{f'an {family}' if family else 'a diffusion'} UNet{channels}"
    if has("double_blocks.") or has("transformer_blocks.", "context_embedder"):
        return "a diffusion transformer (Flux, SD3 or the like)"
    if has("encoder.", "decoder.", "conv_in"):
        return "an autoencoder (VAE)"
    if has("text_model.") or has("token_embedding"):
        return "a text encoder"
    if has("body.", "conv_first") or has("model.0.weight") or has("model.1.sub.") or has("params"):
        return "an upscaling network of the ESRGAN kind (ComfyUI's Load Upscale Model takes it)"
    return f"a model of an unknown kind ({len(tensors)} tensors, first {next(iter(tensors))!r})"
