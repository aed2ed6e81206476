"""The kernels against torch, case by case. Run by test_fused.py in Triton's interpreter, on the CPU."""

from __future__ import annotations

import itertools

import torch
import torch.nn.functional as F
from torch import nn

from gendr.networks import fused
from gendr.networks import triton_kernels as kernels

# (channels, groups, height, width): groups of odd widths, maps of one position, several shares.
SHAPES = [(8, 4, 5, 7), (30, 3, 4, 4), (20, 2, 1, 1), (6, 2, 21, 13)]
ORDERS = (torch.contiguous_format, torch.channels_last)


def close(
    found: torch.Tensor, wanted: torch.Tensor, like: torch.Tensor, exactly: float = 2e-6
) -> None:
    # The interpreter cuts to bf16 where a card rounds.
    limit = exactly if like.dtype == torch.float32 else 8e-3
    assert found.dtype == like.dtype
    assert found.shape == like.shape
    # Far below zero SiLU leaves nothing that float32 could hold.
    error = float((found.double() - wanted).norm() / (wanted.norm() + 1e-6 * like.double().norm()))
    assert error <= limit, error


def main() -> None:
    kernels.BLOCK, kernels.PROGRAMS, kernels.WIDE = (
        64,
        16,
        16,
    )  # small shares, so that there are several
    generator = torch.Generator().manual_seed(0)
    count = 0
    for (c, groups, h, w), order, dtype, (with_shift, silu) in itertools.product(
        SHAPES, ORDERS, (torch.float32, torch.bfloat16), ((False, True), (True, False))
    ):
        # Far from zero: sums of squares must not cancel.
        x = torch.randn(2, c, h, w, generator=generator) + 50 * torch.randn(1, generator=generator)
        x = x.to(dtype).contiguous(memory_format=order)
        shift = torch.randn(c, generator=generator).to(dtype) if with_shift else None
        layer = nn.GroupNorm(groups, c, eps=1e-6).requires_grad_(False).to(dtype)
        layer.weight.copy_(1 + 0.3 * torch.randn(c, generator=generator))
        layer.bias.copy_(0.3 * torch.randn(c, generator=generator))
        exact = x.double() if shift is None else x.double() + shift.double()[:, None, None]
        exact = F.group_norm(exact, groups, layer.weight.double(), layer.bias.double(), layer.eps)
        found = kernels.group_norm(x, layer, shift, silu)
        # What float32 leaves of values around a hundred times their spread.
        close(found, F.silu(exact) if silu else exact, x, exactly=1e-4)
        assert found.is_contiguous(memory_format=order)

        other = torch.randn(2, c, h, w, generator=generator).to(dtype)
        biases = [torch.randn(c, generator=generator).to(dtype) for _ in range(2)]
        for n in range(3):
            wanted = x.double() + other.double()
            for bias in biases[:n]:
                wanted = wanted + bias.double()[:, None, None]
            close(kernels.add(x, other, biases[:n], silu), F.silu(wanted) if silu else wanted, x)
        count += 1
    # A view with gaps is taken as it comes.
    part = torch.randn(1, 8, 9, 12, generator=generator)[..., 2:7]
    layer = nn.GroupNorm(2, 8)
    wanted = layer(part.double().float()).double()
    close(kernels.group_norm(part, layer, None, False), wanted, part)
    assert not fused.trouble("cpu"), fused.trouble("cpu")
    print(f"{count} cases agree")  # noqa: T201 - for the test that runs this


if __name__ == "__main__":
    main()
