"""The denoising UNet in the shape of Stable Diffusion 2.1. Parameter names are diffusers' own."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from . import fused
from .blocks import Downsample, ResnetBlock, Upsample, attend, merge_heads, split_heads

EPS = 1e-5
# A prompt as a folded network takes it: keys and values, each 1 m c, by the names of the layers.
KeysValues = dict[str, tuple[Tensor, Tensor]]
# Of a network of any prompt b m d; of a folded one, how many prompts a batch holds, or another prompt.
Context = Tensor | int | KeysValues


@dataclass(frozen=True, kw_only=True)
class UNetConfig:
    """Shape of a UNet; the defaults are SD2.1's in a 16-channel latent.

    attention: which levels, finest first, have transformers.
    prompts: 0 = a network of any timestep and prompt. Above 0 the timestep is folded into biases
        and the keys and values of that many prompts are constants (`gendr.networks.onestep`).
    tokens: length of a folded prompt.
    phases: enlarge by parity kernels (`gendr.networks.blocks.phase_upsample`).
    """

    latent_channels: int = 16
    block_out_channels: tuple[int, ...] = (320, 640, 1280, 1280)
    attention: tuple[bool, ...] = (True, True, True, False)
    layers_per_block: int = 2
    head_dim: int = 64
    cross_attention_dim: int = 1024
    norm_num_groups: int = 32
    prompts: int = 0
    tokens: int = 77
    phases: bool = False

    def __post_init__(self) -> None:
        object.__setattr__(self, "block_out_channels", tuple(self.block_out_channels))
        object.__setattr__(self, "attention", tuple(self.attention))

    @property
    def time_dim(self) -> int:
        """Width of the timestep embedding."""
        return 4 * self.block_out_channels[0]

    @property
    def multiple(self) -> int:
        """Sides of a latent must be multiples of this."""
        return 2 ** (len(self.block_out_channels) - 1)


SD21_16 = UNetConfig()
SD21 = UNetConfig(latent_channels=4)
TINY_UNET = UNetConfig(
    block_out_channels=(80, 128),
    attention=(False, True),
    layers_per_block=1,
    head_dim=32,
    cross_attention_dim=64,
    norm_num_groups=16,
    tokens=4,
)


def timestep_embedding(t: Tensor, width: int) -> Tensor:
    """Sinusoids of the timestep, cosines first: b -> b width, float32."""
    half = width // 2
    rates = torch.exp(-math.log(10000) * torch.arange(half, device=t.device).float() / half)
    angles = t.float()[:, None] * rates
    return torch.cat([angles.cos(), angles.sin()], dim=-1)


class TimestepMLP(nn.Module):
    """Two linear layers on the sinusoids: b width -> b time_dim."""

    def __init__(self, width: int, outputs: int, *, operations: Any = nn):
        super().__init__()
        self.linear_1 = operations.Linear(width, outputs)
        self.linear_2 = operations.Linear(outputs, outputs)

    def forward(self, x: Tensor) -> Tensor:
        return self.linear_2(F.silu(self.linear_1(x)))


class Attention(nn.Module):
    """Multi-head attention, b n c -> b n c, to itself or to a context b m d."""

    fast = False

    def __init__(self, channels: int, context: int | None, head_dim: int, *, operations: Any = nn):
        super().__init__()
        self.heads = channels // head_dim
        self.to_q = operations.Linear(channels, channels, bias=False)
        self.to_k = operations.Linear(context or channels, channels, bias=False)
        self.to_v = operations.Linear(context or channels, channels, bias=False)
        self.to_out = nn.ModuleList([operations.Linear(channels, channels)])

    def forward(self, x: Tensor, context: Tensor | None = None) -> Tensor:
        whole = None
        if self.fast and context is None:
            whole = fused.joined(self.to_q, self.to_k, self.to_v)
        context = x if context is None else context
        parts = (
            (self.to_q(x), self.to_k(context), self.to_v(context))
            if whole is None
            else F.linear(x, *whole).chunk(3, dim=-1)
        )
        q, k, v = (split_heads(part, self.heads) for part in parts)
        return self.to_out[0](merge_heads(attend(q, k, v)))


class ConstantAttention(nn.Module):
    """Attention to prompts whose keys and values were computed once, each prompts m c.

    A batch holds the prompts one after another: batch element i belongs to prompt i // (b / prompts).
    """

    fast = False
    # Its name in the UNet, under which another prompt has its keys and values.
    place = ""

    def __init__(
        self, channels: int, prompts: int, tokens: int, head_dim: int, *, operations: Any = nn
    ):
        super().__init__()
        self.heads = channels // head_dim
        self.to_q = operations.Linear(channels, channels, bias=False)
        self.key = nn.Parameter(torch.zeros(prompts, tokens, channels))
        self.value = nn.Parameter(torch.zeros(prompts, tokens, channels))
        self.to_out = nn.ModuleList([operations.Linear(channels, channels)])

    def forward(self, x: Tensor, context: int | KeysValues) -> Tensor:
        """context: how many of the prompts this batch holds, or another prompt's keys and values."""
        if isinstance(context, int):
            prompts, constants = context, (self.key[:context], self.value[:context])
        else:
            prompts, constants = 1, context[self.place]
        k, v = (split_heads(t.to(x), self.heads) for t in constants)
        if self.fast and prompts == 1:
            k, v = (t.expand(x.shape[0], -1, -1, -1) for t in (k, v))
        else:
            k, v = (t.repeat_interleave(x.shape[0] // prompts, 0) for t in (k, v))
        return self.to_out[0](merge_heads(attend(split_heads(self.to_q(x), self.heads), k, v)))


class GEGLU(nn.Module):
    """Gated linear unit with the exact GELU: b n c -> b n o."""

    def __init__(self, inputs: int, outputs: int, *, operations: Any = nn):
        super().__init__()
        self.proj = operations.Linear(inputs, 2 * outputs)

    def forward(self, x: Tensor) -> Tensor:
        x, gate = self.proj(x).chunk(2, dim=-1)
        return x * F.gelu(gate)


class FeedForward(nn.Module):
    """GEGLU of four times the width and the way back. Slot 1 is diffusers' dropout, without weights."""

    def __init__(self, channels: int, *, operations: Any = nn):
        super().__init__()
        self.net = nn.ModuleList(
            [
                GEGLU(channels, 4 * channels, operations=operations),
                nn.Identity(),
                operations.Linear(4 * channels, channels),
            ]
        )

    def forward(self, x: Tensor) -> Tensor:
        return self.net[2](self.net[0](x))


class TransformerBlock(nn.Module):
    """Self-attention, attention to the prompt, feed-forward: b n c -> b n c."""

    def __init__(self, channels: int, c: UNetConfig, *, operations: Any = nn):
        super().__init__()
        self.norm1 = operations.LayerNorm(channels)
        self.attn1 = Attention(channels, None, c.head_dim, operations=operations)
        self.norm2 = operations.LayerNorm(channels)
        self.attn2: nn.Module
        if c.prompts:
            self.attn2 = ConstantAttention(
                channels, c.prompts, c.tokens, c.head_dim, operations=operations
            )
        else:
            self.attn2 = Attention(
                channels, c.cross_attention_dim, c.head_dim, operations=operations
            )
        self.norm3 = operations.LayerNorm(channels)
        self.ff = FeedForward(channels, operations=operations)

    def forward(self, x: Tensor, context: Context) -> Tensor:
        x = x + self.attn1(self.norm1(x))
        x = x + self.attn2(self.norm2(x), context)
        return x + self.ff(self.norm3(x))


class Transformer(nn.Module):
    """A transformer block over the positions of a feature map: b c h w -> b c h w."""

    fast = False

    def __init__(self, channels: int, c: UNetConfig, *, operations: Any = nn):
        super().__init__()
        self.norm = operations.GroupNorm(c.norm_num_groups, channels, eps=1e-6)
        self.proj_in = operations.Linear(channels, channels)
        self.transformer_blocks = nn.ModuleList(
            [TransformerBlock(channels, c, operations=operations)]
        )
        self.proj_out = operations.Linear(channels, channels)

    def forward(self, x: Tensor, context: Context) -> Tensor:
        h, w = x.shape[-2:]
        normed = fused.norm(x, self.norm, silu=False) if self.fast else self.norm(x)
        tokens = self.proj_in(rearrange(normed, "b c h w -> b (h w) c"))
        tokens = self.proj_out(self.transformer_blocks[0](tokens, context))
        tokens = rearrange(tokens, "b (h w) c -> b c h w", h=h, w=w)
        # Same memory order as x: a channels-last tensor left here slows all that follows on a CPU.
        return x + (tokens if self.fast else tokens.contiguous())


class Level(nn.Module):
    """Residual blocks of one resolution, transformers between them, and the step to the next.

    widths: inputs and outputs of each residual block.
    """

    def __init__(
        self,
        widths: list[tuple[int, int]],
        c: UNetConfig,
        *,
        attention: bool,
        down: bool = False,
        up: bool = False,
        operations: Any = nn,
    ):
        super().__init__()
        outputs = widths[-1][1]
        self.resnets = nn.ModuleList(
            ResnetBlock(
                i,
                o,
                temb=None if c.prompts else c.time_dim,
                groups=c.norm_num_groups,
                eps=EPS,
                operations=operations,
            )
            for i, o in widths
        )
        self.attentions = (
            nn.ModuleList(Transformer(o, c, operations=operations) for _, o in widths)
            if attention
            else None
        )
        if down:
            self.downsamplers = nn.ModuleList(
                [Downsample(outputs, padding=1, operations=operations)]
            )
        if up:
            self.upsamplers = nn.ModuleList(
                [Upsample(outputs, phases=c.phases, operations=operations)]
            )

    def block(self, n: int, x: Tensor, temb: Tensor | None, context: Context) -> Tensor:
        """Residual block n and its transformer, if there is one."""
        x = self.resnets[n](x, temb)
        return x if self.attentions is None else self.attentions[n](x, context)


class DownLevel(Level):
    """A level of the encoder side; returns what the decoder side will need as well."""

    def forward(
        self, x: Tensor, temb: Tensor | None, context: Context
    ) -> tuple[Tensor, list[Tensor]]:
        skips = []
        for n in range(len(self.resnets)):
            x = self.block(n, x, temb, context)
            skips.append(x)
        if hasattr(self, "downsamplers"):
            x = self.downsamplers[0](x)
            skips.append(x)
        return x, skips


class UpLevel(Level):
    """A level of the decoder side; consumes the skips it needs from the end of the list."""

    def forward(
        self, x: Tensor, skips: list[Tensor], temb: Tensor | None, context: Context
    ) -> Tensor:
        for n in range(len(self.resnets)):
            x = self.block(n, torch.cat([x, skips.pop()], dim=1), temb, context)
        return self.upsamplers[0](x) if hasattr(self, "upsamplers") else x


class Middle(nn.Module):
    """The coarsest level: block, transformer, block."""

    def __init__(self, channels: int, c: UNetConfig, *, operations: Any = nn):
        super().__init__()
        temb = None if c.prompts else c.time_dim
        self.resnets = nn.ModuleList(
            ResnetBlock(
                channels,
                channels,
                temb=temb,
                groups=c.norm_num_groups,
                eps=EPS,
                operations=operations,
            )
            for _ in range(2)
        )
        self.attentions = nn.ModuleList([Transformer(channels, c, operations=operations)])

    def forward(self, x: Tensor, temb: Tensor | None, context: Context) -> Tensor:
        x = self.attentions[0](self.resnets[0](x, temb), context)
        return self.resnets[1](x, temb)


class UNet(nn.Module):
    """Estimate of the noise (or velocity) in a latent.

    Sides of latents must be multiples of `config.multiple`.
    """

    fast = False

    def __init__(self, config: UNetConfig = SD21_16, *, operations: Any = nn):
        super().__init__()
        self.config = c = config
        widths = c.block_out_channels
        self.conv_in = operations.Conv2d(c.latent_channels, widths[0], 3, padding=1)
        self.time_embedding = (
            None if c.prompts else TimestepMLP(widths[0], c.time_dim, operations=operations)
        )
        last = len(widths) - 1
        skips = [widths[0]]
        self.down_blocks = nn.ModuleList()
        before = widths[0]
        for n, width in enumerate(widths):
            pairs = [(before if k == 0 else width, width) for k in range(c.layers_per_block)]
            self.down_blocks.append(
                DownLevel(pairs, c, attention=c.attention[n], down=n < last, operations=operations)
            )
            skips += [width] * (c.layers_per_block + (n < last))
            before = width
        self.mid_block = Middle(widths[-1], c, operations=operations)
        self.up_blocks = nn.ModuleList()
        for n, width in reversed(list(enumerate(widths))):
            pairs = []
            for _ in range(c.layers_per_block + 1):
                pairs.append((before + skips.pop(), width))
                before = width
            self.up_blocks.append(
                UpLevel(pairs, c, attention=c.attention[n], up=n > 0, operations=operations)
            )
        for place, layer in self.named_modules():
            if isinstance(layer, ConstantAttention):
                layer.place = place
        self.conv_norm_out = operations.GroupNorm(c.norm_num_groups, widths[0], eps=EPS)
        self.conv_out = operations.Conv2d(widths[0], c.latent_channels, 3, padding=1)

    def forward(self, z: Tensor, t: Tensor | int | None, context: Context) -> Tensor:
        """Latent b c h w, timestep (number or b), prompt b m d -> b c h w.

        Of a folded network (`config.prompts` > 0) the timestep is a constant and not looked at;
        `context` is then the number of prompts, one after another, in the batch, or one other
        prompt's keys and values.
        """
        temb = None
        if self.time_embedding is not None:
            # A number is filled in on the device: copied there it could not be recorded.
            t = t.to(z.device) if isinstance(t, Tensor) else torch.full((), t, device=z.device)
            t = t.expand(z.shape[0])
            sinusoids = timestep_embedding(t, self.config.block_out_channels[0])
            temb = self.time_embedding(sinusoids.to(z.dtype))
        x = self.conv_in(z)
        skips = [x]
        for level in self.down_blocks:
            x, outputs = level(x, temb, context)
            skips += outputs
        x = self.mid_block(x, temb, context)
        for level in self.up_blocks:
            x = level(x, skips, temb, context)
        if self.fast:
            return self.conv_out(fused.norm(x, self.conv_norm_out))
        return self.conv_out(F.silu(self.conv_norm_out(x)))
