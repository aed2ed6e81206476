"""Representation alignment (REPA): frozen DINOv2 features and the projector that meets them.

The UNet's first level ends at 1/16 of the picture's side. DINOv2 cuts its input into patches of 14
pixels, so a picture resized to 7/8 of its side gives the very same grid: tokens are compared one by
one, and nothing is interpolated.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from gendr.errors import first_line
from gendr.networks.unet import UNet

# Names in recipes -> the hub's.
ENCODERS = {
    "dinov2-s": "facebook/dinov2-small",
    "dinov2-b": "facebook/dinov2-base",
    "dinov2-l": "facebook/dinov2-large",
    "dinov2-g": "facebook/dinov2-giant",
}
# Their widths, and their numbers of parameters.
ENCODER_SIZES = {
    "dinov2-s": (384, 22_056_576),
    "dinov2-b": (768, 86_580_480),
    "dinov2-l": (1024, 304_368_640),
    "dinov2-g": (1536, 1_136_480_768),
}
PATCH = 14
# Pixels of the picture per token.
CELL = 16
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
HIDDEN = 2048


class FeaturesError(RuntimeError):
    """The encoder can't be had; the message says why and what to do."""


def tokens(x: Tensor) -> Tensor:
    """A feature map as tokens, row by row: b c h w -> b (h w) c."""
    return rearrange(x, "b c h w -> b (h w) c")


