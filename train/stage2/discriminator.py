"""The discriminator of CiDA: small heads on the features of the scores' shared base.

The base sees noised latents without an adapter, so the features stand still while both scores
learn; only its encoder side and its middle are evaluated, which is about half its cost.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from gendr.networks.unet import UNetConfig, timestep_embedding
from train.stage2.scores import Scores


def places(config: UNetConfig) -> dict[str, int]:
    """Where heads can sit, coarsest last, and how many channels are there: down0 ... mid."""
    widths = config.block_out_channels
    return {**{f"down{n}": width for n, width in enumerate(widths)}, "mid": widths[-1]}


def features(scores: Scores, z_t: Tensor, t: Tensor, prompt: Tensor) -> dict[str, Tensor]:
    """Outputs of the base's levels and of its middle, by the names of `places`.

    z_t: noised latent b c h w; t: b; prompt: 1 or b, m d. A level's output is behind its
    downsampler. Gradients flow to z_t; the base has none.
    """
    unet, dtype = scores.unet, scores.dtype
    prompt = prompt.expand(z_t.shape[0], -1, -1).to(dtype)
    sinusoids = timestep_embedding(t, unet.config.block_out_channels[0])
    with scores.use(None):
        temb = unet.time_embedding(sinusoids.to(dtype))
        x, found = unet.conv_in(z_t.to(dtype)), {}
        for n, level in enumerate(unet.down_blocks):
            x, _ = level(x, temb, prompt)
            found[f"down{n}"] = x
        found["mid"] = unet.mid_block(x, temb, prompt)
    return found


class Head(nn.Sequential):
    """Features b c h w -> map of logits b 1 h w, zero before the first step."""

    def __init__(self, channels: int, *, width: int, groups: int = 32):
        last = nn.Conv2d(width, 1, 1)
        # Both losses start at known values, and the generator gets no push from random heads.
        nn.init.zeros_(last.weight)
        nn.init.zeros_(last.bias)
        super().__init__(
            nn.Conv2d(channels, width, 1),
            nn.GroupNorm(groups, width),
            nn.SiLU(),
            nn.Conv2d(width, width, 3, padding=1),
            nn.GroupNorm(groups, width),
            nn.SiLU(),
            last,
        )


class Discriminator(nn.Module):
    """One head per chosen place; 0.92 M parameters on the middle of SD2.1, 4.19 M on all five.

    at: names of `places`; width: channels inside a head.
    """

    def __init__(
        self,
        config: UNetConfig,
        *,
        at: tuple[str, ...],
        width: int,
        groups: int = 32,
    ):
        super().__init__()
        channels = places(config)
        if not at or (unknown := set(at) - set(channels)):
            raise ValueError(
                f"heads can sit at {', '.join(channels)}, not at {', '.join(unknown) if at else 'none'}"
            )
        self.heads = nn.ModuleDict(
            {name: Head(channels[name], width=width, groups=groups) for name in at}
        )

    def forward(self, found: dict[str, Tensor]) -> list[Tensor]:
        """Features by place -> one map of logits b 1 h w per head, in the heads' dtype."""
        logits = []
        for name, head in self.heads.items():
            x = found[name]
            logits.append(
                head(x if torch.is_autocast_enabled(x.device.type) else x.to(head[0].weight.dtype))
            )
        return logits
