"""What a run needs before it starts: parameters, and memory from networks on the meta device.

    with torch.device("meta"):
        unet = UNet(SD21_16)
    z, context = sample(unet.config, 512)
    fixed = training_bytes(parameters(unet))               # 16.1 GiB for the full size
    each = activation_bytes(unet, z, 500, context)         # of one picture of 512 px

Nothing is computed: the shapes alone tell what a backward pass would keep. The numbers are what tensors
hold; a CUDA context, workspaces and the allocator's gaps come on top (1 to 2 GiB).
"""

from __future__ import annotations

import types
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from gendr.networks.unet import UNet, UNetConfig

GIB = 2**30
# What CUDA's autocast computes in bf16 and in float32, of what these networks use.
IN_BF16 = {torch.conv2d, F.conv2d, F.linear, torch._C._nn.linear}
IN_FP32 = {F.group_norm, torch.group_norm, F.layer_norm, torch.layer_norm}


def parameters(*modules: nn.Module | None) -> int:
    """Number of parameters; None counts as nothing."""
    return sum(p.numel() for m in modules if m is not None for p in m.parameters())


def training_bytes(count: int, *, ema: bool = True) -> int:
    """Weights, gradients, AdamW's two moments, and averaged weights of `count` trained parameters,
    all in float32."""
    return count * 4 * (5 if ema else 4)


def frozen_bytes(count: int, dtype: torch.dtype = torch.float32) -> int:
    """Weights of `count` parameters that are not trained; or the bf16 copies that autocast makes."""
    return count * dtype.itemsize


def sample(config: UNetConfig, side: int, *, batch: int = 1, factor: int = 8) -> tuple[Any, ...]:
    """Latent and prompt on the meta device of `batch` pictures of `side` pixels."""
    size = (batch, config.latent_channels, side // factor, side // factor)
    context = torch.empty(batch, config.tokens, config.cross_attention_dim, device="meta")
    return torch.empty(size, device="meta"), context


def activation_bytes(module: nn.Module, *inputs: Any, autocast: bool = True) -> int:
    """Bytes that a backward pass through `module(*inputs)` keeps, without weights and inputs.

    module, inputs: on the meta device, in float32. With gradient checkpointing switched on in the
    module (`checkpointing.recompute_blocks`) only what lies between blocks is kept; what one block needs
    while it is recomputed is `block_bytes`. autocast: count as CUDA's bf16 autocast would store.
    """
    watch = _Watch(module, inputs)
    with _modes(autocast) as mode, torch.enable_grad(), watch.hooks():
        module(*inputs)
    return watch.total(mode)


def block_bytes(unet: UNet, *inputs: Any, autocast: bool = True) -> int:
    """Bytes of the largest block, which gradient checkpointing recomputes as a whole.

    unet: as built, without gradient checkpointing.
    """
    blocks = [(level, "block") for level in (*unet.down_blocks, *unet.up_blocks)]
    found: list[int] = []
    plain: list[tuple[nn.Module, str, Callable]] = []
    with _modes(autocast) as mode:
        for module, name in (*blocks, (unet.mid_block, "forward")):
            original = getattr(module, name)
            plain.append((module, name, original))

            def run(self: nn.Module, *args: Any, original: Callable = original) -> Tensor:
                watch = _Watch(unet, args)
                with watch.hooks():
                    out = original(*args)
                found.append(watch.total(mode))
                return out

            setattr(module, name, types.MethodType(run, module))
        try:
            with torch.enable_grad():
                unet(*inputs)
        finally:
            for module, name, _ in plain:
                delattr(module, name)
    return max(found)


def table(rows: Sequence[Sequence[object]]) -> str:
    """Rows as aligned columns; numbers of a column after the first stand to the right."""
    cells = [[str(c) for c in row] for row in rows]
    widths = [max(len(r[n]) for r in cells if n < len(r)) for n in range(max(map(len, cells)))]
    lines = []
    for row in cells:
        parts = [
            c.rjust(w) if n and c[:1].isdigit() else c.ljust(w)
            for n, (c, w) in enumerate(zip(row, widths, strict=False))
        ]
        lines.append("  ".join(parts).rstrip())
    return "\n".join(lines)


def plan(networks: dict[str, nn.Module], *, steps: int, batch: int, crop: int) -> str:
    """A run that trains these networks, all of them, in words."""
    rows: list[tuple[str, ...]] = [("network", "parameters", "weights, gradients, Adam, average")]
    for name, module in networks.items():
        count = parameters(module)
        rows.append((name, f"{count:,}", gib(training_bytes(count))))
    head = f"{steps:,} steps of {batch} pictures of {crop} px ({steps * batch:,} in all)"
    return f"{head}\n\n{table(rows)}"


def gib(count: float) -> str:
    """Bytes in GiB, or in MiB where they are few."""
    return f"{count / GIB:.2f} GiB" if count >= 0.1 * GIB else f"{count / 2**20:.1f} MiB"


class _Watch:
    """Storages that a graph keeps; weights and inputs are there anyway."""

    def __init__(self, module: nn.Module, inputs: Sequence[Any]):
        known = [*module.parameters(), *module.buffers()]
        known += [x for x in inputs if isinstance(x, Tensor)]
        self.known = {x.untyped_storage()._cdata for x in known}
        # The storage itself is kept: a freed one's address would be taken by the next.
        self.kept: dict[int, torch.UntypedStorage] = {}

    def hooks(self) -> torch.autograd.graph.saved_tensors_hooks:
        def pack(x: Tensor) -> Tensor:
            storage = x.untyped_storage()
            if storage._cdata not in self.known:
                self.kept[storage._cdata] = storage
            return x

        return torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x)

    def total(self, mode: _Fused) -> int:
        copies = {x.untyped_storage()._cdata for x in mode.copies.values()}
        return sum(s.nbytes() for key, s in self.kept.items() if key not in copies)


