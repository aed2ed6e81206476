"""Multiply-accumulate operations, counted on the meta device: any size, no weights, no time."""

from __future__ import annotations

from collections.abc import Callable, Iterable

import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from .memory import FusedAttention, LiveBytes

RULE = (
    "Counting rule: one MAC is one multiplication with its addition, in convolutions, linear layers "
    "and both matrix products of attention; norms, activations, sums and resizing are not counted. "
    "Half of what torch.utils.flop_counter counts while the network runs on the meta device, one "
    "picture, no tiles."
)

Stage = tuple[str, Callable[[Tensor], Tensor]]


def count_stages(stages: Iterable[Stage], x: Tensor) -> tuple[dict[str, int], dict[str, int]]:
    """(MACs, peak bytes of live tensors) of stages run one after another on a meta tensor x."""
    macs, peaks = {}, {}
    for name, run in stages:
        with torch.no_grad():
            # Apart from each other: the counter sees attention's products only on the plain way.
            with FlopCounterMode(display=False) as counter:
                run(x)
            with FusedAttention(), LiveBytes() as live:
                x = run(x)
        macs[name], peaks[name] = counter.get_total_flops() // 2, live.peak
    return macs, peaks
