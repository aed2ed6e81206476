"""LoRA adapters merged into the weights they were trained for: W + s B A, summed over adapters.

The names are peft's: `MODULE.lora_A[.ADAPTER].weight` (r i) and `MODULE.lora_B[.ADAPTER].weight` (o r),
and `MODULE.base_layer.weight|bias` for a module that was trained as a whole beside its adapter.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .header import shown
from .layouts import UNET_PREFIXES
from .reading import read_json
from .shapes import CheckpointError

# What peft puts in front of every name when it saves a model of its own.
PEFT = "base_model.model."
FACTOR = re.compile(r"^(?P<module>.+)\.lora_(?P<side>[AB])(?:\.(?P<adapter>[^.]+))?\.weight$")
WHOLE = re.compile(r"^(?P<module>.+)\.base_layer\.(?P<what>weight|bias)$")

# Switches of peft that change what an adapter computes, and the value that leaves it as it is.
PEFT_SWITCHES = {
    "use_dora": False,
    "use_rslora": False,
    "fan_in_fan_out": False,
    "bias": "none",
    "rank_pattern": {},
    "alpha_pattern": {},
    "modules_to_save": None,
}

# s of a rank; peft's is lora_alpha / rank.
Scaling = Callable[[int], float]


@dataclass(frozen=True)
class Pair:
    """One adapter of one module: s B A. a: r i [kh kw], b: o r [1 1]."""

    a: Tensor
    b: Tensor
    scaling: float

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of the weight that this changes."""
        return (self.b.shape[0], *self.a.shape[1:])

    def product(self) -> Tensor:
        """s B A in float32, in the shape of the weight."""
        a, b = self.a.float().flatten(1), self.b.float().flatten(1)
        return (b @ a).reshape(self.shape) * self.scaling


@dataclass(frozen=True)
class Lora:
    """What a set of adapters does to a network: whole tensors first, then sums of products.

    pairs: module -> its adapters, by the adapters' names. replaced: tensor name -> what stands in
    its place.
    """

    pairs: dict[str, dict[str, Pair]] = field(default_factory=dict)
    replaced: dict[str, Tensor] = field(default_factory=dict)

    def check(self, shapes: Mapping[str, Iterable[int]]) -> None:
        """ValueError naming the first change that a network of these tensors has no place for."""
        for module, adapters in self.pairs.items():
            for pair in adapters.values():
                self._fits(f"{module}.weight", pair.shape, module, shapes)
        for name, tensor in self.replaced.items():
            self._fits(name, tuple(tensor.shape), name.rpartition(".")[0], shapes)

    @staticmethod
    def _fits(
        name: str, shape: tuple[int, ...], module: str, shapes: Mapping[str, Iterable[int]]
    ) -> None:
        if name not in shapes:
            raise ValueError(f"the LoRA changes {module}, which the base does not have")
        if tuple(shapes[name]) != shape:
            raise ValueError(
                f"the LoRA was made for another base: {module} is {tuple(shapes[name])} in the "
                f"base, {shape} in the LoRA"
            )

    def apply(self, name: str, tensor: Tensor) -> Tensor:
        """The tensor of this name after merging: float32 where it changes, else as it is."""
        tensor = self.replaced.get(name, tensor)
        adapters = (
            self.pairs.get(name.removesuffix(".weight")) if name.endswith(".weight") else None
        )
        if adapters:
            # A copy in any case: the sum goes in place, and the base stays as it is.
            tensor = tensor.to(torch.float32, copy=True)
            for pair in adapters.values():
                tensor += pair.product()
        return tensor


