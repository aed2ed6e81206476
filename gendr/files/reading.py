"""The named tensors of one file: safetensors, or a pickle that is read as tensors and never executed."""

from __future__ import annotations

import contextlib
import json
import math
import re
import stat
import warnings
import zipfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from .. import devices
from ..errors import first_line, uncoloured
from .header import printable
from .shapes import CheckpointError

SAFETENSORS = (".safetensors", ".sft")
EXTENSIONS = (*SAFETENSORS, ".pth", ".pt", ".bin", ".ckpt")
# Under which training programs keep the weights of a pickle that holds more than weights.
NESTED = ("params_ema", "ema", "params", "state_dict", "model")
# torch writes terminal colours into its messages.
# torch stores weights as they are. Packed again by other programs they shrink by less than this.
PACKED = 16
# Stable Diffusion 2.1 with its autoencoder has 936; the largest diffusion models a few thousand.
MOST_TENSORS = 20_000
# Bytes of a configuration file; they have a few thousand.
LARGEST_JSON = 10_000_000
# Characters of a message.
LONGEST = 600
ZIP, PICKLE = b"PK\x03\x04", b"\x80"
# What people take for a model file, by its first bytes, and what to do.
OTHERS = {
    b"GGUF": "a GGUF file, whose weights are quantised: get them as safetensors in fp16, bf16 or fp32",
    b"{": "a text file (JSON): give the weights themselves, or the folder that they lie in",
    b"<": "a web page: the download went wrong, fetch the file itself",
    b"version https://git-lfs": "a Git LFS pointer: fetch the file itself with `git lfs pull`",
    b"\x89PNG": "a picture, not a model file",
    b"\xff\xd8\xff": "a picture, not a model file",
    b"\x89HDF": "an HDF5 file of another program: get the weights as safetensors",
    b"\x1f\x8b": "a compressed file: unpack it first",
    b"7z\xbc\xaf": "a 7-Zip archive: unpack it first",
    b"Rar!": "a RAR archive: unpack it first",
}
NUMBERS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


@dataclass(frozen=True)
class File:
    """What one file holds. tensors: mapped from the disk where the format allows, read when used."""

    path: Path
    metadata: dict[str, str]
    tensors: dict[str, Tensor]

    @property
    def name(self) -> str:
        return self.path.name


@contextlib.contextmanager
def naming(path: Path) -> Iterator[None]:
    """Whatever is wrong with a model file becomes one CheckpointError that names it.

    FileNotFoundError stays what it is.
    """
    try:
        yield
    except FileNotFoundError:
        raise
    except ValueError as error:
        told = str(error)
        if not isinstance(error, CheckpointError) or path.name not in told:
            told = f"{path.name} can't be used: {told}"
        # Names of tensors come from the file: any length, any characters.
        if len(told) > LONGEST or told != printable(told):
            told = printable(told)[:LONGEST]
        if told == str(error):
            raise
        raise CheckpointError(told) from error
    except OSError as error:
        raise CheckpointError(f"{path} can't be read: {error.strerror or error}") from error
    except Exception as error:
        if devices.is_oom(error):
            raise CheckpointError(
                f"{path.name} needs more memory than there is: close other programs, or take a smaller "
                "model"
            ) from error
        raise CheckpointError(
            f"{path.name} can't be used, it is damaged or made for something else: get it again "
            f"({type(error).__name__}: {first_line(error)})"
        ) from error


def read_file(path: Path) -> File:
    """All tensors of one file. FileNotFoundError or CheckpointError with a sentence."""
    check_exists(path)
    if is_safetensors(path):
        return read_safetensors(path)
    return File(path, {}, read_pickle(path))


def is_safetensors(path: Path) -> bool:
    """Whether a file is of that format, by its first bytes; by its name where they do not tell.

    CheckpointError with what to do for a file that is known to be neither that nor a pickle.
    """
    with path.open("rb") as file:
        start = file.read(64)
    length = int.from_bytes(start[:8], "little")
    if start[8:9] == b"{" and 0 < length < path.stat().st_size:
        return True
    for magic, what in OTHERS.items():
        if start.startswith(magic):
            raise CheckpointError(f"{path.name} is {what}")
    if start.startswith((ZIP, PICKLE)):
        return False
    return path.suffix.lower() in SAFETENSORS


def check_exists(path: Path) -> None:
    """FileNotFoundError or CheckpointError for what is not a file with something in it.

    A pipe or a device would be waited for without end, so nothing but files is opened.
    """
    try:
        found = path.stat()
    except (FileNotFoundError, NotADirectoryError):
        raise FileNotFoundError(f"no model file at {path}: check the name and the folder") from None
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path} can't be read: {first_line(error)}") from error
    if not stat.S_ISREG(found.st_mode):
        raise CheckpointError(f"{path} is a folder, a device or a pipe, not a model file")
    if found.st_size == 0:
        raise CheckpointError(f"{path.name} is empty (0 bytes): get it again")


def outline(path: Path) -> tuple[dict[str, str], dict[str, Tensor], list[str]]:
    """(metadata, tensors without their numbers, dtypes in the format's words) of a safetensors file."""
    with whole(path), safe_open(path, framework="pt") as file:
        slices = {name: file.get_slice(name) for name in names(path, file)}
        shapes = {name: torch.empty(s.get_shape(), device="meta") for name, s in slices.items()}
        return file.metadata() or {}, shapes, sorted({s.get_dtype() for s in slices.values()})


def read_safetensors(path: Path) -> File:
    """A safetensors file; nothing of its weights is read before it is used."""
    with whole(path), safe_open(path, framework="pt") as file:
        tensors = {name: file.get_tensor(name) for name in names(path, file)}
        return File(path, file.metadata() or {}, tensors)


