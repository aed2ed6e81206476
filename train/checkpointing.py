"""Gradient checkpointing of a UNet, block by block."""

from __future__ import annotations

import types
from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from gendr.networks.unet import UNet

Contexts = Callable[[], tuple[AbstractContextManager, AbstractContextManager]]


def recompute_blocks(unet: UNet, contexts: Contexts | None = None) -> None:
    """Gradient checkpointing: every residual block with its transformer is recomputed in backward.

    contexts: makes (forward, recompute) contexts, called in the forward pass of each block.
    """
    # Not whole levels: those of the decoder side take from a list, which is empty the second time.
    for level in (*unet.down_blocks, *unet.up_blocks):
        _recompute(level, "block", contexts)
    _recompute(unet.mid_block, "forward", contexts)


def _recompute(module: nn.Module, name: str, contexts: Contexts | None) -> None:
    plain = getattr(type(module), name)
    options = {"context_fn": contexts} if contexts else {}

    def run(self: nn.Module, *args: Any) -> Tensor:
        if not torch.is_grad_enabled():
            return plain(self, *args)
        # Nothing in these networks draws random numbers, so there is no state to keep.
        return checkpoint(
            plain, self, *args, use_reentrant=False, preserve_rng_state=False, **options
        )

    setattr(module, name, types.MethodType(run, module))
