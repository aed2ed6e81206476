"""Model files: read, check, describe, write.

A GenDR checkpoint is one safetensors file that needs nothing else: `unet.*`, `vae.*` (diffusers'
names), `embeds.positive|negative|null`, and a header under the metadata key `gendr` that says what
it is. The folded kind holds `encoder.*`, `unet.*`, `decoder.*` of one step only.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from ..devices import Precision, choose_device, choose_precision
from ..model import GenDR
from ..networks.onestep import OneStep, Step, StepConfig, Unfolded, build, fold_state
from ..networks.unet import UNet
from ..networks.vae import VAE
from ..settings import SPEEDS
from . import layouts
from .shapes import CheckpointError, recognise, unet_config, vae_config

FORMAT, FOLDED, VERSION = "gendr", "gendr-folded", 1
METADATA = "gendr"
EXTENSIONS = (".safetensors", ".sft", ".pth", ".pt", ".bin", ".ckpt")
WEIGHTS = Path(__file__).parent.parent / "weights"
EMBEDDED = WEIGHTS / "gendr-tiny.safetensors"
# torch writes terminal colours into its messages.
COLOURS = re.compile(r"\x1b\[[0-9;]*m")
# A model of unknown origin is run on tiles of SD2.1's own size.
UNKNOWN_TILE = 512


def load(
    path: str | Path | None = None,
    *,
    device: str | torch.device = "auto",
    dtype: str = "auto",
    operations: Any = None,
    base: str | Path | None = None,
    fold: bool = True,
    runs_on: str | torch.device | None = None,
    speed: str = SPEEDS[0],
) -> GenDR:
    """A model from a file, ready to run. None = GenDR-Tiny, which is part of the package.

    path: a GenDR checkpoint (full or folded), a diffusers folder, or a UNet on its own (diffusers'
    or LDM's names, with common prefixes), or a peft LoRA; the latter two with `base`, the GenDR
    checkpoint that supplies the rest. Pickles are read as tensors only and never executed.
    device, dtype: "auto" or a name. operations: a host's layers, which cast weights per call.
    fold: False keeps timestep and prompt free, for training.
    runs_on: where a host will compute while the weights lie on `device`; decides the precision.
    speed: how passes are run, one of `SPEEDS`. "graph" records them on an NVIDIA card, "compile" goes
    through torch.compile; what can't be had runs eagerly, and the report says why.

    FileNotFoundError or CheckpointError with a sentence for what can't be used.
    """
    path = Path(path) if path is not None else EMBEDDED
    place = choose_device(device)
    precision = choose_precision(place if runs_on is None else torch.device(runs_on), dtype)
    header, tensors = read(path, base)
    check_finite(tensors, path)
    config = StepConfig.from_dict(header["config"])
    if header["format"] == FOLDED:
        if not fold:
            raise CheckpointError(
                f"{path.name} is a folded export, fixed to one step: use the checkpoint it was "
                "made from"
            )
        state = tensors
    elif fold:
        parts = split(tensors)
        config, state = fold_state(config, parts["unet"], parts["vae"], parts["embeds"])
    else:
        state = tensors
    state = {k: v.to(dtype_of(k, precision)) for k, v in state.items()}
    with readable(path, header):
        if fold:
            network: Step = build(config, state, operations=operations or nn)
        else:
            network = unfolded(config, state, operations=operations or nn)
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


def unfolded(config: StepConfig, state: dict[str, Tensor], *, operations: Any = nn) -> Unfolded:
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


class readable:
    """Turns torch's list of keys into a sentence."""

    def __init__(self, path: Path, header: dict[str, Any]):
        self.path, self.header = path, header

    def __enter__(self) -> None:
        return None

    def __exit__(self, kind: Any, error: BaseException | None, trace: Any) -> None:
        if isinstance(error, (RuntimeError, KeyError)):
            lines = [line.strip() for line in str(error).splitlines()]
            missing = next((x for x in lines if x.startswith("Missing")), lines[-1])
            raise CheckpointError(
                f"{self.path.name} is incomplete or of another shape than its header says: get "
                f"the file again ({missing[:200]})"
            ) from error


def read(path: Path, base: str | Path | None = None) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """(header, tensors) of any layout that `load` takes, under GenDR's own names."""
    if path.is_dir():
        return read_folder(path)
    metadata, tensors = read_file(path)
    if METADATA in metadata:
        return checked_header(path, metadata[METADATA]), tensors
    if is_lora(tensors):
        header, whole = read_base(path, base, "a LoRA")
        alpha = lora_alpha(path, metadata)
        try:
            merged = layouts.merge_lora(split(whole)["unet"], tensors, alpha)
        except ValueError as error:
            raise CheckpointError(f"{path.name}: {error}") from error
    elif any(k.startswith("unet.conv_in.") for k in tensors) and any(
        k.startswith("vae.") for k in tensors
    ):
        return headerless(path, tensors)
    else:
        unet, config = bare_unet(path, tensors)
        if base is None and any(k.startswith(layouts.LDM_VAE) for k in tensors):
            return read_base(path, base, "a single-file Stable Diffusion model without prompts")
        header, whole = read_base(path, base, "a UNet on its own")
        step = StepConfig.from_dict(header["config"])
        if config.latent_channels != step.vae.latent_channels:
            raise CheckpointError(
                f"{path.name} works on {config.latent_channels} latent channels, the base on "
                f"{step.vae.latent_channels}: choose a base with the same latent"
            )
        header["config"] = replace(step, unet=config).as_dict()
        merged = unet
    header["name"] = path.stem
    rest = {k: v for k, v in whole.items() if not k.startswith("unet.")}
    return header, {**{f"unet.{k}": v for k, v in merged.items()}, **rest}


def read_base(
    path: Path, base: str | Path | None, what: str
) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """The checkpoint that supplies what a file lacks."""
    if base is None:
        raise CheckpointError(
            f"{path.name} is {what}: give the GenDR checkpoint that it belongs to as base"
        )
    header, tensors = read(Path(base))
    if header["format"] != FORMAT:
        raise CheckpointError(f"{Path(base).name} is folded and can't be a base: use a full one")
    return header, tensors


def read_file(path: Path) -> tuple[dict[str, str], dict[str, Tensor]]:
    """(metadata, tensors) of one file. FileNotFoundError or CheckpointError with a sentence."""
    check_exists(path)
    if path.suffix.lower() in (".safetensors", ".sft"):
        try:
            with safe_open(path, framework="pt") as file:
                return file.metadata() or {}, {k: file.get_tensor(k) for k in file.keys()}  # noqa: SIM118
        except (SafetensorError, OSError) as error:
            raise CheckpointError(
                f"{path.name} is not a whole safetensors file: it was cut short while loading, or "
                f"is something else under this name; get it again ({error})"
            ) from error
    try:
        loaded = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except Exception as error:  # torch raises many kinds here, all meaning the same
        raise CheckpointError(
            f"{path.name} can't be read as plain tensors and is not executed: use a safetensors "
            f"file ({COLOURS.sub('', str(error)).splitlines()[0][:160]})"
        ) from error
    for key in ("params_ema", "ema", "params", "state_dict", "model"):
        if isinstance(loaded, dict) and isinstance(loaded.get(key), dict):
            loaded = loaded[key]
    if not isinstance(loaded, dict):
        raise CheckpointError(f"{path.name} holds no named tensors: it is not a model file")
    return {}, {k: v for k, v in loaded.items() if isinstance(v, Tensor)}


def check_exists(path: Path) -> None:
    """FileNotFoundError or CheckpointError for what is not a file with something in it."""
    if not path.exists():
        if path == EMBEDDED:
            raise FileNotFoundError(
                f"{path.name} is missing from the package: install it again, or name a model file"
            )
        raise FileNotFoundError(f"no model file at {path}: check the name and the folder")
    if path.is_file() and path.stat().st_size == 0:
        raise CheckpointError(f"{path.name} is empty (0 bytes): get it again")


def checked_header(path: Path, text: str) -> dict[str, Any]:
    """The header of a GenDR file, if this program can read it."""
    try:
        header = json.loads(text)
        header["format"], header["version"], header["config"]
    except (ValueError, KeyError, TypeError) as error:
        raise CheckpointError(f"{path.name} has a damaged header: get it again") from error
    if header["format"] not in (FORMAT, FOLDED) or header["version"] > VERSION:
        raise CheckpointError(
            f"{path.name} is of format {header['format']} {header['version']}, this program reads "
            f"up to {FORMAT} {VERSION}: update it"
        )
    return header


def headerless(path: Path, tensors: dict[str, Tensor]) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """A file under our names that lost its header (another program saved it again)."""
    parts = split(tensors)
    config = StepConfig(unet=unet_config(parts["unet"]), vae=vae_config(parts["vae"]))
    return make_header(config, name=path.stem), tensors


def bare_unet(path: Path, tensors: dict[str, Tensor]) -> tuple[dict[str, Tensor], Any]:
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


def is_lora(tensors: Iterable[str]) -> bool:
    """Whether these are names of a LoRA."""
    return any(".lora_A" in name for name in tensors)


def lora_alpha(path: Path, metadata: dict[str, str]) -> float:
    """peft's lora_alpha, from the file's metadata or the adapter_config.json beside it."""
    if "lora_alpha" in metadata:
        return float(metadata["lora_alpha"])
    beside = path.with_name("adapter_config.json")
    if beside.exists():
        return float(json.loads(beside.read_text(encoding="utf-8"))["lora_alpha"])
    raise CheckpointError(
        f"{path.name} doesn't say its lora_alpha: put peft's adapter_config.json beside it"
    )


def read_folder(folder: Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """A diffusers folder: `unet/`, `vae/`, `embeds.safetensors`, and `gendr.json` where it is ours."""
    tensors: dict[str, Tensor] = {}
    for part in ("unet", "vae"):
        names = ("diffusion_pytorch_model.safetensors", "diffusion_pytorch_model.bin")
        file = next((folder / part / n for n in names if (folder / part / n).exists()), None)
        if file is None:
            raise CheckpointError(
                f"{folder} is not a diffusers folder: {part}/{names[0]} is missing"
            )
        tensors |= {f"{part}.{k}": v for k, v in read_file(file)[1].items()}
    embeds = folder / "embeds.safetensors"
    if not embeds.exists():
        raise CheckpointError(
            f"{folder} has no embeds.safetensors (the fixed prompts): make it with train.embeddings"
        )
    tensors |= {f"embeds.{k}": v for k, v in read_file(embeds)[1].items()}
    ours = folder / "gendr.json"
    if ours.exists():
        return checked_header(ours, ours.read_text(encoding="utf-8")), tensors
    parts = split(tensors)
    vae = vae_config(parts["vae"])
    values = json.loads((folder / "vae" / "config.json").read_text(encoding="utf-8"))
    vae = replace(
        vae,
        scaling_factor=float(values.get("scaling_factor", vae.scaling_factor)),
        shift_factor=values.get("shift_factor"),
    )
    tensors = {
        **{k: v for k, v in tensors.items() if not k.startswith("vae.")},
        **{f"vae.{k}": v for k, v in layouts.vae(parts["vae"], vae).items()},
    }
    config = StepConfig(unet=unet_config(parts["unet"]), vae=vae)
    return make_header(config, name=folder.name), tensors


def check_finite(tensors: dict[str, Tensor], path: Path) -> None:
    """CheckpointError naming the first tensor with NaN or infinity."""
    for name, tensor in tensors.items():
        if tensor.is_floating_point() and not bool(torch.isfinite(tensor).all()):
            raise CheckpointError(
                f"{path.name} is damaged: {name} holds NaN or infinity; get the file again, or "
                "export an earlier training step"
            )


def make_header(config: StepConfig, *, name: str, **facts: Any) -> dict[str, Any]:
    """What a checkpoint says about itself; facts override the defaults."""
    return {
        "format": FORMAT,
        "version": VERSION,
        "name": name,
        "config": config.as_dict(),
        "scale": 4,
        "tile": UNKNOWN_TILE,
        "guidance": 1.0,
        "prompts": {},
        "licence": None,
        "bases": [],
        "training_step": None,
        **facts,
    }


def digest(tensors: dict[str, Tensor]) -> str:
    """SHA-256 over names, dtypes, shapes and bytes of all tensors, in order of their names."""
    sha = hashlib.sha256()
    for name in sorted(tensors):
        tensor = tensors[name].detach().cpu().contiguous()
        sha.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        sha.update(tensor.flatten().view(torch.uint8).numpy().tobytes())
    return sha.hexdigest()


def save(path: str | Path, network: Step, header: dict[str, Any], *, dtype: str = "fp16") -> None:
    """Write a network and its header as one safetensors file, atomically.

    network: `Unfolded` gives a checkpoint, `OneStep` the folded kind. header: see `make_header`.
    """
    kind = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}[dtype]
    # Copies: weights that `gendr.speed` joined share memory, which the format has no word for.
    tensors = {
        k: v.detach().to("cpu", kind, copy=True).contiguous()
        for k, v in network.state_dict().items()
    }
    header = {
        **header,
        "format": FOLDED if isinstance(network, OneStep) else FORMAT,
        "config": network.config.as_dict(),
        "dtype": dtype,
        "sha256": digest(tensors),
    }
    write_safetensors(Path(path), tensors, {METADATA: json.dumps(header, sort_keys=True)})


def write_safetensors(path: Path, tensors: dict[str, Tensor], metadata: dict[str, str]) -> None:
    """A complete file or none: written beside its place, then renamed."""
    temporary = path.with_name(path.name + ".part")
    try:
        temporary.touch()
        mode = temporary.stat().st_mode
        save_file(tensors, temporary, metadata={"format": "pt", **metadata})
        # The library makes files that only their owner may read.
        temporary.chmod(mode)
        os.replace(temporary, path)
    except OSError as error:
        raise CheckpointError(
            f"can't write {path}: {error.strerror or error}; choose another place or make room"
        ) from error
    finally:
        temporary.unlink(missing_ok=True)


def describe(path: str | Path | None = None) -> dict[str, Any]:
    """What a file says it is, without loading its tensors. Errors as in `load`."""
    path = Path(path) if path is not None else EMBEDDED
    if path.is_dir():
        header, tensors = read_folder(path)
        return {**header, "path": str(path), "tensors": len(tensors)}
    check_exists(path)
    facts: dict[str, Any] = {"path": str(path), "bytes": path.stat().st_size}
    if path.suffix.lower() not in (".safetensors", ".sft"):
        tensors = read_file(path)[1]
        return {**facts, "tensors": len(tensors), "kind": recognise(tensors)}
    try:
        with safe_open(path, framework="pt") as file:
            names, metadata = list(file.keys()), file.metadata() or {}
            slices = {name: file.get_slice(name) for name in names}
            shapes = {name: tuple(s.get_shape()) for name, s in slices.items()}
            facts["stored_dtypes"] = sorted({s.get_dtype() for s in slices.values()})
    except (SafetensorError, OSError) as error:
        raise CheckpointError(
            f"{path.name} is not a whole safetensors file: get it again ({error})"
        ) from error
    facts["tensors"] = len(names)
    facts["parameters"] = sum(torch.Size(shape).numel() for shape in shapes.values())
    if METADATA in metadata:
        return {**facts, **checked_header(path, metadata[METADATA])}
    meta = {name: torch.empty(shape, device="meta") for name, shape in shapes.items()}
    return {**facts, "kind": recognise(meta)}
