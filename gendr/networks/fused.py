"""Norms, activations, biases and sums in few passes over memory; projections of one input as one.

Each function has one meaning and two ways: torch's own operations, in the order in which the
networks are put together, and Triton kernels on a card where `trouble` finds none. Triton is
optional: ComfyUI has it on Linux with CUDA only.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..errors import first_line

# Largest relative error of the kernels in the trial; bf16 rounds to 2^-8.
TOLERANCE = 0.02


def norm(x: Tensor, layer: nn.Module, shift: Tensor | None = None, *, silu: bool = True) -> Tensor:
    """silu(layer(x + shift)): b c h w -> b c h w.

    layer: a GroupNorm, or Identity where a network has none. shift: c, a bias left out before.
    """
    if by_kernel(x):
        from . import triton_kernels as kernels

        if isinstance(layer, nn.GroupNorm):
            return kernels.group_norm(x, layer, shift, silu)
        if silu or shift is not None:
            return kernels.add(x, None, [] if shift is None else [shift], silu)
        return x
    if shift is not None:
        x = x + shift[:, None, None]
    x = layer(x)
    return F.silu(x) if silu else x


def add(x: Tensor, other: Tensor, *biases: Tensor | None) -> Tensor:
    """x + biases + other: the end of a residual block, b c h w. biases: up to two, c each."""
    given = [bias for bias in biases if bias is not None]
    if by_kernel(x):
        from . import triton_kernels as kernels

        return kernels.add(x, other, given, False)
    for bias in given:
        x = x + bias[:, None, None]
    return x + other


def convolve(layer: nn.Conv2d, x: Tensor) -> Tensor:
    """The convolution without its bias, which the pass behind it adds on its way."""
    return F.conv2d(x, layer.weight, None, layer.stride, layer.padding)


def by_kernel(x: Tensor) -> bool:
    """Whether kernels work on this tensor; they have no gradient."""
    return x.is_cuda and not x.requires_grad and not trouble(str(x.device))


@functools.lru_cache
def trouble(device: str) -> str:
    """Why kernels can't be used on this device; empty where they were tried and are right."""
    try:
        from . import triton_kernels as kernels
    except ImportError:
        return "Triton is not installed"
    generator = torch.Generator().manual_seed(0)
    layer = nn.GroupNorm(4, 24)
    try:
        with torch.inference_mode():
            layer.weight.uniform_(0.5, 1.5, generator=generator)
            layer.bias.uniform_(-0.5, 0.5, generator=generator)
            layer.to(device, torch.bfloat16)
            for order in (torch.channels_last, torch.contiguous_format):
                x = torch.randn(2, 24, 40, 36, generator=generator).to(device, torch.bfloat16)
                x, shift = x.contiguous(memory_format=order), x[0, :, 0, 0].clone()
                found = kernels.group_norm(x, layer, shift, True).float()
                whole = x.float() + shift.float()[:, None, None]
                weight, bias = layer.weight.float(), layer.bias.float()
                wanted = F.silu(F.group_norm(whole, 4, weight, bias, layer.eps))
                error = float((found - wanted).norm() / wanted.norm())
                if not error <= TOLERANCE:
                    return f"Triton's kernels are wrong here (relative error {error:.2g})"
    except Exception as error:  # compilers fail in many ways, all meaning the same
        return f"Triton fails here ({type(error).__name__}: {first_line(error)})"
    return ""


def join(*layers: nn.Module) -> bool:
    """Lay the weights of linear layers one behind the other in memory, without a second copy.

    The layers keep their own parameters, as views. False where that can't be done.
    """
    if not all(type(layer) is nn.Linear for layer in layers):
        return False
    for name in ("weight", "bias"):
        parts = [getattr(layer, name) for layer in layers]
        if any(part is None for part in parts):
            continue
        whole = torch.cat([part.detach() for part in parts])
        views = whole.split([len(part) for part in parts])
        for layer, view in zip(layers, views, strict=True):
            setattr(layer, name, nn.Parameter(view, requires_grad=False))
    return True


def joined(*layers: nn.Module) -> tuple[Tensor, Tensor | None] | None:
    """(weight, bias) of layers that `join` joined; None where something has moved them since."""
    weight = _behind([layer.weight for layer in layers])
    if weight is None:
        return None
    if layers[0].bias is None:
        return weight, None
    bias = _behind([layer.bias for layer in layers])
    return None if bias is None else (weight, bias)


def _behind(parts: Sequence[Tensor]) -> Tensor | None:
    first, at = parts[0], parts[0].data_ptr()
    storage = first.untyped_storage().data_ptr()
    for part in parts:
        if part.data_ptr() != at or part.untyped_storage().data_ptr() != storage:
            return None
        if part.dtype != first.dtype or not part.is_contiguous():
            return None
        at += part.numel() * part.element_size()
    size = (sum(len(part) for part in parts), *first.shape[1:])
    return first.as_strided(size, first.stride())
