"""Pickles as plain data: tensors, numbers, texts, lists. Nothing in them is ever executed."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .shapes import CheckpointError

# torch writes terminal colours into its messages.
COLOURS = re.compile(r"\x1b\[[0-9;]*m")
# Under which training programs keep a network's tensors, the averaged ones first.
INSIDE = ("params_ema", "ema", "params", "state_dict", "model")


def load(path: Path) -> Any:
    """All that the file holds, its tensors mapped from it where its format allows that."""
    try:
        try:
            return torch.load(path, map_location="cpu", weights_only=True, mmap=True)
        except RuntimeError as error:
            # torch's format before 1.6 can't be mapped.
            if "mmap" not in str(error):
                raise
            return torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # torch raises many kinds here, all meaning the same
        raise CheckpointError(
            f"{path.name} can't be read as plain tensors and is not executed: it was cut short, or "
            f"holds a program; get it again, or as safetensors ({_first_line(error)})"
        ) from error


def tensors_of(path: Path) -> dict[str, Tensor]:
    """The tensors of a file that holds one network, whatever it wraps them in."""
    loaded = load(path)
    for key in INSIDE:
        if isinstance(loaded, dict) and isinstance(loaded.get(key), dict):
            loaded = loaded[key]
    if not isinstance(loaded, dict):
        raise CheckpointError(f"{path.name} holds no named tensors: it is not a model file")
    return {k: v for k, v in loaded.items() if isinstance(k, str) and isinstance(v, Tensor)}


def _first_line(error: Exception) -> str:
    return (COLOURS.sub("", str(error)).splitlines() or [type(error).__name__])[0][:160]
