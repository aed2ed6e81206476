"""From a model's file to a model that is ready to run."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from .devices import Precision, choose_device, choose_precision
from .files import checkpoint
from .files.reading import naming
from .model import GenDR
from .networks.blocks import Unset
from .networks.onestep import Step, build, fold_state, prompt_projections
from .settings import DTYPES, SPEEDS


def load(
    path: str | Path | None = None,
    *,
    device: str | torch.device = "auto",
    dtype: str = "auto",
    operations: Any = None,
    base: str | Path | None = None,
    fold: bool = True,
    runs_on: str | torch.device | None = None,
    usual: str = DTYPES[0],
    speed: str = SPEEDS[0],
) -> GenDR:
    """A model from a file, ready to run. None = GenDR-Tiny, which is part of the package.

    path: a GenDR checkpoint (full or folded), a diffusers folder, or a UNet on its own (diffusers'
    or LDM's names, with common prefixes), or a peft LoRA; the latter two with `base`, the GenDR
    checkpoint that supplies the rest. Pickles are read as tensors only and never executed.
    device, dtype: "auto" or a name. operations: a host's layers, which cast weights per call.
    fold: False keeps timestep and prompt free, for training.
    runs_on: where a host will compute while the weights lie on `device`; decides the precision.
    usual: what dtype "auto" means to that host, unless the model's file names another.
    speed: how passes are run, one of `SPEEDS`. "graph" records them on an NVIDIA card, "compile" goes
    through torch.compile; where it is not available, eagerly, and the report says why.

    FileNotFoundError or CheckpointError with a sentence for what can't be used.
    """
    path = Path(path) if path is not None else checkpoint.EMBEDDED
    place = choose_device(device)
    header, state = checkpoint.read(path, base)
    if not fold:
        checkpoint.check_full(header, path, "has neither timestep nor prompt left to choose")
    precision = choose_precision(
        place if runs_on is None else torch.device(runs_on),
        dtype,
        model=header.precision,
        usual=usual,
    )
    with naming(path):
        config, projections = header.config, None
        if fold and not header.folded:
            parts = checkpoint.split(state)
            projections = prompt_projections(parts["unet"])
            config, state = fold_state(config, parts["unet"], parts["vae"], parts["embeds"])
        state = {k: v.to(dtype_of(k, precision)) for k, v in state.items()}
        network: Step
        if fold:
            network = build(config, state, operations=operations or Unset)
            network.projections = projections
        else:
            network = checkpoint.unfolded(config, state, operations=operations or Unset)
    arrange(network, place)
    return GenDR(
        network,
        header=header,
        precision=precision,
        device=place,
        casts=operations is not None,
        speed=speed,
    )


def dtype_of(name: str, precision: Precision) -> torch.dtype:
    """The dtype of a tensor by the network it belongs to."""
    return precision.unet if name.startswith(("unet.", "embeds.")) else precision.vae


def arrange(network: Step, device: torch.device) -> None:
    """Put weights where they run, in the memory order that runs best there.

    Convolutions of the autoencoder gain from channels-last everywhere, the UNet's on GPUs only.
    """
    network.to(device)
    for name, child in network.named_children():
        if name != "embeds" and (name != "unet" or device.type == "cuda"):
            child.to(memory_format=torch.channels_last)
