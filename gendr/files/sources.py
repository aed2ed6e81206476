"""Public one-step restorers on SD2.1-base: recognised by their keys, read in full, with their formula.

Each is a LoRA with the constants of one step. What they compute, after adapters are merged:
z_g = (z_l - beta F(z_l, t_start)) / alpha on latents of SD's autoencoder. Sources: PiSA-SR
(arXiv 2412.03017), OSEDiff (2406.08177), HYPIR (2507.20590), OMGSR (2508.08227) and their published
inference code.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .. import schedule
from . import layouts, lora
from .header import METADATA
from .lora import Lora
from .reading import check_numbers, is_safetensors, load_pickle, outline, read_safetensors
from .shapes import CheckpointError, vae_config

# peft's lora_alpha where a program doesn't set it; the pickles hold the rank alone.
PEFT_ALPHA = 8
# OMGSR's folders, and where the modules of each lie in the whole model.
OMGSR_FOLDERS = {"unet_lora_adapter": "", "vae_encoder_lora_adapter": "encoder."}
OMGSR_FILES = ("adapter_model.safetensors", "adapter_model.bin")
S3DIFF = "_de_mlp"
# HYPIR's keys: one adapter of peft's default name, and nothing else.
FLAT = re.compile(r"\.lora_[AB]\.default\.weight$")


@dataclass(frozen=True, kw_only=True)
class Restorer:
    """A published model: what its authors' own inference does, and on what terms.

    t_start, coeff_t: the timestep that the UNet is told, and the one whose noise level Eq. 2 uses;
    coeff_t None = alpha = beta = 1, the UNet's output is the residual itself.
    tile: side in pixels that it is run on. color_fix, precision: its own choice; precision None = it
    does not amplify rounding. min_side: smaller results are computed at this size.
    modules: how many modules of the UNet and of the autoencoder an adapter changes.
    terms: what must be accepted before it is converted.
    """

    name: str
    home: str
    licence: str
    t_start: int
    coeff_t: int | None
    modules: tuple[int, int]
    tile: int
    color_fix: str
    precision: str | None = None
    min_side: int = 512
    terms: str = ""

    def constants(self) -> dict[str, Any]:
        """t_start, alpha, beta and prediction type of Eq. 2."""
        alpha = beta = 1.0
        if self.coeff_t is not None:
            alpha = float(schedule.alpha_bar(self.coeff_t))
            beta = float(schedule.beta_bar(self.coeff_t))
        return {
            "t_start": self.t_start,
            "alpha": alpha,
            "beta": beta,
            "prediction_type": "epsilon",
        }


PISA = Restorer(
    name="PiSA-SR",
    home="github.com/csslc/PiSA-SR",
    licence="Apache-2.0",
    t_start=1,
    coeff_t=None,
    modules=(258, 0),
    tile=768,
    color_fix="adain",
)
OSEDIFF = Restorer(
    name="OSEDiff",
    home="github.com/cswry/OSEDiff",
    licence="Apache-2.0",
    t_start=999,
    coeff_t=999,
    modules=(258, 32),
    tile=768,
    color_fix="adain",
    # Eq. 2 multiplies the UNet's error by 14.6: 2 % in bf16 would be 30 % of the result.
    precision="fp16",
)
HYPIR = Restorer(
    name="HYPIR",
    home="github.com/XPixelGroup/HYPIR",
    licence="non-commercial",
    t_start=200,
    coeff_t=200,
    modules=(257, 0),
    tile=512,
    color_fix="wavelet",
    terms="HYPIR's weights belong to SupPixel Pty Ltd. Its licence (github.com/XPixelGroup/HYPIR, file "
    "LICENSE) allows non-commercial use alone (3a) and gives no right to copy, change or pass on "
    "the weights without written permission (2b); processing pictures for sale counts as "
    "commercial (1c).",
)
OMGSR = Restorer(
    name="OMGSR-S",
    home="github.com/wuer5/OMGSR",
    licence="none stated",
    t_start=273,
    coeff_t=273,
    modules=(194, 31),
    tile=512,
    color_fix="adain",
    terms="OMGSR-S is published without a licence (github.com/wuer5/OMGSR): without its authors' "
    "permission you have no right to copy or change its weights.",
)


@dataclass(frozen=True)
class Source:
    """A file of one of them: what it does to the UNet and to the autoencoder of its base.

    whole: it holds all tensors of both, and nothing of the base is left. notes: what was chosen while
    reading, for the header.
    """

    restorer: Restorer
    unet: Lora
    vae: Lora = field(default_factory=Lora)
    whole: bool = False
    notes: dict[str, Any] = field(default_factory=dict)


def name_of(path: Path) -> str | None:
    """Which of the restorers this file or folder is, by its keys; None for none of them.

    CheckpointError where the file can't be read.
    """
    contents = _contents(path)
    found = _which(contents)
    if found is None or (found[0] is HYPIR and len(contents) != 2 * HYPIR.modules[0]):
        # Any LoRA of peft's default name has HYPIR's keys.
        return None
    return found[0].name


def advice(path: Path) -> str | None:
    """What such a file is and what to do with it; None for another one. CheckpointError as `name_of`."""
    name = name_of(path)
    if name is None:
        return _part(path)
    article = "an" if name.startswith("O") else "a"
    return (
        f"this is {article} {name} adapter, not yet a model: gendr convert {_typed(path.name)} --base "
        f"SD21_FOLDER -o {_typed(f'{path.stem}-gendr.safetensors')} makes a GenDR file of it"
    )


def read(path: Path, *, semantic: bool = True, coeff_t: int | None = None) -> Source:
    """Recognise and read a source; every tensor of it is used.

    semantic: False leaves PiSA-SR's second adapter out. coeff_t: for HYPIR, instead of its own.
    CheckpointError in one sentence for anything else.
    """
    if not path.exists():
        raise CheckpointError(f"there is nothing at {path}: check the name and the folder")
    contents = _contents(path)
    if isinstance(contents, Mapping) and any(S3DIFF in str(key) for key in contents):
        raise CheckpointError(
            f"{path.name} is S3Diff, whose weights depend on each picture: it can't be converted; "
            f"{_known()}"
        )
    found = _which(contents)
    if found is None:
        if part := _part(path):
            raise CheckpointError(part)
        if path.is_file() and is_safetensors(path) and METADATA in outline(path)[0]:
            raise CheckpointError(
                f"{path.name} is a GenDR file already: give it to --model, or put it into models/gendr"
            )
        raise CheckpointError(
            f"{path.name} is none of the models that can be converted: {_known()}"
        )
    restorer, reader = found
    if not semantic and restorer is not PISA:
        raise CheckpointError(
            f"{restorer.name} has no semantic adapter: leave --semantic out for {path.name}"
        )
    if coeff_t is not None and restorer is not HYPIR:
        raise CheckpointError(
            f"{restorer.name} has one noise level: leave --coeff-t out for {path.name}"
        )
    try:
        source = reader(contents)
        _counted(source)
    except ValueError as error:
        raise CheckpointError(f"{path.name}, a {restorer.name} file: {error}") from error
    if not semantic:
        pairs = {
            module: {name: pair for name, pair in adapters.items() if not name.endswith("_sem")}
            for module, adapters in source.unet.pairs.items()
        }
        source = replace(source, unet=Lora(pairs, source.unet.replaced), notes={"semantic": 0})
    if coeff_t is not None:
        source = replace(
            source, restorer=replace(restorer, coeff_t=coeff_t), notes={"coeff_t": coeff_t}
        )
    return source


def digest(path: Path) -> str:
    """SHA-256 of a file, or of a folder's files in the order of their names."""
    sha = hashlib.sha256()
    files = sorted(p for p in path.rglob("*") if p.is_file()) if path.is_dir() else [path]
    for file in files:
        with open(file, "rb") as stream:
            while block := stream.read(1 << 20):
                sha.update(block)
    return sha.hexdigest()


