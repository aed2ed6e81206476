"""Triton kernels for graphics cards. Imported by `gendr.networks.fused` alone, and only where they are used.

A picture is a block of `positions` x `channels` in one of torch's two memory orders; strides say
which. All arithmetic is float32, results are rounded once.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor, nn

# Programs that a reduction is spread over, enough for the largest cards.
PROGRAMS = 1024
# Values of one block, and channels of it where channels lie side by side.
BLOCK, WIDE = 4096, 128


@triton.jit
def _moments(
    x, sums, squares, positions, channels, share, splits, sn, sc, sp, CB: tl.constexpr, PB: tl.constexpr
):  # fmt: skip
    """Per channel: sums of x and of its square around the first value, over one share of the positions."""
    n, split = tl.program_id(0), tl.program_id(1)
    c = tl.program_id(2) * CB + tl.arange(0, CB)
    there = c < channels
    x += n.to(tl.int64) * sn
    # Around a first estimate of the mean: sums of squares would cancel.
    first = tl.load(x + c.to(tl.int64) * sc, mask=there, other=0.0).to(tl.float32)
    total = tl.zeros([CB], tl.float32)
    square = tl.zeros([CB], tl.float32)
    stop = tl.minimum((split + 1) * share, positions)
    for start in range(split * share, stop, PB):
        p = start + tl.arange(0, PB)
        inside = (p < stop)[:, None] & there[None, :]
        at = p.to(tl.int64)[:, None] * sp + c.to(tl.int64)[None, :] * sc
        v = tl.load(x + at, mask=inside, other=0.0).to(tl.float32) - first[None, :]
        v = tl.where(inside, v, 0.0)
        total += tl.sum(v, 0)
        square += tl.sum(v * v, 0)
    out = (n * splits + split) * channels + c
    tl.store(sums + out, total, mask=there)
    tl.store(squares + out, square, mask=there)


@triton.jit
def _scales(
    x, shift, weight, bias, sums, squares, scales, offsets, positions, channels, splits, group,
    eps, sn, sc, SHIFT: tl.constexpr, CB: tl.constexpr, SB: tl.constexpr
):  # fmt: skip
    """Statistics of one group as y = x scale + offset per channel, the shift before it included."""
    n, g = tl.program_id(0), tl.program_id(1)
    inner = tl.arange(0, CB)
    there = inner < group
    c = g * group + inner
    total = tl.zeros([CB], tl.float32)
    square = tl.zeros([CB], tl.float32)
    for start in range(0, splits, SB):
        s = start + tl.arange(0, SB)
        inside = (s < splits)[:, None] & there[None, :]
        at = (n * splits + s)[:, None] * channels + c[None, :]
        total += tl.sum(tl.load(sums + at, mask=inside, other=0.0), 0)
        square += tl.sum(tl.load(squares + at, mask=inside, other=0.0), 0)
    first = tl.load(x + n.to(tl.int64) * sn + c.to(tl.int64) * sc, mask=there, other=0.0)
    mean = first.to(tl.float32) + total / positions
    moved = tl.zeros([CB], tl.float32)
    if SHIFT:
        moved = tl.load(shift + c, mask=there, other=0.0).to(tl.float32)
        mean += moved
    middle = tl.sum(tl.where(there, mean, 0.0), 0) / group
    apart = tl.where(there, mean - middle, 0.0)
    within = tl.where(there, square - total * total / positions, 0.0)
    variance = (tl.sum(within, 0) + positions * tl.sum(apart * apart, 0)) / (positions * group)
    scale = tl.load(weight + c, mask=there, other=0.0).to(tl.float32)
    scale = scale / tl.sqrt(tl.maximum(variance, 0.0) + eps)
    offset = tl.load(bias + c, mask=there, other=0.0).to(tl.float32) + (moved - middle) * scale
    tl.store(scales + n * channels + c, scale, mask=there)
    tl.store(offsets + n * channels + c, offset, mask=there)


@triton.jit
def _apply(
    x, other, first, second, scales, offsets, y, positions, channels, sn, sc, sp,
    NORM: tl.constexpr, BIASES: tl.constexpr, OTHER: tl.constexpr, SILU: tl.constexpr,
    CB: tl.constexpr, PB: tl.constexpr
):  # fmt: skip
    """One pass: scale and offset or biases, the other summand, SiLU."""
    n = tl.program_id(2)
    p = tl.program_id(0) * PB + tl.arange(0, PB)
    c = tl.program_id(1) * CB + tl.arange(0, CB)
    there = c < channels
    inside = (p < positions)[:, None] & there[None, :]
    at = n.to(tl.int64) * sn + p.to(tl.int64)[:, None] * sp + c.to(tl.int64)[None, :] * sc
    v = tl.load(x + at, mask=inside, other=0.0).to(tl.float32)
    if NORM:
        scale = tl.load(scales + n * channels + c, mask=there, other=0.0)
        offset = tl.load(offsets + n * channels + c, mask=there, other=0.0)
        v = v * scale[None, :] + offset[None, :]
    if BIASES > 0:
        v += tl.load(first + c, mask=there, other=0.0).to(tl.float32)[None, :]
    if BIASES > 1:
        v += tl.load(second + c, mask=there, other=0.0).to(tl.float32)[None, :]
    if OTHER:
        v += tl.load(other + at, mask=inside, other=0.0).to(tl.float32)
    if SILU:
        v = v / (1.0 + tl.exp(-v))
    tl.store(y + at, v.to(y.dtype.element_ty), mask=inside)


def ordered(x: Tensor) -> tuple[Tensor, bool]:
    """x in one of the two memory orders without gaps, and whether its channels lie side by side."""
    if x.is_contiguous():
        return x, False
    if x.is_contiguous(memory_format=torch.channels_last):
        return x, True
    return x.contiguous(), False


def blocks(channels: int, last: bool) -> tuple[int, int]:
    """(channels, positions) of one block."""
    wide = min(WIDE, triton.next_power_of_2(channels)) if last else 1
    return wide, BLOCK // wide


def splits(n: int, channels: int, positions: int, last: bool) -> tuple[int, int]:
    """(number of shares, positions of each, whole blocks) that a reduction is spread over."""
    wide, long = blocks(channels, last)
    most = max(1, PROGRAMS // (n * triton.cdiv(channels, wide)))
    share = triton.cdiv(triton.cdiv(positions, most), long) * long
    return triton.cdiv(positions, share), share


def strides(x: Tensor, last: bool) -> tuple[int, int, int]:
    """Steps in memory from picture to picture, channel to channel, position to position."""
    _, c, h, w = x.shape
    return (c * h * w, 1, c) if last else (c * h * w, h * w, 1)


def group_norm(x: Tensor, norm: nn.GroupNorm, shift: Tensor | None, silu: bool) -> Tensor:
    """GroupNorm of x + shift, with SiLU behind it if asked for: b c h w -> b c h w."""
    x, last = ordered(x)
    b, c, h, w = x.shape
    positions, (sn, sc, sp) = h * w, strides(x, last)
    wide, long = blocks(c, last)
    count, share = splits(b, c, positions, last)
    sums, squares = torch.empty(2, b, count, c, device=x.device, dtype=torch.float32).unbind()
    scales, offsets = torch.empty(2, b, c, device=x.device, dtype=torch.float32).unbind()
    group = c // norm.num_groups
    with on(x):
        _moments[(b, count, triton.cdiv(c, wide))](
            x, sums, squares, positions, c, share, count, sn, sc, sp, CB=wide, PB=long
        )
        _scales[(b, norm.num_groups)](
            *(x, x if shift is None else shift, norm.weight, norm.bias),
            *(sums, squares, scales, offsets, positions, c, count, group, norm.eps, sn, sc),
            SHIFT=shift is not None,
            CB=triton.next_power_of_2(group),
            SB=16,
        )
    return _pass(x, last, scales=scales, offsets=offsets, silu=silu)


def add(x: Tensor, other: Tensor | None, biases: list[Tensor], silu: bool) -> Tensor:
    """x + other + up to two biases per channel, with SiLU behind it if asked for."""
    x, last = ordered(x)
    if other is not None:
        order = torch.channels_last if last else torch.contiguous_format
        other = other.contiguous(memory_format=order)
    return _pass(x, last, other=other, biases=biases, silu=silu)


def _pass(
    x: Tensor,
    last: bool,
    *,
    other: Tensor | None = None,
    biases: list[Tensor] | None = None,
    scales: Tensor | None = None,
    offsets: Tensor | None = None,
    silu: bool,
) -> Tensor:
    b, c, h, w = x.shape
    y = torch.empty_like(x)
    wide, long = blocks(c, last)
    given = [*(biases or []), x, x]
    with on(x):
        _apply[(triton.cdiv(h * w, long), triton.cdiv(c, wide), b)](
            *(x, x if other is None else other, given[0], given[1]),
            *(x if scales is None else scales, x if offsets is None else offsets, y),
            *(h * w, c, *strides(x, last)),
            NORM=scales is not None,
            BIASES=len(biases or []),
            OTHER=other is not None,
            SILU=silu,
            CB=wide,
            PB=long,
        )
    return y


def on(x: Tensor) -> torch.cuda.device:
    """Triton launches on the current device, whatever its arguments lie on; -1 changes nothing."""
    return torch.cuda.device(x.get_device() if x.is_cuda else -1)
