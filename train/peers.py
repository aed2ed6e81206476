"""Other restorers, read by spandrel: teachers to learn from, peers to be measured against.

spandrel knows the architectures of most published restorers (ESRGAN, SwinIR, DAT, the compact
SRVGG and many more) by their weights. It imports torchvision for two of them, an inpainting and a
face model; torchvision's binaries fit one build of torch only, and on the package index that is
not the CPU one. Where it can't be imported, `spandrel` here does without it, and those two refuse.
"""

from __future__ import annotations

import contextlib
import hashlib
import importlib
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import torch
from torch import Tensor

from gendr.resizing import resize

# What spandrel's users of torchvision import, all from this module.
FUNCTIONAL = "torchvision.transforms.functional"
NAMES = ("InterpolationMode", "normalize", "rotate")


class PeerError(ValueError):
    """A model's file cannot be used; the message says why and what to do."""


def _missing(*_: Any, **__: Any) -> None:
    raise PeerError("this architecture needs torchvision: install the one made for your torch")


@contextlib.contextmanager
def _without_torchvision() -> Iterator[None]:
    """Modules in torchvision's place while spandrel is imported, gone afterwards: other libraries
    ask whether it is there."""
    before = {k: v for k, v in sys.modules.items() if k.partition(".")[0] == "torchvision"}
    for name in before:
        del sys.modules[name]
    parts = FUNCTIONAL.split(".")
    for end in range(1, len(parts) + 1):
        sys.modules[".".join(parts[:end])] = ModuleType(".".join(parts[:end]))
    for name in NAMES:
        setattr(sys.modules[FUNCTIONAL], name, _missing)
    try:
        yield
    finally:
        for end in range(1, len(parts) + 1):
            del sys.modules[".".join(parts[:end])]
        sys.modules.update(before)


def spandrel() -> ModuleType:
    """The library. PeerError where it isn't installed."""
    if "spandrel" in sys.modules and sys.modules["spandrel"] is not None:
        return sys.modules["spandrel"]
    try:
        importlib.import_module(FUNCTIONAL)
        usable = True
    except (ImportError, RuntimeError, OSError):  # built for another torch: it fails in many ways
        usable = False
    try:
        with contextlib.nullcontext() if usable else _without_torchvision():
            return importlib.import_module("spandrel")
    except ImportError as error:
        raise PeerError(
            "spandrel is needed to read this model: pip install --no-deps spandrel"
        ) from error


def read(path: Path) -> Any:
    """spandrel's descriptor of a model from one picture to one picture, in evaluation mode."""
    library = spandrel()
    if not path.exists():
        raise PeerError(f"{path} does not exist")
    try:
        model = library.ModelLoader().load_from_file(str(path))
    except Exception as error:  # spandrel's errors share no class below Exception
        raise PeerError(f"spandrel can't read {path.name}: {error}") from error
    if not isinstance(model, library.ImageModelDescriptor):
        raise PeerError(f"{path.name} is not a model from one picture to one picture")
    return model.eval()


class Teacher:
    """A frozen restorer. network: `b 3 h w` in [0, 1] to about [0, 1], `scale` times larger."""

    def __init__(
        self,
        network: Callable[[Tensor], Tensor],
        *,
        digest: str,
        device: torch.device | str = "cpu",
        dtype: torch.dtype = torch.float32,
    ):
        """digest: of the weights' file, for records."""
        self.network, self.digest = network, digest
        self.device, self.dtype = torch.device(device), dtype

    @torch.inference_mode()
    def __call__(self, pictures: Tensor, side: int) -> Tensor:
        """`b 3 h w` in [0, 1] to `b 3 side side` in [0, 1], in steps of 8 bits; reduced or enlarged
        where the network's own scale gives another size."""
        x = pictures.to(self.device, self.dtype)
        y = resize(self.network(x).float(), (side, side))
        return y.mul(255).round_().div_(255)

    def restore(self, pixels: np.ndarray, side: int) -> np.ndarray:
        """`b h w 3` uint8 to `b side side 3` uint8, as by calling it."""
        y = self(torch.tensor(pixels).permute(0, 3, 1, 2).float() / 255, side)
        y = y.mul(255).round_().to(torch.uint8)
        return np.ascontiguousarray(y.permute(0, 2, 3, 1).cpu().numpy())


def teacher(path: Path, *, device: str = "cpu", half: bool = False) -> Teacher:
    """A teacher from a file. half: bfloat16, where the architecture can."""
    model = read(path)
    dtype = torch.bfloat16 if half and model.supports_bfloat16 else torch.float32
    model.to(device, dtype)
    model.model.requires_grad_(False)
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    return Teacher(model, digest=digest, device=device, dtype=dtype)
