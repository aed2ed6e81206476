"""GenDR's model files: read, describe, write.

A GenDR checkpoint is one safetensors file that needs nothing else: `unet.*`, `vae.*` (diffusers'
names), `embeds.positive|negative|null`, and a header under the metadata key `gendr` that says what
it is. The folded kind holds `encoder.*`, `unet.*`, `decoder.*` of one step only.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..devices import TORCH_DTYPES
from ..networks.blocks import Unset
from ..networks.onestep import (
    Step,
    StepConfig,
    Unfolded,
)
from ..networks.unet import UNet, UNetConfig
from ..networks.vae import VAE
from . import layouts, lora, sources, stored
from .header import METADATA, STORED, Header, Newer, printable
from .reading import EXTENSIONS as EXTENSIONS
from .reading import (
    File,
    check_exists,
    check_numbers,
    finite,
    is_safetensors,
    naming,
    outline,
    read_file,
    read_json,
)
from .shapes import CheckpointError, check_tensors, recognise, unet_config, vae_config

WEIGHTS = Path(__file__).parent.parent / "weights"
EMBEDDED = WEIGHTS / "gendr-tiny.safetensors"


def unfolded(config: StepConfig, state: dict[str, Tensor], *, operations: Any = Unset) -> Unfolded:
    """An unfolded network around existing tensors, without a second copy of them."""
    parts = split(state)
    with torch.device("meta"):
        vae, unet = VAE(config.vae, operations=operations), UNet(config.unet, operations=operations)
    vae.load_state_dict(parts["vae"], strict=True, assign=True)
    unet.load_state_dict(parts["unet"], strict=True, assign=True)
    return Unfolded(config, vae, unet, parts["embeds"]).requires_grad_(False).eval()


def split(tensors: dict[str, Tensor]) -> dict[str, dict[str, Tensor]]:
    """`unet`, `vae` and `embeds` by their prefix."""
    return {
        part: {
            k.removeprefix(f"{part}."): v for k, v in tensors.items() if k.startswith(f"{part}.")
        }
        for part in ("unet", "vae", "embeds")
    }


Model = tuple[Header, dict[str, Tensor]]


class Layout(NamedTuple):
    """One kind of file: whether a file is of it, and how its header and tensors are read."""

    fits: Callable[[File], bool]
    read: Callable[[File, Path | None], Model]


def read(path: Path, base: str | Path | None = None) -> Model:
    """(header, tensors) of any layout that `load` takes, under GenDR's own names.

    Whole and undamaged: every tensor that the header's networks need is there in its shape, all
    values are finite, and they have the header's SHA-256. FileNotFoundError or CheckpointError.
    """
    base = None if base is None else Path(base)
    with naming(path):
        if path.is_dir():
            refuse_unconverted(path)
            header, tensors = read_folder(path)
        else:
            file = read_file(path)
            layout = next((known for known in LAYOUTS if known.fits(file)), None)
            if layout is None or (layout.read is read_lora and base is None):
                refuse_unconverted(path)
            if layout is None:
                raise CheckpointError(f"it is {recognise(file.tensors)}; GenDR can't run it")
            header, tensors = layout.read(file, base)
        check_tensors(header.config, tensors)
        check_numbers(tensors)
        check_finite(tensors, path)
        check_digest(header, tensors)
    return header, tensors


def refuse_unconverted(path: Path) -> None:
    """CheckpointError with what to do, for a public restorer that `gendr convert` takes."""
    if advice := sources.advice(path):
        raise CheckpointError(advice)


def read_ours(file: File, base: Path | None) -> Model:
    """A GenDR checkpoint, full or folded."""
    return checked_header(file.path, file.metadata[METADATA]), file.tensors


def read_lora(file: File, base: Path | None) -> Model:
    """A peft LoRA merged into its base."""
    header, whole = read_base(file.path, base, "a LoRA")
    check_numbers(file.tensors)
    try:
        scaling = lora.scaling_of(file.path, file.metadata)
    except CheckpointError:
        refuse_unconverted(file.path)
        raise
    try:
        change = lora.read(file.tensors, scaling)
        merged = lora.merge(split(whole)["unet"], change)
    except ValueError as error:
        raise CheckpointError(str(error)) from error
    return in_base(file.path, header, whole, merged, header.config.unet)


def read_headerless(file: File, base: Path | None) -> Model:
    """A file under our names that lost its header (another program saved it again)."""
    parts = split(file.tensors)
    try:
        config = StepConfig(unet=unet_config(parts["unet"]), vae=vae_config(parts["vae"]))
        header = Header(config=config, name=name_of(file.path))
        check_tensors(config, file.tensors)
    except ValueError as error:
        raise CheckpointError(
            "it lost its header, which said how its networks are built, and the shapes of its tensors "
            f"don't tell: another program saved it again, so get the original file ({error})"
        ) from error
    return header, file.tensors


def read_unet(file: File, base: Path | None) -> Model:
    """A UNet on its own, in its base."""
    unet, config = bare_unet(file.path, file.tensors)
    what = "a UNet on its own"
    if any(k.startswith(layouts.LDM_VAE) for k in file.tensors):
        what = "a single-file Stable Diffusion model without prompts"
    header, whole = read_base(file.path, base, what)
    ours = header.config.vae.latent_channels
    if config.latent_channels != ours:
        raise CheckpointError(
            f"{file.name} works on {config.latent_channels} latent channels, the base on {ours}: "
            "choose a base with the same latent"
        )
    return in_base(file.path, header, whole, unet, config)


def in_base(
    path: Path,
    base: Header,
    tensors: dict[str, Tensor],
    unet: dict[str, Tensor],
    config: UNetConfig,
) -> Model:
    """A base with another UNet, under the name of the file that gave it."""
    header = replace(
        base, config=replace(base.config, unet=config), name=name_of(path), sha256=None
    )
    rest = {k: v for k, v in tensors.items() if not k.startswith("unet.")}
    return header, {**{f"unet.{k}": v for k, v in unet.items()}, **rest}


def has_header(file: File) -> bool:
    return METADATA in file.metadata


def is_lora(file: File) -> bool:
    return any(".lora_A" in name for name in file.tensors)


def is_headerless(file: File) -> bool:
    starts = ("unet.conv_in.", "vae.")
    return all(any(name.startswith(start) for name in file.tensors) for start in starts)


def is_unet(file: File) -> bool:
    ldm = any(name.startswith(layouts.LDM_UNET) for name in file.tensors)
    return ldm or layouts.strip_prefixes(file.tensors) is not None


# The first that fits is taken: a GenDR checkpoint has a UNet in it, too.
LAYOUTS = (
    Layout(has_header, read_ours),
    Layout(is_lora, read_lora),
    Layout(is_headerless, read_headerless),
    Layout(is_unet, read_unet),
)


def name_of(path: Path) -> str:
    """The name of a model that has none but its file's."""
    return printable(path.stem)[:200] or "unnamed"


