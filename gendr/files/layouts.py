"""Other people's names for the same tensors, as visible tables of renames."""

from __future__ import annotations

import re
from collections.abc import Iterable

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


def rename(state: dict[str, Tensor], table: dict[str, str]) -> dict[str, Tensor]:
    """Every tensor under its new name; the longest module name that fits wins, others stay."""
    renamed = {}
    for name, tensor in state.items():
        parts = name.split(".")
        for length in range(len(parts), 0, -1):
            new = table.get(".".join(parts[:length]))
            if new is not None:
                name = ".".join([new, *parts[length:]])
                break
        renamed[name] = tensor
    return renamed


def ldm_unet(state: dict[str, Tensor], c: UNetConfig) -> dict[str, Tensor]:
    """A UNet under LDM names (prefix removed) under diffusers' names; 1x1 projections to linear."""
    renamed = rename(state, ldm_unet_table(c))
    return {
        k: v[:, :, 0, 0] if re.search(r"\.proj_(in|out)\.weight$", k) and v.dim() == 4 else v
        for k, v in renamed.items()
    }


def vae(state: dict[str, Tensor], c: VAEConfig) -> dict[str, Tensor]:
    """An autoencoder under LDM's or diffusers' older names under diffusers' present ones."""
    renamed = {}
    for name, tensor in rename(state, ldm_vae_table(c)).items():
        name = name.replace(".nin_shortcut.", ".conv_shortcut.")
        found = re.match(r"(.*\.attentions\.0\.)([a-z_]+)\.(weight|bias)$", name)
        if found and found[2] in VAE_ATTENTION:
            name = f"{found[1]}{VAE_ATTENTION[found[2]]}.{found[3]}"
        if ".attentions.0.to_" in name and tensor.dim() == 4:
            tensor = tensor[:, :, 0, 0]
        renamed[name] = tensor
    return renamed


def merge_lora(unet: dict[str, Tensor], lora: dict[str, Tensor], alpha: float) -> dict[str, Tensor]:
    """A peft LoRA merged into a UNet: W + alpha / rank * B A. ValueError names what doesn't fit.

    Names: `base_model.model.<module>.lora_A[.<adapter>].weight`, any common prefix before them.
    """
    pattern = re.compile(r"^(?:base_model\.model\.)?(.*)\.lora_([AB])(?:\.[^.]+)?\.weight$")
    pairs: dict[str, dict[str, Tensor]] = {}
    for name, tensor in lora.items():
        found = pattern.match(name)
        if not found:
            raise ValueError(f"{name} is not a peft LoRA tensor: convert the LoRA to peft's names")
        module = found[1]
        for prefix in UNET_PREFIXES:
            module = module.removeprefix(prefix)
        pairs.setdefault(module, {})[found[2]] = tensor
    merged = dict(unet)
    for module, pair in pairs.items():
        weight = merged.get(f"{module}.weight")
        if weight is None or set(pair) != {"A", "B"}:
            raise ValueError(f"the LoRA changes {module}, which the base does not have")
        a, b = pair["A"].float(), pair["B"].float()
        if min(a.dim(), b.dim()) < 2 or not len(a) or b.flatten(1).shape[1] != len(a):
            raise ValueError(
                f"the LoRA of {module} does not fit together: lora_A is {tuple(a.shape)}, lora_B "
                f"{tuple(b.shape)}"
            )
        if (b.shape[0], *a.shape[1:]) != tuple(weight.shape):
            raise ValueError(
                f"the LoRA was made for another base: {module} is {tuple(weight.shape)} in the "
                f"base, {(b.shape[0], *a.shape[1:])} in the LoRA"
            )
        delta = (b.flatten(1) @ a.flatten(1)).reshape(weight.shape) * (alpha / a.shape[0])
        merged[f"{module}.weight"] = (weight.float() + delta).to(weight.dtype)
    return merged