def read(
    tensors: Mapping[str, Tensor], scaling: Scaling, prefixes: Iterable[str] = UNET_PREFIXES
) -> Lora:
    """The adapters and replacements among these tensors, every one of which must be used.

    prefixes: what may stand before a module's name and does not belong to it. ValueError naming what
    is neither a LoRA tensor nor a replacement, an A without its B, and anything given twice.
    """
    prefixes = tuple(prefixes)
    sides: dict[tuple[str, str], dict[str, Tensor]] = {}
    replaced: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        if found := FACTOR.match(name):
            key = _module(found["module"], prefixes), found["adapter"] or ""
            place, slot = sides.setdefault(key, {}), found["side"]
        elif found := WHOLE.match(name):
            place, slot = replaced, f"{_module(found['module'], prefixes)}.{found['what']}"
        else:
            raise ValueError(
                f"{name} is neither a peft LoRA tensor nor a base_layer: convert the LoRA to peft's "
                "names"
            )
        if slot in place:
            raise ValueError(f"{name} is there twice, under two prefixes: get the file again")
        place[slot] = tensor
    pairs: dict[str, dict[str, Pair]] = {}
    for (module, adapter), pair in sides.items():
        if set(pair) != {"A", "B"}:
            raise ValueError(
                f"the LoRA of {module} has a lora_{next(iter(pair))} alone, its counterpart is "
                "missing: get the file again"
            )
        a, b = pair["A"], pair["B"]
        rank = a.shape[0]
        if min(a.dim(), b.dim()) < 2 or not rank or not rank or b.flatten(1).shape[1] != rank:
            raise ValueError(
                f"the LoRA of {module} does not fit together: lora_A is {tuple(a.shape)}, lora_B "
                f"{tuple(b.shape)}"
            )
        pairs.setdefault(module, {})[adapter] = Pair(a, b, scaling(rank))
    return Lora(pairs, replaced)


def scaling_of(path: Path, metadata: Mapping[str, str] | None = None) -> Scaling:
    """s of the adapter in this file, by its metadata or by the adapter_config.json that peft puts beside it.

    CheckpointError where neither says it, or says something that GenDR would compute otherwise.
    """
    settings = path.with_name("adapter_config.json")
    rank: Any = None
    if metadata and "lora_alpha" in metadata:
        found: Any = metadata["lora_alpha"]
    elif settings.exists():
        values = read_json(settings)
        found, rank = values.get("lora_alpha"), values.get("r")
        for switch, off in PEFT_SWITCHES.items():
            if values.get(switch, off) not in (off, None):
                raise CheckpointError(
                    f"{settings.name} of {path.name} sets {switch}, which GenDR can't merge: merge it "
                    "with peft's merge_and_unload"
                )
    else:
        raise CheckpointError(
            f"{path.name} doesn't say its lora_alpha: put peft's adapter_config.json beside it"
        )
    try:
        alpha = float(found)
    except (TypeError, ValueError):
        alpha = math.nan
    if not 0 < alpha < math.inf:
        raise CheckpointError(
            f"{path.name} has the lora_alpha {shown(found)}, which must be a number above 0: get the "
            "LoRA again, or correct it in peft's adapter_config.json"
        )
    return exactly(alpha, rank, settings.name)


def exactly(alpha: float, rank: int | None, where: str) -> Scaling:
    """alpha / rank, and ValueError for a module of another rank than `where` says."""

    def scaling(found: int) -> float:
        if rank is not None and found != rank:
            raise ValueError(f"a module has rank {found}, {where} says {rank}: another version")
        return alpha / found

    return scaling


def merge(state: Mapping[str, Tensor], lora: Lora) -> dict[str, Tensor]:
    """A whole state dict with a LoRA merged, each tensor in its own dtype. ValueError as `check`."""
    lora.check({name: tensor.shape for name, tensor in state.items()})
    return {name: lora.apply(name, tensor).to(tensor.dtype) for name, tensor in state.items()}


def _module(name: str, prefixes: tuple[str, ...]) -> str:
    name = name.removeprefix(PEFT)
    while found := next((p for p in prefixes if name.startswith(p)), None):
        name = name.removeprefix(found)
    return name