def _part(path: Path) -> str | None:
    """What to do with one of OMGSR's two folders, or a file in it."""
    folder = path.resolve() if path.is_dir() else path.resolve().parent
    if folder.name not in OMGSR_FOLDERS:
        return None
    return (
        f"{path.name} is one part of OMGSR-S: give the folder {folder.parent.name} to gendr convert, "
        f"which holds {' and '.join(OMGSR_FOLDERS)}"
    )


def _typed(name: str) -> str:
    """A file's name as one word of a command line, in every shell."""
    return f'"{name}"' if " " in name else name


# ---- recognising ----


def _known() -> str:
    return "gendr convert knows the files of PiSA-SR, OSEDiff, HYPIR (SD2.1) and OMGSR-S; get one of them"


def _contents(path: Path) -> Any:
    """What a file holds; of a folder, its adapters' folders by name; tensors are mapped."""
    if path.is_dir():
        return {name: path / name for name in OMGSR_FOLDERS if (path / name).is_dir()}
    if not is_safetensors(path):
        return load_pickle(path)
    return read_safetensors(path).tensors


def _which(contents: Any) -> tuple[Restorer, Callable[[Any], Source]] | None:
    if not isinstance(contents, Mapping):
        return None
    keys = set(contents)
    if {"lora_rank_unet_pix", "lora_rank_unet_sem", "state_dict_unet"} <= keys:
        return PISA, _pisa
    if {"state_dict_unet", "state_dict_vae", "rank_unet", "rank_vae"} <= keys:
        return OSEDIFF, _osediff
    if keys == {"unet", "vae"} and all(isinstance(part, Mapping) for part in contents.values()):
        return OSEDIFF, _osediff_whole
    if keys == set(OMGSR_FOLDERS):
        return OMGSR, _omgsr
    if keys and all(isinstance(key, str) and FLAT.search(key) for key in keys):
        return HYPIR, _hypir
    return None


