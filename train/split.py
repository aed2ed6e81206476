"""Tensors that are split over processes (FSDP2): the piece of one process, and the whole.

Whatever is given that isn't split is its own piece and its own whole, so that callers need not ask.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


def is_split(tensor: Any) -> bool:
    """Whether a tensor is a piece of a larger one."""
    # By what it can do: importing DTensor takes a second that most runs need not spend.
    return hasattr(tensor, "full_tensor")


def own(tensor: Tensor) -> Tensor:
    """What this process holds of a tensor, in the same memory, without its graph."""
    return (tensor.to_local() if is_split(tensor) else tensor).detach()


def piece_of(piece: Tensor, like: Tensor) -> Tensor:
    """A process's piece as part of a whole that is split as `like` is."""
    if not is_split(like):
        return piece
    from torch.distributed.tensor import DTensor

    return DTensor.from_local(
        piece.to(like.device), like.device_mesh, like.placements, run_check=False,
        shape=like.shape, stride=like.stride(),
    )  # fmt: skip


def cut(whole: Tensor, like: Tensor) -> Tensor:
    """A whole tensor, which every process has, split as `like` is. ValueError where shapes differ."""
    if not is_split(like):
        return whole
    if whole.shape != like.shape:
        raise ValueError(f"a tensor has shape {tuple(whole.shape)}, expected {tuple(like.shape)}")
    from torch.distributed.tensor import distribute_tensor

    # Without a source: nothing is sent, each process takes its piece of what it has read itself.
    whole = whole.to(like.device, like.dtype)
    return distribute_tensor(whole, like.device_mesh, like.placements, src_data_rank=None)


@torch.no_grad()
def gather(state: Any, device: torch.device | str | None) -> Any:
    """Nested dicts and lists with all tensors whole and on a device; None where split ones were if
    no device is given.

    Every process calls this, at the same time and with the same names.
    """
    if isinstance(state, dict):
        return {k: gather(v, device) for k, v in state.items()}
    if isinstance(state, (list, tuple)):
        return [gather(v, device) for v in state]
    if not isinstance(state, Tensor):
        return state
    if not is_split(state):
        return state if device is None else state.detach().to(device)
    whole = state.full_tensor()
    return None if device is None else whole.detach().to(device)
