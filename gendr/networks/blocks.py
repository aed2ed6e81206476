"""What the UNet and the VAE are built from. Parameter names are those of diffusers.

Every block takes an `operations` namespace (`Linear`, `Conv2d`, `GroupNorm`, `LayerNorm`), `torch.nn`
by default, so that a host can pass layers that hold their weights elsewhere. `fast` is set by
`gendr.speed` where it pays: the same map in fewer passes over memory, equal up to rounding.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from . import fused

# Above this many bytes of attention weights the queries go in chunks; the result is the same.
ATTENTION_BYTES = 256 * 2**20
# Fused attention kernels of the common devices stop at this width of one head.
FUSED_HEAD = 256

# Making parity kernels costs as much as they save on maps of about 500 positions (measured in bf16
# on a CPU: 48 ns per pair of channels against 0.1 ns per pair and position); below twice that the
# plain form runs.
PHASE_POSITIONS = 1024

# Row kernels of a nearest 2x enlargement followed by a 3-tap filter, one line per output parity:
# even outputs see inputs (y-1, y), odd ones (y, y+1).
PHASES = (((1, 0, 0), (0, 1, 1)), ((1, 1, 0), (0, 0, 1)))


def _without_first_values(kind: type[nn.Module]) -> Callable[..., nn.Module]:
    quiet = type(kind.__name__, (kind,), {"reset_parameters": lambda layer: None})

    def make(*args: Any, **options: Any) -> nn.Module:
        layer = quiet(*args, **options)
        layer.__class__ = kind
        return layer

    return make


class Unset:
    """torch.nn's layers without first values, for networks whose weights are loaded afterwards.

    On the meta device torch draws them too, which takes longer than all the rest of building.
    """

    Linear = staticmethod(_without_first_values(nn.Linear))
    Conv2d = staticmethod(_without_first_values(nn.Conv2d))
    GroupNorm = staticmethod(_without_first_values(nn.GroupNorm))
    LayerNorm = staticmethod(_without_first_values(nn.LayerNorm))


def group_norm(operations: Any, groups: int, channels: int, eps: float) -> nn.Module:
    """GroupNorm, or nothing where a configuration has no groups."""
    return operations.GroupNorm(groups, channels, eps=eps) if groups else nn.Identity()


def phase_kernels(weight: Tensor) -> Tensor:
    """Kernels (2 2 o i 2 2) on the small picture that equal `nearest 2x, then 3x3` by parity.

    weight: o i 3 3. Sums are taken in float32 and rounded once to the weight's dtype.
    """
    rows = phase_rows(weight.device)
    kernels = torch.einsum("pay,oiyx,qbx->pqoiab", rows, weight.float(), rows)
    return kernels.to(weight.dtype)


@functools.lru_cache
def phase_rows(device: torch.device) -> Tensor:
    """`PHASES` on a device, once: a copy from the host would wait for the device in every call."""
    # Neither an inference tensor nor a fake one, whoever is first to ask.
    with torch.inference_mode(False):
        return torch.tensor(PHASES, device=device, dtype=torch.float32)


def phase_upsample(
    x: Tensor, weight: Tensor, bias: Tensor | None, *, keep_order: bool = False
) -> Tensor:
    """`conv3x3(nearest2x(x))` in 16 instead of 36 products per input pixel: b c h w -> b o 2h 2w.

    keep_order: the result lies in memory as x does; else its rows lie side by side.
    """
    b, _, h, w = x.shape
    kernels = phase_kernels(weight)
    padded = F.pad(x, (1, 1, 1, 1))
    last = keep_order and x.is_contiguous(memory_format=torch.channels_last)
    order = torch.channels_last if last else torch.contiguous_format
    size = (b, weight.shape[0], 2 * h, 2 * w)
    out = torch.empty(size, dtype=x.dtype, device=x.device, memory_format=order)
    for p in range(2):
        for q in range(2):
            window = padded[:, :, p : p + h + 1, q : q + w + 1]
            out[:, :, p::2, q::2] = F.conv2d(window, kernels[p, q], bias)
    return out


def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Softmax attention, b heads n c. Queries are chunked where the weights would not be fused."""
    b, heads, n, c = q.shape
    row = b * heads * k.shape[2] * q.element_size()
    if c <= FUSED_HEAD or n * row <= ATTENTION_BYTES:
        return F.scaled_dot_product_attention(q, k, v)
    chunk = max(1, ATTENTION_BYTES // row)
    parts = [F.scaled_dot_product_attention(part, k, v) for part in q.split(chunk, dim=2)]
    return torch.cat(parts, dim=2)


class ResnetBlock(nn.Module):
    """Two 3x3 convolutions with a shortcut: b c h w -> b o h w.

    temb: width of the timestep embedding; None where there is none, or where it was folded into
    the first convolution's bias.
    """

    fast = False

    def __init__(
        self,
        inputs: int,
        outputs: int,
        *,
        temb: int | None,
        groups: int,
        eps: float,
        operations: Any = nn,
    ):
        super().__init__()
        self.norm1 = group_norm(operations, groups, inputs, eps)
        self.conv1 = operations.Conv2d(inputs, outputs, 3, padding=1)
        self.time_emb_proj = operations.Linear(temb, outputs) if temb else None
        self.norm2 = group_norm(operations, groups, outputs, eps)
        self.conv2 = operations.Conv2d(outputs, outputs, 3, padding=1)
        self.conv_shortcut = operations.Conv2d(inputs, outputs, 1) if inputs != outputs else None

    def forward(self, x: Tensor, temb: Tensor | None = None) -> Tensor:
        if self.fast and self.time_emb_proj is None:
            return self.in_few_passes(x)
        # One name for every step: what is still called something stays in memory.
        h = self.norm1(x)
        h = F.silu(h)
        h = self.conv1(h)
        if self.time_emb_proj is not None:
            h = h + self.time_emb_proj(F.silu(temb))[:, :, None, None]
        h = self.norm2(h)
        h = F.silu(h)
        h = self.conv2(h)
        return h + (x if self.conv_shortcut is None else self.conv_shortcut(x))

    def in_few_passes(self, x: Tensor) -> Tensor:
        """The same; every bias is added by the pass that comes anyway."""
        h = fused.norm(x, self.norm1)
        h = fused.convolve(self.conv1, h)
        h = fused.norm(h, self.norm2, self.conv1.bias)
        h = fused.convolve(self.conv2, h)
        if self.conv_shortcut is None:
            return fused.add(h, x, self.conv2.bias)
        x = fused.convolve(self.conv_shortcut, x)
        return fused.add(h, x, self.conv2.bias, self.conv_shortcut.bias)


class Downsample(nn.Module):
    """3x3 convolution of stride 2: b c h w -> b c h/2 w/2.

    padding 1 is the UNet's way; 0 the VAE's, which extends right and bottom only.
    """

    def __init__(self, channels: int, *, padding: int, operations: Any = nn):
        super().__init__()
        self.padding = padding
        self.conv = operations.Conv2d(channels, channels, 3, stride=2, padding=padding)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(x if self.padding else F.pad(x, (0, 1, 0, 1)))


class Upsample(nn.Module):
    """Nearest 2x and a 3x3 convolution: b c h w -> b c 2h 2w.

    `phases` computes the same on the small picture; it reads the weight where it lies and so needs
    no second copy of it.
    """

    fast = False

    def __init__(self, channels: int, *, phases: bool = False, operations: Any = nn):
        super().__init__()
        self.phases = phases
        self.conv = operations.Conv2d(channels, channels, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        if self.phases and x.shape[-2] * x.shape[-1] >= PHASE_POSITIONS:
            # One rounding to the compute dtype, after the sums.
            weight = self.conv.weight.to(x.device, x.dtype)
            bias = self.conv.bias.to(x.device, x.dtype)
            return phase_upsample(x, weight, bias, keep_order=self.fast)
        return self.conv(F.interpolate(x, scale_factor=2.0, mode="nearest"))


def split_heads(x: Tensor, heads: int) -> Tensor:
    """b n (heads c) -> b heads n c."""
    return rearrange(x, "b n (heads c) -> b heads n c", heads=heads)


def merge_heads(x: Tensor) -> Tensor:
    """b heads n c -> b n (heads c)."""
    return rearrange(x, "b heads n c -> b n (heads c)")
