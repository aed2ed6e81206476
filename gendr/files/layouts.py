"""Other people's names for the same tensors, as visible tables of renames."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from torch import Tensor

from ..networks.unet import UNetConfig
from ..networks.vae import VAEConfig

# What training frameworks and older programs put in front of a UNet's own names.
UNET_PREFIXES = ("module.", "_orig_mod.", "generator.", "ema.", "unet.", "model.")
LDM_UNET, LDM_VAE = "model.diffusion_model.", "first_stage_model."

LDM_RESNET = {
    "in_layers.0": "norm1",
    "in_layers.2": "conv1",
    "emb_layers.1": "time_emb_proj",
    "out_layers.0": "norm2",
    "out_layers.3": "conv2",
    "skip_connection": "conv_shortcut",
}
# diffusers' own older names of the autoencoder's attention, and LDM's.
VAE_ATTENTION = {
    "query": "to_q",
    "key": "to_k",
    "value": "to_v",
    "proj_attn": "to_out.0",
    "norm": "group_norm",
    "q": "to_q",
    "k": "to_k",
    "v": "to_v",
    "proj_out": "to_out.0",
}


def strip_prefixes(names: Iterable[str], anchor: str = "conv_in.weight") -> str | None:
    """The prefix under which a diffusers UNet lies, or None: `module.unet.` and the like."""
    for name in names:
        if not name.endswith(anchor):
            continue
        prefix = rest = name[: -len(anchor)]
        while rest:
            found = next((p for p in UNET_PREFIXES if rest.startswith(p)), None)
            if found is None:
                break
            rest = rest[len(found) :]
        if not rest:
            return prefix
    return None


def ldm_unet_table(c: UNetConfig) -> dict[str, str]:
    """LDM module name -> diffusers module name, for a UNet of this shape."""
    table = {
        "time_embed.0": "time_embedding.linear_1",
        "time_embed.2": "time_embedding.linear_2",
        "input_blocks.0.0": "conv_in",
        "out.0": "conv_norm_out",
        "out.2": "conv_out",
        "middle_block.1": "mid_block.attentions.0",
    }

    def resnet(old: str, new: str) -> None:
        table.update({f"{old}.{a}": f"{new}.{b}" for a, b in LDM_RESNET.items()})

    resnet("middle_block.0", "mid_block.resnets.0")
    resnet("middle_block.2", "mid_block.resnets.1")
    levels, n = len(c.block_out_channels), c.layers_per_block
    for level in range(levels):
        for k in range(n):
            old = f"input_blocks.{1 + level * (n + 1) + k}"
            resnet(f"{old}.0", f"down_blocks.{level}.resnets.{k}")
            table[f"{old}.1"] = f"down_blocks.{level}.attentions.{k}"
        old = f"input_blocks.{(level + 1) * (n + 1)}.0.op"
        table[old] = f"down_blocks.{level}.downsamplers.0.conv"
        attends = c.attention[levels - 1 - level]
        for k in range(n + 1):
            old = f"output_blocks.{level * (n + 1) + k}"
            resnet(f"{old}.0", f"up_blocks.{level}.resnets.{k}")
            if attends:
                table[f"{old}.1"] = f"up_blocks.{level}.attentions.{k}"
        table[f"{old}.{2 if attends else 1}.conv"] = f"up_blocks.{level}.upsamplers.0.conv"
    return table


def ldm_vae_table(c: VAEConfig) -> dict[str, str]:
    """LDM module name -> diffusers module name, for an autoencoder of this shape."""
    table = {
        "encoder.norm_out": "encoder.conv_norm_out",
        "decoder.norm_out": "decoder.conv_norm_out",
    }
    levels, n = len(c.block_out_channels), c.layers_per_block
    for side in ("encoder", "decoder"):
        for k in (1, 2):
            table[f"{side}.mid.block_{k}"] = f"{side}.mid_block.resnets.{k - 1}"
        table[f"{side}.mid.attn_1"] = f"{side}.mid_block.attentions.0"
    for level in range(levels):
        for k in range(n + 1):
            if k < n:
                old = f"encoder.down.{level}.block.{k}"
                table[old] = f"encoder.down_blocks.{level}.resnets.{k}"
            old = f"decoder.up.{level}.block.{k}"
            table[old] = f"decoder.up_blocks.{levels - 1 - level}.resnets.{k}"
        old = f"encoder.down.{level}.downsample.conv"
        table[old] = f"encoder.down_blocks.{level}.downsamplers.0.conv"
        old = f"decoder.up.{level}.upsample.conv"
        table[old] = f"decoder.up_blocks.{levels - 1 - level}.upsamplers.0.conv"
    return table


def rename(state: Mapping[str, Any], table: dict[str, str]) -> dict[str, Any]:
    """Every value under its new name; the longest module name that fits wins, others stay."""
    renamed = {}
    for name, value in state.items():
        parts = name.split(".")
        for length in range(len(parts), 0, -1):
            new = table.get(".".join(parts[:length]))
            if new is not None:
                name = ".".join([new, *parts[length:]])
                break
        renamed[name] = value
    return renamed


def ldm_unet_names(names: Iterable[str], c: UNetConfig) -> dict[str, str]:
    """diffusers' name -> LDM's (prefix removed), for the tensors of a UNet."""
    return rename({name: name for name in names}, ldm_unet_table(c))


def vae_names(names: Iterable[str], c: VAEConfig) -> dict[str, str]:
    """diffusers' present name -> the older one or LDM's, for the tensors of an autoencoder."""
    renamed = {}
    for name, old in rename({name: name for name in names}, ldm_vae_table(c)).items():
        name = name.replace(".nin_shortcut.", ".conv_shortcut.")
        found = re.match(r"(.*\.attentions\.0\.)([a-z_]+)\.(weight|bias)$", name)
        if found and found[2] in VAE_ATTENTION:
            name = f"{found[1]}{VAE_ATTENTION[found[2]]}.{found[3]}"
        renamed[name] = old
    return renamed


def linear_shape(name: str, shape: Sequence[int]) -> tuple[int, ...]:
    """Shape under diffusers' name: what older files hold as a 1x1 convolution is linear there."""
    projection = re.search(r"\.proj_(in|out)\.weight$", name) or ".attentions.0.to_" in name
    return tuple(shape[:2] if projection and len(shape) == 4 else shape)


def ldm_unet(state: dict[str, Tensor], c: UNetConfig) -> dict[str, Tensor]:
    """A UNet under LDM names (prefix removed) under diffusers' names; 1x1 projections to linear."""
    return {new: linear(new, state[old]) for new, old in ldm_unet_names(state, c).items()}


def vae(state: dict[str, Tensor], c: VAEConfig) -> dict[str, Tensor]:
    """An autoencoder under LDM's or diffusers' older names under diffusers' present ones."""
    return {new: linear(new, state[old]) for new, old in vae_names(state, c).items()}


def linear(name: str, tensor: Tensor) -> Tensor:
    """The tensor in `linear_shape`."""
    return tensor.reshape(linear_shape(name, tensor.shape))
