"""A Stable Diffusion 2.1-base to convert adapters with: its tensors one by one, under our names."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..networks.onestep import StepConfig
from ..networks.unet import UNetConfig
from ..networks.vae import VAEConfig
from . import folders, layouts, sources
from .header import METADATA
from .reading import is_safetensors, outline, read_json, read_pickle
from .shapes import CheckpointError, recognise, unet_config, vae_config, wanted_shapes
from .stored import Stored

LICENCE = "OpenRAIL++-M (SD2.1-base)"
# A v-prediction model of this family can be told by the spread of one bias: ComfyUI's observation.
V_BIAS, V_SPREAD = "transformer_blocks.0.norm1.bias", 0.09


@dataclass(frozen=True)
class Base:
    """Where each tensor of a UNet and an autoencoder lies.

    places: `unet.NAME` or `vae.NAME` (diffusers' present names) -> file and the name in it.
    shapes: of the same, as our networks have them.
    """

    path: Path
    unet: UNetConfig
    vae: VAEConfig
    places: dict[str, tuple[Stored, str]]
    shapes: dict[str, tuple[int, ...]]

    def read(self, name: str) -> Tensor:
        """One tensor, as it is stored but for the shape of 1x1 projections."""
        file, inside = self.places[name]
        return layouts.linear(name, file.read(inside))

    def facts(self) -> list[dict[str, Any]]:
        """For a header's `bases`: no path of this machine."""
        hub = self.path.parent.name == "snapshots"
        name = self.path.parent.parent.name if hub else self.path.resolve().name
        revision = self.path.name if hub else None
        return [
            {"part": part, "id": name, "revision": revision, "licence": LICENCE}
            for part in ("unet", "vae")
        ]


def read(path: Path) -> Base:
    """A base in diffusers' folders (whole, sharded, fp16, .bin) or in one LDM file.

    CheckpointError in one sentence for what can't be one: another family, another prediction or noise
    schedule, missing parts.
    """
    if not path.exists():
        raise CheckpointError(f"there is no base at {path}: {folders.GIVE}")
    base = _folder(path) if path.is_dir() else _ldm_file(path)
    _complete(base)
    return base


def _open(path: Path) -> Stored:
    if is_safetensors(path):
        return Stored(path)
    return Stored(path, lambda: read_pickle(path))


def _gather(files: list[Path]) -> tuple[dict[str, tuple[Stored, str]], dict[str, Tensor]]:
    """(name -> place, name -> a tensor of its shape without values)."""
    places: dict[str, tuple[Stored, str]] = {}
    empty: dict[str, Tensor] = {}
    for file in map(_open, files):
        for name, shape in file.shapes.items():
            places[name] = file, name
            empty[name] = torch.empty(shape, device="meta")
    return places, empty


def _folder(folder: Path) -> Base:
    for part in ("unet", "vae"):
        if not (folder / part).is_dir():
            raise CheckpointError(
                f"{folder} is no base: it has no {part}/; {folders.GIVE}, as a whole folder"
            )
    scheduler = folder / "scheduler" / "scheduler_config.json"
    told = scheduler.exists()
    if told:
        values = read_json(scheduler)
        predicted = folders.prediction(values, folder)
        if predicted not in (None, "epsilon"):
            raise CheckpointError(
                f"{folder.name} predicts {predicted} (SD2.1 for 768 px), these adapters were made "
                f"for SD2.1-base, which predicts epsilon: {folders.GIVE}"
            )
        if values.get("clip_sample"):
            raise CheckpointError(
                f"{folder.name} clips its latents (clip_sample), which SD2.1-base does not: "
                f"{folders.GIVE}"
            )
    places, empty = _gather(folders.weight_files(folder / "unet"))
    config = folders.unet_settings(
        _unet_config(folder, empty), read_json(folder / "unet" / "config.json"), folder / "unet"
    )
    vae_places, vae_empty = _gather(folders.weight_files(folder / "vae"))
    vae = folders.vae_settings(vae_config(vae_empty), read_json(folder / "vae" / "config.json"))
    names = layouts.vae_names(vae_empty, vae)
    base = _joined(folder, config, vae, {name: places[name] for name in places}, vae_places, names)
    if not told:
        _check_epsilon(base)
    return base


def _ldm_file(path: Path) -> Base:
    places, empty = _gather([path])

    def inside(prefix: str) -> dict[str, Tensor]:
        return {k.removeprefix(prefix): v for k, v in empty.items() if k.startswith(prefix)}

    unet, autoencoder = inside(layouts.LDM_UNET), inside(layouts.LDM_VAE)
    if not unet or not autoencoder:
        restorer = sources.name_of(path)
        what = f"a file of {restorer}" if restorer else recognise(empty)
        if is_safetensors(path) and METADATA in outline(path)[0]:
            what = "a GenDR file"
        raise CheckpointError(
            f"{path.name} is {what}, not a whole Stable Diffusion in one file: {folders.GIVE}"
        )
    config, vae = _unet_config(path, unet, ldm=True), vae_config(autoencoder)
    renamed = layouts.ldm_unet_names(unet, config)
    base = _joined(
        path,
        config,
        vae,
        {new: places[layouts.LDM_UNET + old] for new, old in renamed.items()},
        {name: places[layouts.LDM_VAE + name] for name in autoencoder},
        layouts.vae_names(autoencoder, vae),
    )
    _check_epsilon(base)
    return base


def _unet_config(path: Path, tensors: dict[str, Tensor], *, ldm: bool = False) -> UNetConfig:
    """`unet_config`; CheckpointError saying which base to take instead."""
    try:
        return unet_config(tensors, ldm=ldm)
    except CheckpointError as error:
        raise CheckpointError(
            f"{path.name} holds {recognise(tensors)}, these adapters were made for SD2.1-base: "
            f"{folders.GIVE}"
        ) from error


def _joined(
    path: Path,
    unet: UNetConfig,
    vae: VAEConfig,
    unet_places: Mapping[str, tuple[Stored, str]],
    vae_places: Mapping[str, tuple[Stored, str]],
    vae_names: Mapping[str, str],
) -> Base:
    places = {f"unet.{name}": place for name, place in unet_places.items()}
    places |= {f"vae.{new}": vae_places[old] for new, old in vae_names.items()}
    shapes = {
        name: layouts.linear_shape(name, file.shapes[inside])
        for name, (file, inside) in places.items()
    }
    return Base(path, unet, vae, places, shapes)


def _check_epsilon(base: Base) -> None:
    """Without a scheduler's configuration the weights themselves tell what is predicted."""
    last = len(base.unet.block_out_channels) - 1
    name = f"unet.up_blocks.{last}.attentions.{base.unet.layers_per_block}.{V_BIAS}"
    if name in base.places and float(base.read(name).float().std(unbiased=False)) > V_SPREAD:
        raise CheckpointError(
            f"{base.path.name} seems to predict v (SD2.1 for 768 px), these adapters were made for "
            f"SD2.1-base, which predicts epsilon: {folders.GIVE}"
        )


def _complete(base: Base) -> None:
    """CheckpointError unless the base has exactly the tensors of our networks."""
    if base.unet.latent_channels != base.vae.latent_channels:
        raise CheckpointError(
            f"{base.path.name}'s UNet works on {base.unet.latent_channels} latent channels, its "
            f"autoencoder on {base.vae.latent_channels} (an inpainting or depth model?): "
            f"{folders.GIVE}"
        )
    wanted = wanted_shapes(StepConfig(unet=base.unet, vae=base.vae))
    for name in sorted(wanted.keys() | base.shapes.keys()):
        have, want = base.shapes.get(name), wanted.get(name)
        if have != want:
            what = (
                f"{name} is missing"
                if have is None
                else f"it has {name}, which SD2.1 has not"
                if want is None
                else f"{name} is {have} instead of {want}"
            )
            raise CheckpointError(
                f"{base.path.name} is incomplete or not in the shape of SD2.1 ({what}): "
                f"{folders.GIVE}"
            )