def read_base(path: Path, base: Path | None, what: str) -> Model:
    """The checkpoint that supplies what a file lacks."""
    if base is None:
        raise CheckpointError(
            f"{path.name} is {what}: give the GenDR checkpoint that it belongs to as base"
        )
    header, tensors = read(base)
    check_full(header, base, "can't be a base")
    return header, tensors


def check_full(header: Header, path: Path, why: str) -> None:
    """CheckpointError for a folded file where a full one is needed."""
    if header.folded:
        raise CheckpointError(
            f"{path.name} is folded into one step and {why}: use the checkpoint it was made from"
        )


def read_header(path: Path) -> Header:
    """A GenDR checkpoint's header alone; CheckpointError for another file."""
    with naming(path):
        if path.is_dir():
            return read_folder(path)[0]
        file = read_file(path)
        if not has_header(file):
            raise CheckpointError(f"it is {recognise(file.tensors)}, not a GenDR checkpoint")
        return checked_header(path, file.metadata[METADATA])


def checked_header(path: Path, text: str) -> Header:
    """The header of a GenDR file, if this program can read it."""
    try:
        return Header.parse(text)
    except Newer as error:
        raise CheckpointError(f"{path.name} {error}") from error
    except ValueError as error:
        raise CheckpointError(
            f"{path.name} has a header that can't be used: {error}; get the file again"
        ) from error


def bare_unet(path: Path, tensors: dict[str, Tensor]) -> tuple[dict[str, Tensor], UNetConfig]:
    """A UNet under any of the known names, and its shape."""
    if any(k.startswith(layouts.LDM_UNET) for k in tensors):
        n = len(layouts.LDM_UNET)
        inner = {k[n:]: v for k, v in tensors.items() if k.startswith(layouts.LDM_UNET)}
        config = unet_config(inner, ldm=True)
        state = layouts.ldm_unet(inner, config)
    else:
        prefix = layouts.strip_prefixes(tensors)
        if prefix is None or f"{prefix}time_embedding.linear_1.weight" not in tensors:
            raise CheckpointError(f"{path.name} is {recognise(tensors)}; GenDR can't run it")
        state = {k.removeprefix(prefix): v for k, v in tensors.items() if k.startswith(prefix)}
        config = unet_config(state)
    return state, config


