"""What comes over the wires: pictures, masks and prompts as ComfyUI has them, brought into the library's form.

Whatever is wrong with them is said in ComfyUI's words, the cause first: newer front ends show only
the beginning of a message.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

# What Load Image sends as the mask of a picture without transparency.
NO_MASK = (64, 64)


def checked_picture(image: Tensor) -> Tensor:
    """An IMAGE b h w c in [0, 1], 1 to 4 channels -> b c h w, a view. ValueError with a remedy."""
    if not isinstance(image, Tensor):
        raise ValueError(
            f"What came as image is no picture but {type(image).__name__}: connect the IMAGE output "
            "of a node such as Load Image or VAE Decode."
        )
    if image.ndim == 4 and 0 in image.shape:
        raise ValueError(
            "There is no picture to restore: the image input is an empty batch. Check that the "
            "node before this one finds its files."
        )
    sides = "x".join(str(side) for side in image.shape)
    if image.ndim != 4 or image.shape[-1] > 4:
        raise ValueError(
            f"What came as image has the shape {sides}; a picture in ComfyUI is batch x height x "
            "width x 1 to 4 channels. The node before this one gives something else, a latent "
            "perhaps: decode it with VAE Decode, or use another node."
        )
    if not image.is_floating_point():
        raise ValueError(
            f"The picture holds whole numbers ({str(image.dtype).removeprefix('torch.')}); pictures "
            "in ComfyUI are fractions from 0 to 1. Use another node before this one to load it."
        )
    _check_numbers(image, "picture", "after VAE Decode, start ComfyUI with --fp32-vae")
    return image.movedim(-1, 1)


def checked_mask(mask: Tensor | None, pixels: Tensor) -> Tensor | None:
    """A MASK for pictures b c h w -> 1 h w or b h w float32 in [0, 1]; None = restore everything.

    h w, b h w, b 1 h w and b h w 1 are masks; one of another size but the same shape is scaled. The
    black 64x64 that Load Image sends where there is no transparency is none. ValueError with a remedy.
    """
    if mask is None:
        return None
    if not isinstance(mask, Tensor):
        raise ValueError(
            f"What came as mask is no mask but {type(mask).__name__}: connect a MASK output."
        )
    b, (h, w) = len(pixels), pixels.shape[-2:]
    planes = _planes(mask)
    _check_numbers(planes, "mask", "use another mask")
    planes = planes.to(pixels.device, torch.float32).clamp(0, 1)
    size = tuple(planes.shape[-2:])
    if size == NO_MASK and not planes.any():
        return None
    if len(planes) not in (1, b):
        raise ValueError(
            f"There are {len(planes)} masks for {b} pictures: give one mask for all, or one each."
        )
    if size == (h, w):
        return planes
    if not _same_shape(size, (h, w)):
        raise ValueError(
            f"The mask is {size[1]}x{size[0]}, the picture {w}x{h}: use a mask made for this "
            "picture, or crop both alike. A mask of the same shape may have any size."
        )
    mode = "area" if size[0] > h else "bilinear"
    return F.interpolate(planes[:, None], size=(h, w), mode=mode)[:, 0]


def checked_prompt(positive: Any) -> Tensor | None:
    """A CONDITIONING of one text -> its embedding 1 n d float32; None = no prompt. ValueError with a remedy."""
    if positive is None:
        return None
    found = isinstance(positive, list) and all(
        isinstance(entry, (list, tuple)) and entry and isinstance(entry[0], Tensor)
        for entry in positive
    )
    if not found:
        raise ValueError(
            f"What came as positive is no conditioning but {type(positive).__name__}: connect CLIP Text "
            "Encode."
        )
    embeddings = [entry[0] for entry in positive]
    if len(embeddings) != 1 or len(embeddings[0]) != 1:
        raise ValueError(
            "positive holds several conditionings side by side; GenDR takes one prompt: connect one "
            "CLIP Text Encode, or join texts with Conditioning (Concat)."
        )
    _check_numbers(embeddings[0], "prompt", "encode it again")
    return embeddings[0].to(torch.float32)


def _planes(mask: Tensor) -> Tensor:
    """b h w of whatever order a mask came in."""
    if mask.ndim == 2:
        return mask[None]
    if mask.ndim == 4 and mask.shape[1] == 1:
        mask = mask[:, 0]
    elif mask.ndim == 4 and mask.shape[-1] == 1:
        mask = mask[..., 0]
    if mask.ndim != 3 or 0 in mask.shape:
        sides = "x".join(str(side) for side in mask.shape)
        raise ValueError(
            f"What came as mask has the shape {sides}; a mask in ComfyUI is batch x height x width. "
            "To use a picture, put Convert Image to Mask before this node."
        )
    return mask


def _check_numbers(values: Tensor, name: str, remedy: str) -> None:
    """ValueError where there are NaN or infinite values."""
    bad = int((~torch.isfinite(values)).sum())
    if bad:
        raise ValueError(
            f"The {name} holds {bad} values that are not numbers (NaN or infinite): the node before "
            f"this one gave a broken {name}. Mend it there; {remedy}."
        )


def _same_shape(size: tuple[int, int], other: tuple[int, int]) -> bool:
    """Whether the one could be the other, scaled and rounded to whole pixels."""
    least = max((a - 0.5) / b for a, b in zip(size, other, strict=True))
    most = min((a + 0.5) / b for a, b in zip(size, other, strict=True))
    return least <= most
