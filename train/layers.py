"""Layers for training, handed to the networks as their `operations`.

On CPUs with bf16 the library's weight gradient of a convolution on small maps takes many times
what the forward pass takes (measured: 60 ms against 0.7 ms for 128 channels at 8x8). Here it is one
matrix product of the unfolded input instead: the same sums, in another order.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

# Maps up to this many positions; above it the library's own kernel is as fast.
SMALL = 24 * 24


def unfolded(x: Tensor, kernel: int, stride: int, padding: int, h: int, w: int) -> Tensor:
    """Patches of b c . . as rows: (b h w) (kernel kernel c)."""
    b, c = x.shape[:2]
    if padding:
        x = F.pad(x, (padding,) * 4)
    x = x.permute(0, 2, 3, 1).contiguous()
    n, row, column, channel = x.stride()
    size = (b, h, w, kernel, kernel, c)
    steps = (n, row * stride, column * stride, row, column, channel)
    return x.as_strided(size, steps).reshape(b * h * w, kernel * kernel * c)


class _Convolution(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, stride: int, padding: int
    ) -> Tensor:
        ctx.save_for_backward(x, weight)
        ctx.stride, ctx.padding, ctx.bias = stride, padding, bias is not None
        return F.conv2d(x, weight, bias, stride, padding)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, weight = ctx.saved_tensors
        o, i, k, _ = weight.shape
        grad_x = grad_weight = grad_bias = None
        if ctx.needs_input_grad[0]:
            grad_x = torch.ops.aten.convolution_backward(
                grad, x, weight, None, [ctx.stride] * 2, [ctx.padding] * 2, [1, 1], False,
                [0, 0], 1, [True, False, False],
            )[0]  # fmt: skip
        if ctx.needs_input_grad[1]:
            rows = grad.permute(0, 2, 3, 1).reshape(-1, o)
            patches = unfolded(x, k, ctx.stride, ctx.padding, *grad.shape[-2:])
            grad_weight = (rows.T @ patches).reshape(o, k, k, i).permute(0, 3, 1, 2)
        if ctx.bias and ctx.needs_input_grad[2]:
            grad_bias = grad.sum((0, 2, 3))
        return grad_x, grad_weight, grad_bias, None, None


class Conv2d(nn.Conv2d):
    """`nn.Conv2d`, its weight gradient as one matrix product where that is faster: bf16, CPU, small maps."""

    def forward(self, x: Tensor) -> Tensor:
        if x.device.type != "cpu" or not torch.is_grad_enabled():
            return super().forward(x)
        dtype = torch.get_autocast_dtype("cpu") if torch.is_autocast_enabled("cpu") else x.dtype
        positions = x.shape[-2] * x.shape[-1] // self.stride[0] ** 2
        if dtype != torch.bfloat16 or positions > SMALL or self.stride[0] > 2:
            return super().forward(x)
        bias = None if self.bias is None else self.bias.to(dtype)
        return _Convolution.apply(
            x.to(dtype), self.weight.to(dtype), bias, self.stride[0], self.padding[0]
        )


Linear, GroupNorm, LayerNorm = nn.Linear, nn.GroupNorm, nn.LayerNorm