def names(path: Path, file: Any) -> list[str]:
    """Names of the tensors in an open file. CheckpointError for more than any model has."""
    found = list(file.keys())
    if len(found) > MOST_TENSORS:
        raise CheckpointError(f"{path.name} holds {len(found):,} tensors: it is no model file")
    return found


@contextlib.contextmanager
def whole(path: Path) -> Iterator[None]:
    """Says in a sentence that a file is no safetensors file."""
    try:
        yield
    except SafetensorError as error:
        raise CheckpointError(
            f"{path.name} is not a whole safetensors file: it was cut short while loading, or "
            f"is something else under this name; get it again ({first_line(error)})"
        ) from error


def load_pickle(path: Path) -> Any:
    """All that torch.save wrote, in its present format or the one before 1.6: nothing but data."""
    mapped = check_zip(path)
    try:
        with warnings.catch_warnings():
            # Of pickles that hold more than tensors; what can't be read is said below.
            warnings.simplefilter("ignore")
            if path.suffix.lower() in SAFETENSORS:  # torch goes by that name
                with path.open("rb") as file:
                    return torch.load(file, map_location="cpu", weights_only=True)
            return torch.load(path, map_location="cpu", weights_only=True, mmap=mapped)
    except PermissionError:
        raise
    except Exception as error:  # torch raises many kinds here, all meaning the same
        if devices.is_oom(error):
            raise
        raise CheckpointError(
            f"{path.name} can't be read as plain tensors and is not executed: {unpickling(error)}"
        ) from error


def read_pickle(path: Path) -> dict[str, Tensor]:
    """The tensors of a pickle that holds one network, whatever it wraps them in."""
    loaded = load_pickle(path)
    for key in NESTED:
        if isinstance(loaded, dict) and isinstance(loaded.get(key), dict):
            loaded = loaded[key]
    if not isinstance(loaded, dict):
        raise CheckpointError(f"{path.name} holds no named tensors: it is not a model file")
    return {k: v for k, v in loaded.items() if isinstance(k, str) and isinstance(v, Tensor)}


def unpickling(error: Exception) -> str:
    """What stopped torch's reader, and what to do, without its advice to let the file run its code."""
    found = re.search(r"(?:GLOBAL|function|global) ([\w.]+)", uncoloured(error))
    if found:
        return f"it asks for {found[1]}; use a safetensors file"
    return "it is no model file, or damaged; get it again, or use a safetensors file"


def check_zip(path: Path) -> bool:
    """Whether a pickle's weights lie in the file as they are, so that they can be mapped.

    CheckpointError for a file that would unpack to more than weights can be packed to, or to more
    than there is memory for: a few megabytes can hold gigabytes of zeros.
    """
    size = path.stat().st_size
    if not zipfile.is_zipfile(path):
        room(path, size)
        return False
    try:
        with zipfile.ZipFile(path) as archive:
            items = archive.infolist()
    except (zipfile.BadZipFile, OSError, ValueError) as error:
        raise CheckpointError(
            f"{path.name} is not a whole file of torch's: get it again ({first_line(error)})"
        ) from error
    if all(item.compress_type == zipfile.ZIP_STORED for item in items):
        return True
    unpacked = sum(item.file_size for item in items)
    if unpacked > PACKED * size:
        raise CheckpointError(
            f"{path.name} would unpack from {size / 1e6:,.1f} MB to {unpacked / 1e6:,.1f} MB, which "
            "weights can't: it is no model file"
        )
    room(path, unpacked)
    return False


def room(path: Path, needed: int) -> None:
    """CheckpointError where a file can't be read into the memory that is free."""
    free = devices.free_bytes(torch.device("cpu"))
    if needed > free:
        raise CheckpointError(
            f"{path.name} needs {needed / 1e9:,.1f} GB of memory, {free / 1e9:,.1f} GB are free: "
            "close other programs, or use a safetensors file, which is read piece by piece"
        )


def finite(tensor: Tensor) -> bool:
    """Whether no value is NaN or infinite.

    The extremes of a tensor with NaN are NaN, and are found 40 times faster than by `isfinite`.
    """
    return not tensor.numel() or all(math.isfinite(x) for x in torch.aminmax(tensor))


def check_numbers(tensors: dict[str, Tensor]) -> None:
    """CheckpointError for the first tensor that holds something else than plain numbers."""
    for name, tensor in tensors.items():
        if tensor.is_meta or tensor.layout is not torch.strided or tensor.is_quantized:
            raise CheckpointError(
                f"{name} is stored without its numbers, sparsely or quantised: get a file with plain "
                "weights in fp16, bf16 or fp32"
            )
        if tensor.dtype not in NUMBERS:
            kind = str(tensor.dtype).removeprefix("torch.")
            what = "8-bit floats" if kind.startswith("float8") else "no weights"
            raise CheckpointError(
                f"{name} is {kind}, which are {what}: GenDR takes fp16, bf16 or fp32; get the file in "
                "one of them"
            )


def read_json(path: Path) -> dict[str, Any]:
    """A configuration file; CheckpointError where it is none."""
    try:
        check_exists(path)
        if path.stat().st_size > LARGEST_JSON:
            raise ValueError(f"{path.stat().st_size / 1e6:.0f} MB are too much for settings")
        values = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise CheckpointError(f"{path} is missing: get it again") from None
    except CheckpointError:
        raise
    except (OSError, ValueError, RecursionError) as error:
        raise CheckpointError(f"{path} is not JSON: get it again ({first_line(error)})") from error
    if not isinstance(values, dict):
        raise CheckpointError(f"{path} holds no settings: get it again")
    return values