def read_folder(folder: Path) -> Model:
    """A diffusers folder: `unet/`, `vae/`, `embeds.safetensors`, and `gendr.json` where it is ours."""
    tensors: dict[str, Tensor] = {}
    for part in ("unet", "vae"):
        names = ("diffusion_pytorch_model.safetensors", "diffusion_pytorch_model.bin")
        file = next((folder / part / n for n in names if (folder / part / n).exists()), None)
        if file is None:
            raise CheckpointError(
                f"{folder} is not a diffusers folder: {part}/{names[0]} is missing"
            )
        tensors |= {f"{part}.{k}": v for k, v in read_file(file).tensors.items()}
    embeds = folder / "embeds.safetensors"
    if not embeds.exists():
        raise CheckpointError(
            f"{folder} has no embeds.safetensors (the fixed prompts): make it with train.embeddings, or, "
            "to run a public restorer on this base, see gendr convert --help"
        )
    tensors |= {f"embeds.{k}": v for k, v in read_file(embeds).tensors.items()}
    ours = folder / "gendr.json"
    if ours.exists():
        # Its SHA-256 is of tensors in one file, whose dtypes and prompts may have been others.
        return replace(checked_header(ours, json.dumps(read_json(ours))), sha256=None), tensors
    parts = split(tensors)
    values = read_json(folder / "vae" / "config.json")
    try:
        vae = replace(
            vae_config(parts["vae"]),
            **{k: values[k] for k in ("scaling_factor", "shift_factor") if k in values},
        )
        config = StepConfig(unet=unet_config(parts["unet"]), vae=vae)
        header = Header(config=config, name=name_of(folder))
    except ValueError as error:
        raise CheckpointError(
            f"{folder} can't be used: {error}; get vae/config.json and the weights again"
        ) from error
    tensors = {
        **{k: v for k, v in tensors.items() if not k.startswith("vae.")},
        **{f"vae.{k}": v for k, v in layouts.vae(parts["vae"], vae).items()},
    }
    return header, tensors


def check_finite(tensors: dict[str, Tensor], path: Path) -> None:
    """CheckpointError naming the first tensor with NaN or infinity."""
    for name, tensor in tensors.items():
        if not finite(tensor):
            raise CheckpointError(
                f"{path.name} is damaged: {name} holds NaN or infinity; get the file again, or "
                "export an earlier training step"
            )


def check_digest(header: Header, tensors: dict[str, Tensor]) -> None:
    """CheckpointError where the weights are not those that the header was written for."""
    if not header.sha256 or digest(tensors) == header.sha256:
        return
    others = {t.dtype for t in tensors.values()} - {TORCH_DTYPES[header.dtype]}
    if others:
        raise CheckpointError(
            f"its weights are {str(others.pop()).removeprefix('torch.')}, it was saved in "
            f"{header.dtype}: another program changed it; get the original file, which runs in any "
            "precision"
        )
    raise CheckpointError(
        "its weights are not those that it was saved with (the SHA-256 in its header is of others): "
        "it is damaged, or another program changed it; get the file again"
    )


def digest(tensors: dict[str, Tensor]) -> str:
    """SHA-256 over names, dtypes, shapes and bytes of all tensors, in order of their names."""
    sha = hashlib.sha256()
    for name in sorted(tensors):
        tensor = tensors[name].detach().cpu().contiguous()
        sha.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        sha.update(tensor.flatten().view(torch.uint8).numpy().data)
    return sha.hexdigest()


def save(path: str | Path, network: Step, header: Header, *, dtype: str = STORED) -> None:
    """Write a network and its header as one safetensors file, complete or not at all.

    network: `Unfolded` gives a checkpoint, `OneStep` the folded kind. header: what it says besides
    the facts that follow from the network. CheckpointError where the file can't be written.
    """
    state = network.state_dict()
    stored.write(
        Path(path),
        {name: tensor.shape for name, tensor in state.items()},
        lambda name: state[name].detach().cpu(),
        TORCH_DTYPES[dtype],
        replace(header, config=network.config, dtype=dtype),
    )


def describe(path: str | Path | None = None) -> dict[str, Any]:
    """What a file says it is, without loading its tensors. Errors as in `load`."""
    path = Path(path) if path is not None else EMBEDDED
    with naming(path):
        if path.is_dir():
            if advice := sources.advice(path):
                return {"path": str(path), "kind": advice}
            header, tensors = read_folder(path)
            return {**header.as_dict(), "path": str(path), "tensors": len(tensors)}
        check_exists(path)
        facts: dict[str, Any] = {"path": str(path), "bytes": path.stat().st_size}
        if not is_safetensors(path):
            tensors = read_file(path).tensors
            kind = sources.advice(path) or recognise(tensors)
            return {**facts, "tensors": len(tensors), "kind": kind}
        metadata, tensors, dtypes = outline(path)
        facts["stored_dtypes"] = dtypes
        facts["tensors"] = len(tensors)
        facts["parameters"] = sum(tensor.numel() for tensor in tensors.values())
        if METADATA in metadata:
            header = checked_header(path, metadata[METADATA])
            check_tensors(header.config, tensors)
            return {**header.as_dict(), **facts}
        return {**facts, "kind": sources.advice(path) or recognise(tensors)}