class DinoV2(nn.Module):
    """A frozen DINOv2: the features of a picture, one token for every 16x16 pixels."""

    def __init__(self, model: nn.Module):
        """model: a `transformers.Dinov2Model`, with or without registers."""
        super().__init__()
        if model.config.patch_size != PATCH:
            raise ValueError(
                f"the encoder has patches of {model.config.patch_size} pixels, expected {PATCH}: "
                f"give one of {', '.join(ENCODERS)}, or a DINOv2 folder"
            )
        self.model = model.requires_grad_(False).eval()
        self.width: int = model.config.hidden_size

    @classmethod
    def load(cls, name: str = "dinov2-b", **options: Any) -> DinoV2:
        """By a name of `ENCODERS`, a hub id, a folder, or a file of torch.hub's; FeaturesError where it
        can't be had.

        options: of transformers' `from_pretrained`, such as revision and local_files_only.
        """
        if Path(name).is_file():
            return cls(from_torch_hub(Path(name)))
        # Here, because it takes seconds and most users of this module don't load an encoder.
        from transformers import AutoModel

        source = ENCODERS.get(name, name)
        try:
            return cls(AutoModel.from_pretrained(source, **options))
        except OSError as error:
            raise FeaturesError(
                f"DINOv2 can't be loaded from {source}: fetch it where there is a network "
                f"(`hf download {source}`) and give its folder instead of {name} ({first_line(error)})"
            ) from error

    def train(self, mode: bool = True) -> DinoV2:
        """Stays in evaluation mode, whatever the module it is part of does."""
        return super().train(False)

    @torch.no_grad()
    def forward(self, x: Tensor) -> Tensor:
        """Pictures b 3 h w in [-1, 1], sides multiples of 16 -> b (h/16 w/16) d, row by row."""
        h, w = x.shape[-2:]
        if h % CELL or w % CELL:
            raise ValueError(f"sides must be multiples of {CELL} pixels for REPA, not {h}x{w}")
        mean, std = (x.new_tensor(v, dtype=torch.float32)[:, None, None] for v in (MEAN, STD))
        x = ((x.float() + 1) / 2 - mean) / std
        x = F.interpolate(x, (h // CELL * PATCH, w // CELL * PATCH), mode="bicubic")
        out = self.model(x.to(next(self.model.parameters()).dtype)).last_hidden_state
        # The class token, and registers where there are any, stand in front.
        return out[:, 1 + getattr(self.model.config, "num_register_tokens", 0) :]


# What the authors' own files (torch.hub's dinov2_vitb14_pretrain.pth and its kin) call what
# transformers has under other names.
HUB_NAMES = (
    ("patch_embed.proj.", "embeddings.patch_embeddings.projection."),
    ("cls_token", "embeddings.cls_token"),
    ("mask_token", "embeddings.mask_token"),
    ("pos_embed", "embeddings.position_embeddings"),
    ("register_tokens", "embeddings.register_tokens"),
    ("blocks.", "encoder.layer."),
    ("norm.", "layernorm."),
)
HUB_LAYER = (
    (".attn.proj.", ".attention.output.dense."),
    (".ls1.gamma", ".layer_scale1.lambda1"),
    (".ls2.gamma", ".layer_scale2.lambda1"),
    (".mlp.w12.", ".mlp.weights_in."),
    (".mlp.w3.", ".mlp.weights_out."),
)
HEAD = 64  # channels of a head of attention, the same in all sizes


def from_torch_hub(path: Path) -> nn.Module:
    """A `transformers.Dinov2Model` with the weights of a file of torch.hub's, whose size it tells.

    FeaturesError where the file is something else.
    """
    from transformers import (
        Dinov2Config,
        Dinov2Model,
        Dinov2WithRegistersConfig,
        Dinov2WithRegistersModel,
    )

    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
        patch, places = state["patch_embed.proj.weight"], state["pos_embed"]
        width = patch.shape[0]
        layers = 1 + max(int(name.split(".")[1]) for name in state if name.startswith("blocks."))
        gated = "blocks.0.mlp.w12.weight" in state
        inner = None if gated else state["blocks.0.mlp.fc1.weight"].shape[0] // width
    except Exception as error:  # a pickle fails in many ways
        raise FeaturesError(
            f"{path.name} is no DINOv2 of torch.hub's (dinov2_vitb14_pretrain.pth and its kin): give "
            f"one, a folder, or a name of {', '.join(ENCODERS)} ({error})"
        ) from error
    config: dict[str, Any] = {
        "hidden_size": width,
        "num_hidden_layers": layers,
        "num_attention_heads": width // HEAD,
        "mlp_ratio": inner or 4,
        "use_swiglu_ffn": gated,
        "patch_size": patch.shape[-1],
        "image_size": round((places.shape[1] - 1) ** 0.5) * patch.shape[-1],
    }
    kind, settings = Dinov2Model, Dinov2Config
    if "register_tokens" in state:
        config["num_register_tokens"] = state["register_tokens"].shape[1]
        kind, settings = Dinov2WithRegistersModel, Dinov2WithRegistersConfig
    renamed: dict[str, Tensor] = {}
    for name, tensor in state.items():
        old, new = next(((o, n) for o, n in HUB_NAMES if name.startswith(o)), ("", ""))
        name = new + name.removeprefix(old)
        for old, new in HUB_LAYER:
            name = name.replace(old, new)
        if ".attn.qkv." in name:
            for part, piece in zip(("query", "key", "value"), tensor.chunk(3), strict=True):
                renamed[name.replace(".attn.qkv.", f".attention.attention.{part}.")] = piece
        else:
            renamed[name] = tensor
    # Through the door that knows the names of published files, whatever this version calls them inside.
    model, report = kind.from_pretrained(
        None, config=settings(**config), state_dict=renamed, output_loading_info=True
    )
    wrong = [*report["missing_keys"], *report["unexpected_keys"]]
    if wrong:
        raise FeaturesError(
            f"{path.name} is no DINOv2 as published: {sorted(wrong)[0]} does not fit"
        )
    return model


class Projector(nn.Sequential):
    """Three linear layers with SiLU: b n c -> b n d; 6.43 M parameters for SD2.1 and DINOv2-B."""

    def __init__(self, inputs: int, outputs: int, *, hidden: int = HIDDEN):
        super().__init__(
            nn.Linear(inputs, hidden),
            nn.SiLU(),
            nn.Linear(hidden, hidden),
            nn.SiLU(),
            nn.Linear(hidden, outputs),
        )
        for layer in self:
            if isinstance(layer, nn.Linear):
                nn.init.xavier_uniform_(layer.weight)
                nn.init.zeros_(layer.bias)


class Aligned(nn.Module):
    """A UNet with its projector, if any: one module, so that wrappers for several processes see both.

    forward(z, t, context) -> (the UNet's output b c h w, projected tokens b n d of the first level
    behind its downsampler, "after the first downsampling block", or None without a projector). The
    tap fires outside of blocks that are recomputed, so gradient checkpointing does not disturb it.
    """

    def __init__(self, unet: UNet, projector: Projector | None = None):
        super().__init__()
        self.unet, self.projector = unet, projector
        self._tapped: Tensor | None = None
        if projector is None:
            return
        if not hasattr(unet.down_blocks[0], "downsamplers"):
            raise ValueError(
                "REPA taps the UNet behind its first downsampler, and a UNet of one level has none"
            )
        # A bound method, so that a copy of this module taps its own UNet.
        unet.down_blocks[0].register_forward_hook(self._tap)

    def _tap(self, level: nn.Module, inputs: Any, output: tuple[Tensor, list[Tensor]]) -> None:
        self._tapped = output[0]

    def forward(self, z: Tensor, t: Tensor | int, context: Tensor) -> tuple[Tensor, Tensor | None]:
        out = self.unet(z, t, context)
        if self.projector is None:
            return out, None
        # Not kept: it holds the graph.
        tapped, self._tapped = self._tapped, None
        return out, self.projector(tokens(tapped))