class _Fused(TorchFunctionMode):
    """Attention in one kernel, as GPUs run it: the meta device would count every weight of it."""

    def __init__(self) -> None:
        super().__init__()
        self.copies: dict[int, Tensor] = {}

    def __torch_function__(
        self, func: Any, kinds: Any, args: tuple = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        if func is F.scaled_dot_product_attention:
            q, k, v = (self.cast(x) for x in args[:3])
            if q.dtype == torch.float32:
                kernel = torch.ops.aten._scaled_dot_product_efficient_attention
                return kernel(q, k, v, None, True)[0]
            return torch.ops.aten._scaled_dot_product_flash_attention(q, k, v)[0]
        return self.call(func, args, kwargs)

    def cast(self, x: Any) -> Any:
        return x

    def call(self, func: Any, args: tuple, kwargs: dict[str, Any]) -> Any:
        return func(*args, **kwargs)


class _Autocast(_Fused):
    """CUDA's bf16 autocast, which the meta device does not have."""

    def cast(self, x: Any, dtype: torch.dtype = torch.bfloat16) -> Any:
        if not isinstance(x, Tensor) or not x.is_floating_point() or x.dtype == dtype:
            return x
        if not isinstance(x, nn.Parameter):
            return x.to(dtype)
        if id(x) not in self.copies:
            self.copies[id(x)] = x.to(dtype)
        return self.copies[id(x)]

    def call(self, func: Any, args: tuple, kwargs: dict[str, Any]) -> Any:
        if func in IN_BF16:
            args, kwargs = self._all(args, kwargs, torch.bfloat16)
        elif func in IN_FP32:
            args, kwargs = self._all(args, kwargs, torch.float32)
        return func(*args, **kwargs)

    def _all(self, args: tuple, kwargs: dict[str, Any], dtype: torch.dtype) -> tuple:
        return (
            tuple(self.cast(x, dtype) for x in args),
            {k: self.cast(v, dtype) for k, v in kwargs.items()},
        )


def _modes(autocast: bool) -> _Fused:
    return _Autocast() if autocast else _Fused()