def _counted(source: Source) -> None:
    """ValueError unless exactly the modules are changed that the published model changes."""
    if source.whole:
        return
    for part, found, expected in zip(
        ("UNet", "autoencoder"), (source.unet, source.vae), source.restorer.modules, strict=True
    ):
        if len(found.pairs) != expected:
            raise ValueError(
                f"it changes {len(found.pairs)} modules of the {part}, the published one "
                f"{expected}: another version, or half a file"
            )


# ---- reading ----


def _pisa(contents: Mapping[str, Any]) -> Source:
    lists = {
        f"unet_lora_{side}_modules_{which}"
        for side in ("encoder", "decoder", "others")
        for which in ("pix", "sem")
    }
    ranks = {which: _rank(contents, f"lora_rank_unet_{which}") for which in ("pix", "sem")}
    _nothing_else(contents, {"state_dict_unet", "lora_rank_unet_pix", "lora_rank_unet_sem", *lists})
    tensors = _tensors(contents, "state_dict_unet")
    parts = {}
    for which, rank in ranks.items():
        mine = {k: v for k, v in tensors.items() if f"_{which}." in k}
        parts[which] = lora.read(mine, lora.exactly(PEFT_ALPHA, rank, "the file"), ())
        if len(parts[which].pairs) != PISA.modules[0]:
            raise ValueError(
                f"its adapter {which} changes {len(parts[which].pairs)} modules of the UNet, the "
                f"published one {PISA.modules[0]}: another version, or half a file"
            )
    if len(tensors) != sum(len(part.pairs) * 2 for part in parts.values()):
        odd = next(k for k in tensors if "_pix." not in k and "_sem." not in k)
        raise ValueError(f"{odd} belongs to neither of its two adapters: another version")
    return Source(PISA, lora.read(tensors, lambda rank: PEFT_ALPHA / rank, ()))


def _osediff(contents: Mapping[str, Any]) -> Source:
    lists = {f"unet_lora_{side}_modules" for side in ("encoder", "decoder", "others")}
    known = {"state_dict_unet", "state_dict_vae", "rank_unet", "rank_vae", *lists}
    _nothing_else(contents, known | {"vae_lora_encoder_modules"})
    parts = [
        lora.read(
            _tensors(contents, f"state_dict_{part}"),
            lora.exactly(PEFT_ALPHA, _rank(contents, f"rank_{part}"), "the file"),
            (),
        )
        for part in ("unet", "vae")
    ]
    whole = {"conv_in.weight", "conv_in.bias"}
    if parts[0].replaced.keys() != whole or parts[1].replaced:
        raise ValueError("conv_in, which was trained as a whole, is missing or not alone")
    return Source(OSEDIFF, *parts)


def _osediff_whole(contents: Mapping[str, Any]) -> Source:
    """Merged already: every tensor of the base is replaced."""
    unet, vae = _tensors(contents, "unet"), _tensors(contents, "vae")
    names = layouts.vae_names(vae, vae_config(vae))
    renamed = {new: layouts.linear(new, vae[old]) for new, old in names.items()}
    return Source(OSEDIFF, Lora(replaced=unet), Lora(replaced=renamed), whole=True)


def _hypir(contents: Mapping[str, Any]) -> Source:
    # lora_alpha is the rank.
    return Source(HYPIR, lora.read(contents, lambda rank: 1.0, ()))


def _omgsr(contents: Mapping[str, Path]) -> Source:
    parts = []
    for name, prefix in OMGSR_FOLDERS.items():
        folder = contents[name]
        file = next((folder / n for n in OMGSR_FILES if (folder / n).exists()), None)
        if file is None:
            raise ValueError(f"{name} holds no {OMGSR_FILES[0]}: is the download complete?")
        found = lora.read(_contents(file), lora.scaling_of(file), ())
        parts.append(Lora({f"{prefix}{module}": pair for module, pair in found.pairs.items()}))
        if found.replaced:
            raise ValueError(f"{name} replaces whole modules, which the published one does not")
    return Source(OMGSR, *parts)


def _rank(contents: Mapping[str, Any], key: str) -> int:
    rank = contents[key]
    if not isinstance(rank, int) or rank < 1:
        raise ValueError(f"{key} is {rank!r} instead of a rank: another version")
    return rank


def _tensors(contents: Mapping[str, Any], key: str) -> dict[str, Tensor]:
    """A state dict, all of whose values are tensors."""
    values = contents[key]
    odd = [k for k, v in values.items() if not isinstance(v, torch.Tensor)] if values else []
    if not isinstance(values, Mapping) or odd:
        raise ValueError(f"{key} holds {odd[0] if odd else 'nothing'}: another version")
    check_numbers(values)
    return dict(values)


def _nothing_else(contents: Mapping[str, Any], known: set[str]) -> None:
    if unknown := sorted(map(str, contents.keys() - known)):
        raise ValueError(f"{unknown[0]} is not part of the published file: another version")
